// The address after # says what is shown: nothing for the table, a number for a latent.
function route() {
  const text = location.hash.slice(1), latent = Number(text);
  const open = /^\d+$/.test(text) && latent < DATA.latents;
  document.getElementById("index").hidden = open;
  document.getElementById("latent").hidden = !open;
  document.title = open ? `Latent ${latent} · ${DATA.title}` : DATA.title;
  if (open) openLatent(latent);
  scrollTo(0, open ? 0 : route.scrolled || 0);
}

function setUp() {
  const parts = [DATA.title.includes(DATA.hook) ? "" : DATA.hook, DATA.dataset && `${DATA.dataset} ${DATA.split}`.trim(), `${DATA.total} series`,
    `${DATA.active} of ${DATA.latents} latents active`, `${number(DATA.l0)} per position`];
  document.getElementById("about").textContent = parts.filter(Boolean).join(" · ");
  const summary = summaryTable();
  if (summary) document.getElementById("summary").append(summary);
  setUpTable();
  addEventListener("hashchange", route);
  addEventListener("scroll", () => {
    if (!document.getElementById("index").hidden) route.scrolled = scrollY;
  }, {passive: true});
  addEventListener("keydown", event => {
    if (event.target.closest("input") || event.altKey || event.ctrlKey || event.metaKey) return;
    const id = {ArrowLeft: "previous", ArrowRight: "next", Escape: "back"}[event.key];
    const link = id && !document.getElementById("latent").hidden && document.getElementById(id);
    if (link) location.hash = link.getAttribute("href").slice(1);
  });
  route();
}

setUp();
