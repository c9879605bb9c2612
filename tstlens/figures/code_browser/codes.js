// The start page: what was searched for, and the table of all codes.
const UNITS = DATA.codes.names.length, T = DATA.table;
const SUPPORT = array(T.support), DENSITY = array(T.density), IN_SERIES = array(T.series), HOOK = array(DATA.codes.hook);
const N_CLASSES = DATA.classes.length;

function shortHook(name) {
  return name.replace("blocks.", "L").replace("hook_", "");
}

function codeName(unit) {
  const [group, head, code] = DATA.codes.names[unit];
  return `${code}` + (head !== null ? ` of head ${head}` : DATA.hooks[HOOK[unit]].groups > 1 ? ` of group ${group}` : "");
}

function codeLink(unit) {
  return make("a", {href: `#${unit}`}, `${codeName(unit)} at ${shortHook(DATA.hooks[HOOK[unit]].name)}`);
}

// The class that most of a code's places are in, with their share; null where there are none.
function mainClass(unit) {
  if (!T.places || !SUPPORT[unit]) return null;
  const places = array(T.places);
  let best = 0;
  for (let c = 1; c < N_CLASSES; c++) if (places[unit * N_CLASSES + c] > places[unit * N_CLASSES + best]) best = c;
  return {index: best, share: places[unit * N_CLASSES + best] / SUPPORT[unit]};
}

function follows(unit) {
  const c = DATA.confirmed;
  if (!c || !array(c.yes)[unit]) return null;
  return DATA.properties.names[array(c.best)[unit]];
}

const mains = Array.from({length: UNITS}, (_, unit) => mainClass(unit));
const COLUMNS = [
  {key: "code", label: "code", value: i => i, text: i => codeName(i)},
  {key: "place", label: "at", hint: "hook point", value: i => HOOK[i], text: i => shortHook(DATA.hooks[HOOK[i]].name)},
  {key: "density", label: "active at", hint: "share of observed positions", value: i => DENSITY[i], text: i => percent(DENSITY[i]), num: true},
  {key: "series", label: "series", hint: "series in which it is active", value: i => IN_SERIES[i], text: i => String(IN_SERIES[i]), num: true},
  T.places && {key: "class", label: "class", hint: "class that most of its places are in", words: true, value: i => mains[i] && DATA.classes[mains[i].index]},
  T.places && {key: "share", label: "share", hint: "share of its places in series of this class", value: i => mains[i] ? mains[i].share : NaN,
    text: i => mains[i] ? percent(mains[i].share) : "–", num: true},
  DATA.confirmed && {key: "follows", label: "follows", hint: "property of the window, confirmed on held-out series", words: true, wide: true, value: follows},
  {key: "note", label: "note", hint: "yours", words: true, said: true, value: i => noteOf(i) || null},
].filter(Boolean);

state.sort = "density";
state.place = -1;

const TABLE = {
  rows: UNITS, noun: "codes",
  kind: entry => entry.said ? "said" : entry.wide ? "wide" : entry.words ? "word" : entry.num ? "num" : "",
  key: entry => entry.value,
  falls: entry => Boolean(entry.num),
};

