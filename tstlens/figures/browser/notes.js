// Notes on rows: from the file, over them what was written here, kept by the browser.
const STORE = `tstlens ${NOUN} notes: ` + [DATA.model, DATA.dataset, ...DATA.hooks.map(h => `${h.name}/${h.units}`)].join(" ");
const FORMAT = {format: "tstlens code notes", format_version: 1};

const notes = new Map(Object.entries(DATA.notes));
const written = new Map();
let storageWorks = true;

function keyOf(unit) {
  const [group, head, code] = CODES ? CODES.names[unit] : [0, null, unit];
  return `${hookOf(unit).name}|${group}|${head === null ? "" : head}|${code}`;
}

function noteOf(unit) {
  return notes.get(keyOf(unit)) || "";
}

// What the browser keeps, or with a text what it is to keep; nothing where it keeps nothing.
function stored(text) {
  try {
    return text === undefined ? localStorage.getItem(STORE) : localStorage.setItem(STORE, text);
  } catch (error) {
    storageWorks = false;
    return null;
  }
}

function setNote(key, text) {
  if (text.trim()) notes.set(key, text);
  else notes.delete(key);
  written.set(key, text);
}

function store() {
  stored(JSON.stringify(Object.fromEntries(written)));
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    return undefined;
  }
}

function notesAsText() {
  const sorted = [...notes.keys()].sort();
  return JSON.stringify({...FORMAT, notes: Object.fromEntries(sorted.map(k => [k, notes.get(k)]))}, null, 2) + "\n";
}

function saySomething(text) {
  const place = document.getElementById("notes-said");
  place.textContent = text;
  place.hidden = !text;
}

function exportNotes() {
  const name = `${NOUN}-notes.json`, href = URL.createObjectURL(new Blob([notesAsText()], {type: "application/json"}));
  make("a", {href, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
  saySomething(`${notes.size} note${notes.size === 1 ? "" : "s"} exported to ${name}.`);
}

// Where a row has another note already, both are kept, as CodeNotes.merge does.
function importNotes(text) {
  const record = parsed(text), fault = record === undefined ? "This file is no JSON"
    : record?.format !== FORMAT.format || !record.notes || typeof record.notes !== "object" ? `This file does not hold notes on ${NOUN}s`
      : !(record.format_version <= FORMAT.format_version) ? "These notes were written by a newer tstlens" : null;
  if (fault) return saySomething(`${fault}: nothing was imported.`);
  const known = new Set(Array.from({length: ROWS}, (_, i) => keyOf(i)));
  let count = 0, strange = 0;
  for (const [key, theirs] of Object.entries(record.notes)) {
    if (typeof theirs !== "string") continue;
    const mine = notes.get(key);
    setNote(key, !mine || theirs.includes(mine) ? theirs : mine.includes(theirs) ? mine : mine + "\n" + theirs);
    known.has(key) ? count++ : strange++;
  }
  store();
  saySomething(`${count} note${count === 1 ? "" : "s"} imported.`
    + (strange ? ` ${strange} more belong to ${NOUN}s that are not on this page; they are kept and exported.` : ""));
  arrange();
}

function setUpNotes() {
  for (const [key, text] of Object.entries(parsed(stored()) || {})) if (typeof text === "string") setNote(key, text);
  document.getElementById("export").addEventListener("click", exportNotes);
  const file = document.getElementById("file");
  document.getElementById("import").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    if (file.files.length) importNotes(await file.files[0].text());
    file.value = "";
  });
}

function noteSection(unit) {
  const key = keyOf(unit);
  const area = make("textarea", {id: "note", "aria-label": `Note on this ${NOUN}`, placeholder: `What does this ${NOUN} stand for?`});
  area.value = noteOf(unit);
  const said = make("p", {class: "note"});
  const status = saved => {
    said.textContent = !storageWorks ? "This browser keeps nothing for local files: export the notes before you close the page."
      : saved ? "Kept in this browser; export to share." : "";
  };
  area.addEventListener("input", () => { setNote(key, area.value); store(); status(true); });
  status(false);
  return make("section", {class: "noted"}, make("h3", {}, "Note"), area, said);
}
