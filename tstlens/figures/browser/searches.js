// What was searched for, on the start page; and the searches that found one code, on its own page.
const RIVALS = [["neuron", "best neuron"], ["latent", "best SAE latent"]];

function share(score, i) {
  return score[i] === null ? "–" : percent(score[i]);
}

// One row per code of a search: its scores on the other split, and what stands beside it.
function searchTable(search) {
  const rivals = RIVALS.filter(([kind]) => search.rows.some(row => row[kind]));
  const head = ["code", "precision", "recall", "active at", "p", "shuffled", ...rivals.flatMap(([, title]) => [title, "its recall"])];
  const hints = ["", "share of its places where this holds", "share of where this holds that it covers", `${search.unit}s`,
    `against ${search.permutations} shuffles, allowing for all codes`, "95th percentile of the best of all codes at this recall, shuffled; none where no code has the recall",
    ...rivals.flatMap(() => ["precision of the most precise one at the code’s recall, on the same series", "on these series"])];
  const rows = search.rows.map(row => [linkTo(row.unit), share(row.test, 0), share(row.test, 1), String(row.test[2]), chance(row.p),
    row.null > 0 ? percent(row.null) : "none", ...rivals.flatMap(([kind]) => row[kind]
      ? [make("span", {title: row[kind].name}, share(row[kind].test, 0)), share(row[kind].test, 1)] : ["–", "–"])]);
  return tableOf(head, rows, {hints, best: 1});
}

function searchNote(search) {
  return `Picked on the split shown on this page, reported on ${search.on}; a random code has ${percent(search.base)} precision there. `
    + "Neurons and latents get a threshold at the code’s recall.";
}

function setUpSearches() {
  const root = document.getElementById("searches"), searches = DATA.searches || [];
  const choose = make("select", {id: "searched", "aria-label": "What was searched for"},
    searches.map((search, i) => make("option", {value: i}, search.name)));
  const place = make("div", {});
  const show = () => {
    const search = searches[choose.value || 0];
    place.replaceChildren(make("p", {class: "note"}, searchNote(search)),
      search.rows.length ? searchTable(search) : make("p", {}, "No code has the recall and support that were asked for."));
  };
  choose.addEventListener("change", show);
  if (searches.length) {
    root.append(make("h3", {}, "Codes found for", choose), place);
    show();
  }
  for (const [name, why] of Object.entries(DATA.refused || {})) root.append(make("p", {class: "note"}, `${name}: ${why}`));
  if (root.children.length) root.append(make("h3", {}, "All codes"));
}

function foundSection(unit) {
  if (!DATA.searches || !DATA.searches.length) return null;
  const found = DATA.searches.flatMap(search => search.rows.filter(row => row.unit === unit).map(row => ({search, row})));
  if (!found.length) return section("Found by", "None of the searches on the start page found this code.");
  const rivals = RIVALS.filter(([kind]) => found.some(({row}) => row[kind]));
  const rows = found.map(({search, row}) => [search.name, String(search.rows.indexOf(row) + 1), share(row.test, 0), share(row.test, 1),
    percent(search.base), chance(row.p), ...rivals.map(([kind]) => row[kind] ? `${share(row[kind].test, 0)} at ${share(row[kind].test, 1)}` : "–")]);
  const part = section("Found by", searchNote(found[0].search) + " Rivals: precision at recall.",
    tableOf(["search", "rank", "precision", "recall", "base rate", "p", ...rivals.map(([, title]) => title)], rows, {best: 2}));
  part.classList.add("found");
  return part;
}
