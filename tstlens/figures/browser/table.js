// The table of all latents: sorted by a click on a heading, searched, drawn a page at a time.
const PAGE = 100;
const COLUMNS = [
  {key: "latent", label: "latent", value: i => i, first: true, text: i => String(i)},
  {key: "head", label: "head", hint: "the dictionary reads every head by itself", text: i => String(column("head")[i])},
  {key: "density", label: "active at", hint: "share of observed positions", text: i => percent(column("density")[i])},
  {key: "series", label: "series", hint: "series in which it is active", text: i => String(column("series")[i])},
  {key: "max", label: "max", hint: "largest activation"},
  {key: "class", label: "class", hint: "class whose AUC is furthest from chance", words: true},
  {key: "auc", label: "AUC", hint: "largest activation in a series, this class against the rest",
    text: i => Number.isNaN(column("auc")[i]) ? "–" : column("auc")[i].toFixed(3)},
  {key: "q_class", label: "q", hint: "false-discovery rate against shuffled labels", text: i => chance(column("q_class")[i])},
  {key: "property", label: "follows", hint: "property of the window", words: true, wide: true},
  {key: "r_heldout", label: "r held out", hint: "Pearson r on held-out series; ✓ where confirmed",
    text: i => number(column("r_heldout")[i], true) + (column("confirmed")[i] ? " ✓" : "")},
  {key: "moves", label: "moves", hint: "output that its removal changes most", words: true},
  {key: "effect", label: "by", hint: "change of this output", text: i => number(column("effect")[i], true)},
  {key: "effect_size", label: "effect", hint: "root mean square change over all outputs"},
].filter(c => c.key === "latent" || DATA.table[c.key]);

const state = {sort: DATA.table.effect_size ? "effect_size" : "density", down: true, query: "", alive: true,
  order: [], drawn: 0};

function kind(entry) {
  return entry.first ? "first" : entry.wide ? "wide" : entry.words ? "word" : "num";
}

function sortKey(entry) {
  if (entry.words) return i => word(entry.key, i);
  return entry.value || (i => column(entry.key)[i]);
}

function matches(i, query) {
  if (!query) return true;
  if (/^#?\d+$/.test(query)) {
    const wanted = query.replace("#", "");
    return String(i) === wanted || DATA.classes.includes(wanted) && word("class", i) === wanted;
  }
  const text = [`latent ${i}`, "class " + word("class", i), word("property", i), word("moves", i)]
    .filter(Boolean).join(" · ").toLowerCase();
  // A number belongs to the word before it, and is whole: "channel 1" is not channel 11.
  return query.match(/[^\s\d]+\s+\d+|\S+/g).every(term =>
    new RegExp(term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&") + "(?!\\d)").test(text));
}

function arrange() {
  const entry = COLUMNS.find(c => c.key === state.sort), key = sortKey(entry);
  const density = column("density"), query = state.query.trim().toLowerCase();
  const found = [];
  for (let i = 0; i < DATA.latents; i++) {
    if ((!state.alive || density[i] > 0 || query === String(i)) && matches(i, query)) found.push(i);
  }
  const values = new Map(found.map(i => [i, key(i)]));
  const missing = v => v === null || Number.isNaN(v);
  found.sort((a, b) => {
    const x = values.get(a), y = values.get(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    const sign = typeof x === "string" ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
    return (state.down ? -sign : sign) || a - b;
  });
  state.order = found;
  state.drawn = 0;
  document.querySelector("#latents tbody").replaceChildren();
  document.getElementById("count").textContent =
    `${found.length} of ${DATA.latents} latents`;
  for (const head of document.querySelectorAll("#latents th")) {
    const on = head.dataset.key === state.sort;
    head.setAttribute("aria-sort", on ? (state.down ? "descending" : "ascending") : "none");
  }
  drawMore();
}

function drawMore() {
  const body = document.querySelector("#latents tbody");
  const next = state.order.slice(state.drawn, state.drawn + PAGE);
  for (const i of next) {
    const row = make("tr", {"data-latent": i});
    for (const entry of COLUMNS) {
      const cell = make("td", {class: kind(entry)});
      if (entry.key === "latent") cell.append(make("a", {href: `#${i}`}, String(i)));
      else if (entry.words) cell.textContent = word(entry.key, i) ?? "–";
      else cell.textContent = entry.text ? entry.text(i) : number(column(entry.key)[i]);
      row.append(cell);
    }
    body.append(row);
  }
  state.drawn += next.length;
  document.getElementById("more").hidden = state.drawn >= state.order.length;
}

function setUpTable() {
  const heads = make("tr", {});
  for (const entry of COLUMNS) {
    const button = make("button", {type: "button", title: entry.hint}, entry.label);
    button.addEventListener("click", () => {
      const text = Boolean(entry.words) || entry.key === "latent" || entry.key === "q_class";
      if (state.sort === entry.key) state.down = !state.down;
      else { state.sort = entry.key; state.down = !text; }
      arrange();
    });
    heads.append(make("th", {"data-key": entry.key, scope: "col",
      class: kind(entry)}, button));
  }
  document.querySelector("#latents thead").append(heads);
  document.querySelector("#latents tbody").addEventListener("click", event => {
    const row = event.target.closest("tr");
    if (row && !String(getSelection())) location.hash = row.dataset.latent;
  });
  document.getElementById("search").addEventListener("input", event => {
    state.query = event.target.value;
    arrange();
  });
  document.getElementById("alive").addEventListener("change", event => {
    state.alive = event.target.checked;
    arrange();
  });
  document.getElementById("more").addEventListener("click", drawMore);
  arrange();
}

const MONO = {
  units: ["active units", v => v.toFixed(0)], l0: ["active per position", v => v.toFixed(1)],
  class_share: ["tell a class (q ≤ 0.05)", percent], class_auc: ["mean AUC", number],
  class_auc_chance: ["… by chance", number], purity: ["class purity of top windows", percent],
  purity_chance: ["… by chance", percent], property_share: ["follow a property", percent],
  property_r: ["median |r| held out", number], similarity: ["likeness of top windows", number],
  similarity_chance: ["… by chance", number],
};

function summaryTable() {
  const mono = DATA.mono;
  if (!mono.names.length) return null;
  const head = make("tr", {}, make("th", {}), mono.names.map(n => make("th", {scope: "col"}, n)));
  const rows = mono.columns.map((name, c) => {
    const [label, show] = MONO[name] || [name, number];
    return make("tr", {}, make("th", {scope: "row"}, label), mono.values.map(row =>
      make("td", {class: "num"}, row[c] === null ? "–" : show(row[c]))));
  });
  return make("details", {}, make("summary", {}, "Beside a random dictionary and the neurons"),
    make("div", {class: "scroll"}, make("table", {class: "small"}, make("thead", {}, head), make("tbody", {}, rows))));
}
