// What a row of the page is called, and the table of all rows: columns, and what the filter matches.
// Rows are the latents of one dictionary, or the codes of all codebooks (DATA.codes).
const NOUN = DATA.noun, ROWS = DATA.rowCount, CODES = DATA.codes, T = DATA.table;

function shortHook(name) {
  return name.replace("blocks.", "L").replace("hook_", "");
}

// The hook point of a row, with what is known of its codebook.
function hookOf(i) {
  return DATA.hooks[CODES ? array(CODES.hook)[i] : 0];
}

// A row's number: a code counts within its table.
function numberOf(i) {
  return CODES ? CODES.names[i][2] : i;
}

function nameOf(i) {
  if (!CODES) return String(i);
  const [group, head, code] = CODES.names[i];
  return `${code}` + (head !== null ? ` of head ${head}` : hookOf(i).groups > 1 ? ` of group ${group}` : "");
}

function linkTo(i) {
  return make("a", {href: `#${i}`}, CODES ? `${nameOf(i)} at ${shortHook(hookOf(i).name)}` : `${NOUN} ${i}`);
}

// The property of the window that a row follows, where other series confirm it.
function follows(i) {
  return T.property && column("confirmed")[i] ? word("property", i) : null;
}

const COLUMNS = [
  {key: NOUN, value: i => i, text: nameOf, first: true},
  {key: "head", hint: "the dictionary reads every head by itself", text: i => String(column("head")[i])},
  CODES && {key: "place", label: "at", hint: "hook point", value: i => array(CODES.hook)[i], text: i => shortHook(hookOf(i).name), plain: true},
  {key: "density", label: "active at", hint: "share of observed positions", text: i => percent(column("density")[i])},
  {key: "series", hint: "series in which it is active", text: i => String(column("series")[i])},
  {key: "max", hint: "largest activation"},
  {key: "class", hint: T.share ? "class that most of its places are in" : "class whose AUC is furthest from chance", words: true},
  {key: "share", hint: "share of its places in series of this class", text: i => percent(column("share")[i])},
  {key: "auc", label: "AUC", hint: "largest activation in a series, this class against the rest",
    text: i => Number.isNaN(column("auc")[i]) ? "–" : column("auc")[i].toFixed(3)},
  {key: "q_class", label: "q", hint: "false-discovery rate against shuffled labels", text: i => chance(column("q_class")[i]), rises: true},
  {key: "property", label: "follows", hint: "property of the window" + (T.r_heldout ? "" : ", confirmed on held-out series"), words: true, wide: true},
  {key: "r_heldout", label: "r held out", hint: "Pearson r on held-out series; ✓ where confirmed",
    text: i => number(column("r_heldout")[i], true) + (column("confirmed")[i] ? " ✓" : "")},
  {key: "moves", hint: "output that its removal changes most", words: true},
  {key: "effect", label: "by", hint: "change of this output", text: i => number(column("effect")[i], true)},
  {key: "effect_size", label: "effect", hint: "root mean square change over all outputs"},
  {key: "note", hint: "yours", value: i => noteOf(i) || null, text: noteOf, said: true},
].filter(entry => entry && (entry.value || T[entry.key]));

state.sort = T.effect_size ? "effect_size" : "density";
state.place = -1;

const TABLE = {
  rows: ROWS, noun: NOUN + "s",
  kind: entry => entry.first ? "first" : entry.said ? "said" : entry.wide ? "wide" : entry.words ? "word" : entry.plain ? "" : "num",
  key: entry => entry.words ? i => word(entry.key, i) : entry.value || (i => column(entry.key)[i]),
  falls: entry => TABLE.kind(entry) === "num" && !entry.rises,
};

function matches(i, query) {
  if (!query) return true;
  if (/^#?\d+$/.test(query)) {
    const wanted = query.replace("#", "");
    return String(numberOf(i)) === wanted || DATA.classes.includes(wanted) && word("class", i) === wanted;
  }
  const one = word("class", i), hook = CODES && hookOf(i).name;
  const text = [`${NOUN} ${nameOf(i)}`, T.head && `head ${column("head")[i]}`, hook, hook && shortHook(hook),
    one !== null && `class ${one}`, word("property", i), word("moves", i), noteOf(i)].filter(Boolean).join(" · ").toLowerCase();
  // A number belongs to the word before it, and is whole: "channel 1" is not channel 11.
  return query.match(/[^\s\d]+\s+\d+|\S+/g).every(term =>
    new RegExp(term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&") + "(?!\\d)").test(text));
}

function keep(i) {
  if (state.place >= 0 && array(CODES.hook)[i] !== state.place) return false;
  const query = state.query.trim().toLowerCase();
  return (!state.alive || column("density")[i] > 0 || query === String(i)) && matches(i, query);
}

function fill(cell, entry, i) {
  const text = entry.words ? word(entry.key, i) : entry.text ? entry.text(i) : number(column(entry.key)[i]);
  cell.append(entry.first ? make("a", {href: `#${i}`}, text) : text || "–");
}

function setUpPlaces() {
  const place = document.getElementById("place");
  place.append(make("option", {value: -1}, "all hook points"), ...DATA.hooks.map((h, i) => make("option", {value: i}, h.name)));
  place.hidden = DATA.hooks.length < 2;
  place.addEventListener("change", () => { state.place = Number(place.value); arrange(); });
}
