// The table of all latents: its columns, and what the filter matches.
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

state.sort = DATA.table.effect_size ? "effect_size" : "density";

const TABLE = {
  rows: DATA.latents, noun: "latents",
  kind: entry => entry.first ? "first" : entry.wide ? "wide" : entry.words ? "word" : "num",
  key: entry => entry.words ? i => word(entry.key, i) : entry.value || (i => column(entry.key)[i]),
  falls: entry => !(entry.words || entry.key === "latent" || entry.key === "q_class"),
};

function matches(i, query) {
  if (!query) return true;
  if (/^#?\d+$/.test(query)) {
    const wanted = query.replace("#", "");
    return String(i) === wanted || DATA.classes.includes(wanted) && word("class", i) === wanted;
  }
  const text = [`latent ${i}`, DATA.table.head && `head ${column("head")[i]}`, "class " + word("class", i), word("property", i), word("moves", i)]
    .filter(Boolean).join(" · ").toLowerCase();
  // A number belongs to the word before it, and is whole: "channel 1" is not channel 11.
  return query.match(/[^\s\d]+\s+\d+|\S+/g).every(term =>
    new RegExp(term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&") + "(?!\\d)").test(text));
}

function keep(i) {
  const query = state.query.trim().toLowerCase();
  return (!state.alive || column("density")[i] > 0 || query === String(i)) && matches(i, query);
}

function fill(cell, entry, i) {
  if (entry.key === "latent") cell.append(make("a", {href: `#${i}`}, String(i)));
  else if (entry.words) cell.textContent = word(entry.key, i) ?? "–";
  else cell.textContent = entry.text ? entry.text(i) : number(column(entry.key)[i]);
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
