function route() {
  const latent = show(document.getElementById("latent"), openLatent);
  document.title = latent === null ? DATA.title : `Latent ${latent} · ${DATA.title}`;
}

function setUp() {
  const parts = [DATA.title.includes(DATA.hook) ? "" : DATA.hook, DATA.dataset && `${DATA.dataset} ${DATA.split}`.trim(), `${DATA.total} series`,
    `${DATA.active} of ${DATA.latents} latents active`, `${number(DATA.l0)} per position`];
  document.getElementById("about").textContent = parts.filter(Boolean).join(" · ");
  const summary = summaryTable();
  if (summary) document.getElementById("summary").append(summary);
  setUpTable();
  setUpKeys(document.getElementById("latent"));
  addEventListener("hashchange", route);
  route();
}

setUp();
