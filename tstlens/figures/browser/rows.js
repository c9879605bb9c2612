// The long table of a start page: sorted by a click on a heading, filtered, drawn a part at a time,
// and walked through with the keyboard. table.js says COLUMNS, TABLE (noun and number of rows),
// keep(i), which leaves out what the filter does not match, and fill(cell, entry, i).
const PAGE = 50;
const state = {sort: null, down: true, query: "", alive: true, order: [], drawn: 0, left: null};

function arrange() {
  const entry = COLUMNS.find(c => c.key === state.sort), key = TABLE.key(entry), found = [];
  for (let i = 0; i < TABLE.rows; i++) if (keep(i)) found.push(i);
  const values = new Map(found.map(i => [i, key(i)]));
  const missing = v => v === null || v === undefined || Number.isNaN(v);
  found.sort((a, b) => {
    const x = values.get(a), y = values.get(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    const sign = typeof x === "string" ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
    return (state.down ? -sign : sign) || a - b;
  });
  state.order = found;
  state.drawn = 0;
  document.querySelector("#latents tbody").replaceChildren();
  document.getElementById("count").textContent = `${found.length} of ${TABLE.rows} ${TABLE.noun}`;
  for (const head of document.querySelectorAll("#latents th")) {
    const on = head.dataset.key === state.sort;
    head.setAttribute("aria-sort", on ? (state.down ? "descending" : "ascending") : "none");
  }
  drawMore();
}

// The next rows of the table; how many are left says the foot.
function drawMore(most = PAGE) {
  const body = document.querySelector("#latents tbody"), first = state.drawn;
  const next = state.order.slice(first, first + most);
  for (const i of next) {
    const row = make("tr", {"data-row": i});
    for (const entry of COLUMNS) {
      const cell = make("td", {class: TABLE.kind(entry)});
      fill(cell, entry, i);
      row.append(cell);
    }
    body.append(row);
  }
  state.drawn += next.length;
  const total = state.order.length, rest = total - state.drawn;
  const more = document.getElementById("more"), all = document.getElementById("all");
  more.hidden = !rest;
  more.textContent = `Show ${Math.min(PAGE, rest)} more`;
  all.hidden = rest <= PAGE;
  all.textContent = `Show all ${total}`;
  document.getElementById("shown").textContent = total === 0 ? `No ${TABLE.noun} match the filter.`
    : rest ? `The first ${state.drawn} of ${total}.` : total > PAGE ? `All ${total}.` : "";
  return next.length ? linkAt(first) : null;
}

function linkAt(index) {
  return document.querySelectorAll("#latents tbody tr")[index]?.querySelector("a") ?? null;
}

function linkOf(i) {
  return document.querySelector(`#latents tbody tr[data-row="${i}"] a`);
}

// Back at the table, as long as it was: the row that was opened has the focus again.
function returnTo(i) {
  const drawn = state.drawn;
  arrange();
  if (drawn > state.drawn) drawMore(drawn - state.drawn);
  const at = state.order.indexOf(i);
  if (at >= state.drawn) drawMore(at + 1 - state.drawn);
  linkOf(i)?.focus({preventScroll: true});
}

function walk(event) {
  const rows = [...document.querySelectorAll("#latents tbody tr")], at = rows.indexOf(event.target.closest("tr"));
  const to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1}[event.key];
  if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  if (to < 0) document.getElementById("search").focus();
  else (linkAt(to) ?? (state.drawn < state.order.length ? drawMore() : null))?.focus();
}

function setUpTable() {
  const heads = make("tr", {}), search = document.getElementById("search");
  for (const entry of COLUMNS) {
    const button = make("button", {type: "button", title: entry.hint}, entry.label || entry.key);
    button.addEventListener("click", () => {
      if (state.sort === entry.key) state.down = !state.down;
      else { state.sort = entry.key; state.down = TABLE.falls(entry); }
      arrange();
    });
    heads.append(make("th", {"data-key": entry.key, scope: "col", class: TABLE.kind(entry)}, button));
  }
  document.querySelector("#latents thead").append(heads);
  const body = document.querySelector("#latents tbody");
  body.addEventListener("click", event => {
    const row = event.target.closest("tr");
    if (row && !String(getSelection())) location.hash = row.dataset.row;
  });
  body.addEventListener("keydown", walk);
  search.addEventListener("input", () => { state.query = search.value; arrange(); });
  search.addEventListener("keydown", event => {
    if (event.key === "ArrowDown") { event.preventDefault(); linkAt(0)?.focus(); }
    if (event.key === "Escape" && search.value) { event.preventDefault(); search.value = state.query = ""; arrange(); }
  });
  document.getElementById("alive").addEventListener("change", event => { state.alive = event.target.checked; arrange(); });
  document.getElementById("more").addEventListener("click", () => drawMore()?.focus());
  document.getElementById("all").addEventListener("click", () => drawMore(Infinity)?.focus());
  arrange();
}

// Keys of the whole page: / filters; on a page of one row ← and → go on to the next, Escape goes back.
function setUpKeys(open) {
  const typing = "input:not([type=checkbox]), textarea, select";
  addEventListener("keydown", event => {
    if (event.target.closest(typing) || event.altKey || event.ctrlKey || event.metaKey) return;
    if (open.hidden) {
      if (event.key === "/") { event.preventDefault(); document.getElementById("search").focus(); }
      return;
    }
    const id = {ArrowLeft: "previous", ArrowRight: "next", Escape: "back"}[event.key];
    const link = id && document.getElementById(id);
    if (link) location.hash = link.getAttribute("href").slice(1);
  });
  addEventListener("scroll", () => { if (open.hidden) state.scrolled = scrollY; }, {passive: true});
}

// The address after # says what is shown: nothing for the table, a number for one row.
function show(open, draw) {
  const text = location.hash.slice(1), i = Number(text), one = /^\d+$/.test(text) && i < TABLE.rows;
  document.getElementById("index").hidden = one;
  open.hidden = !one;
  if (one) {
    draw(i);
    state.left = i;
    open.querySelector("h2").tabIndex = -1;
    open.querySelector("h2").focus({preventScroll: true});
  } else if (state.left !== null) {
    returnTo(state.left);
    state.left = null;
  }
  scrollTo(0, one ? 0 : state.scrolled || 0);
  return one ? i : null;
}