function matches(unit, query) {
  if (!query) return true;
  const [, , code] = DATA.codes.names[unit];
  if (/^#?\d+$/.test(query)) return String(code) === query.replace("#", "");
  const main = mains[unit];
  const text = [`code ${codeName(unit)}`, DATA.hooks[HOOK[unit]].name, shortHook(DATA.hooks[HOOK[unit]].name),
    main && `class ${DATA.classes[main.index]}`, follows(unit), noteOf(unit)].filter(Boolean).join(" · ").toLowerCase();
  // A number belongs to the word before it, and is whole: "class 1" is not class 11.
  return query.match(/[^\s\d]+\s+\d+|\S+/g).every(term =>
    new RegExp(term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&") + "(?!\\d)").test(text));
}

function keep(unit) {
  if (state.place >= 0 && HOOK[unit] !== state.place) return false;
  return (!state.alive || SUPPORT[unit] > 0) && matches(unit, state.query.trim().toLowerCase());
}

function fill(cell, entry, unit) {
  const text = entry.text ? entry.text(unit) : entry.value(unit) ?? "–";
  cell.append(entry.key === "code" ? make("a", {href: `#${unit}`}, text) : text);
}

function setUpPlaces() {
  const place = document.getElementById("place");
  place.append(make("option", {value: -1}, "all hook points"), ...DATA.hooks.map((h, i) => make("option", {value: i}, h.name)));
  place.hidden = DATA.hooks.length < 2;
  place.addEventListener("change", () => { state.place = Number(place.value); arrange(); });
}

function share(score, i) {
  return score[i] === null ? "–" : percent(score[i]);
}

// One row per code of a search: its scores on the other split, and what stands beside it.
function searchTable(search) {
  const rivals = ["neuron", "latent"].filter(k => search.rows.some(r => r[k]));
  const titles = {neuron: "best neuron", latent: "best SAE latent"};
  const head = ["code", "precision", "recall", "active at", "p", "shuffled", ...rivals.map(k => titles[k]), ...rivals.map(() => "its recall")];
  const order = rivals.length === 2 ? [0, 1, 2, 3, 4, 5, 6, 8, 7, 9] : head.map((_, i) => i);
  const hints = ["", "share of its places where this holds", "share of where this holds that it covers", `${search.unit}s`,
    `against ${search.permutations} shuffles, allowing for all codes`, "95th percentile of the best of all codes at this recall, shuffled; none where no code has the recall",
    ...rivals.map(() => "precision of the most precise one at the code’s recall, on the same series"), ...rivals.map(() => "on these series")];
  const rows = search.rows.map(row => {
    const cells = [codeLink(row.unit), share(row.test, 0), share(row.test, 1), String(row.test[2]), chance(row.p), row.null > 0 ? percent(row.null) : "none",
      ...rivals.map(k => row[k] ? make("span", {title: row[k].name}, share(row[k].test, 0)) : "–"),
      ...rivals.map(k => row[k] ? share(row[k].test, 1) : "–")];
    return make("tr", {}, order.map(i => make("td", {class: i ? "num" + (i === 1 ? " best" : "") : ""}, cells[i])));
  });
  return make("div", {class: "scroll"}, make("table", {class: "small"}, make("thead", {}, make("tr", {},
    order.map(i => make("th", {class: i ? "num" : "", title: hints[i]}, head[i])))), make("tbody", {}, rows)));
}

function searchNote(search) {
  return `Picked on the split shown on this page, reported on ${search.on}; a random code has ${percent(search.base)} precision there. `
    + "Neurons and latents get a threshold at the code’s recall.";
}

function setUpSearches() {
  const root = document.getElementById("searches");
  const refused = Object.entries(DATA.refused || {});
  if (!DATA.searches.length && !refused.length) return;
  const choose = make("select", {id: "searched", "aria-label": "What was searched for"},
    DATA.searches.map((s, i) => make("option", {value: i}, s.name)));
  const place = make("div", {});
  const show = () => {
    const search = DATA.searches[choose.value || 0];
    place.replaceChildren(make("p", {class: "note"}, searchNote(search)),
      search.rows.length ? searchTable(search) : make("p", {}, "No code has the recall and support that were asked for."));
  };
  choose.addEventListener("change", show);
  if (DATA.searches.length) {
    root.append(make("h3", {}, "Codes found for", choose), place);
    show();
  }
  for (const [name, why] of refused) root.append(make("p", {class: "note"}, `${name}: ${why}`));
}

function setUp() {
  const used = DATA.hooks.reduce((sum, h) => sum + h.used, 0);
  const parts = [`${DATA.dataset} ${DATA.split}`.trim(), `${DATA.total} series`, `${used} of ${UNITS} codes used at ${DATA.hooks.length} hook point${DATA.hooks.length > 1 ? "s" : ""}`,
    `${DATA.hooks[0].k} active at a time` + (DATA.hooks[0].groups > 1 ? " in each group" : "")];
  document.getElementById("about").textContent = parts.filter(Boolean).join(" · ");
  setUpNotes();
  setUpSearches();
  setUpPlaces();
  setUpTable();
  setUpKeys(document.getElementById("code"));
  addEventListener("hashchange", route);
  route();
}

function route() {
  const unit = show(document.getElementById("code"), openCode);
  document.title = unit === null ? DATA.title : `Code ${codeName(unit)} · ${DATA.title}`;
}
