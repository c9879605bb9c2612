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

function store() {
  try {
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(written)));
  } catch (error) {
    storageWorks = false;
  }
}

function recall() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(STORE) || "{}") || {};
  } catch (error) {
    storageWorks = false;
  }
  for (const [key, text] of Object.entries(kept)) {
    if (typeof text === "string") setNote(key, text, false);
  }
}

function setNote(key, text, keep) {
  if (text.trim()) notes.set(key, text);
  else notes.delete(key);
  written.set(key, text);
  if (keep) store();
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
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([notesAsText()], {type: "application/json"}));
  link.download = `${NOUN}-notes.json`;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  saySomething(`${notes.size} note${notes.size === 1 ? "" : "s"} exported to ${NOUN}-notes.json.`);
}

// Where a code has another note already, both are kept, as CodeNotes.merge does.
function importNotes(text) {
  let record;
  try {
    record = JSON.parse(text);
  } catch (error) {
    return saySomething("This file is no JSON: nothing was imported.");
  }
  if (!record || record.format !== FORMAT.format || typeof record.notes !== "object" || record.notes === null) {
    return saySomething(`This file does not hold notes on ${NOUN}s: nothing was imported.`);
  }
  if (!(record.format_version <= FORMAT.format_version)) {
    return saySomething("These notes were written by a newer tstlens: nothing was imported.");
  }
  const known = new Set(Array.from({length: ROWS}, (_, i) => keyOf(i)));
  let count = 0, strange = 0;
  for (const [key, theirs] of Object.entries(record.notes)) {
    if (typeof theirs !== "string") continue;
    const mine = notes.get(key);
    let both = theirs;
    if (mine && !theirs.includes(mine)) both = mine.includes(theirs) ? mine : mine + "\n" + theirs;
    setNote(key, both, false);
    known.has(key) ? count++ : strange++;
  }
  store();
  saySomething(`${count} note${count === 1 ? "" : "s"} imported.`
    + (strange ? ` ${strange} more belong to ${NOUN}s that are not on this page; they are kept and exported.` : ""));
  arrange();
}

function setUpNotes() {
  recall();
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
  area.addEventListener("input", () => { setNote(key, area.value, true); status(true); });
  status(false);
  return make("section", {class: "noted"}, make("h3", {}, "Note"), area, said);
}
