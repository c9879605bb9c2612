// The page of one row, latent or code; sections that the data have nothing for are left out.
function section(title, note, ...content) {
  return make("section", {}, make("h3", {}, title), note ? make("p", {class: "note"}, note) : null, ...content);
}

// A small table; the first column holds words, the others numbers unless the heading is left empty.
function tableOf(head, rows, {hints = [], best = -1} = {}) {
  const kind = c => c && head[c] ? "num" + (c === best ? " best" : "") : "wide";
  return make("div", {class: "scroll"}, make("table", {class: "small"},
    make("thead", {}, make("tr", {}, head.map((text, c) => make("th", {class: kind(c), title: hints[c] || null, scope: "col"}, text)))),
    make("tbody", {}, rows.map(row => make("tr", {}, row.map((cell, c) => make("td", {class: kind(c)}, cell)))))));
}

function openOne(i) {
  const root = document.getElementById(NOUN);
  root.replaceChildren(headOf(i), noteSection(i));
  if (!(column("density")[i] > 0)) {
    root.append(make("p", {class: "note"}, `This ${NOUN} is never active on these series.`), CODES ? "" : nearSection(i));
    return;
  }
  const profile = activations(i);
  const pair = (...parts) => make("div", {class: "pair"}, parts);
  root.append(...[prototypeSection(i), windowsSection(i, profile), pair(classSection(i), effectSection(i)), foundSection(i),
    section("Activation over series and time", mapNote(), heatMap(i, profile)), pair(propertySection(i), nearSection(i))].filter(Boolean));
}

function headOf(i) {
  const at = state.order.indexOf(i), link = (to, label, id) => to === undefined ? null
    : make("a", {href: `#${to}`, id, class: "step"}, label);
  const facts = [T.head && `latent ${column("of_head")[i]} at head ${column("head")[i]}`, CODES && `one of ${hookOf(i).codes} at ${hookOf(i).name}`,
    `active at ${percent(column("density")[i])} of ${hookOf(i).positions.toLocaleString("en")} positions`,
    `in ${column("series")[i]} of ${DATA.total} series`, T.mean && `mean ${number(column("mean")[i])}, largest ${number(column("max")[i])}`];
  return make("div", {class: "head"},
    make("nav", {}, make("a", {href: "#", id: "back", class: "step"}, `All ${NOUN}s`),
      link(at > 0 ? state.order[at - 1] : undefined, "← previous", "previous"),
      link(at >= 0 ? state.order[at + 1] : undefined, "next →", "next")),
    make("h2", {}, titleOf(i)), make("p", {class: "facts"}, facts.filter(Boolean).join(" · ")));
}

function titleOf(i) {
  return `${NOUN[0].toUpperCase()}${NOUN.slice(1)} ${nameOf(i)}`;
}

function prototypeSection(i) {
  const p = DATA.prototypes;
  if (!p) return null;
  const grid = make("div", {class: "proto"}), used = array(p.windows)[i], support = array(T.support)[i];
  for (let c = 0; c < p.count; c++) {
    const at = i * p.count + c, from = at * p.width, channel = array(p.which)[at];
    const mean = array(p.mean).slice(from, from + p.width), spread = array(p.spread).slice(from, from + p.width);
    grid.append(make("figure", {}, make("figcaption", {}, DATA.rows > 1 ? "the channel that is read" : `channel ${channel}`),
      prototypeChart(mean, spread, p.overall[channel], p.before)));
  }
  const sampled = used < support ? ` (${used} of them, evenly drawn)` : "";
  const some = p.count < DATA.channels && DATA.rows === 1 ? ` The ${p.count} of ${DATA.channels} channels that stand out most.` : "";
  return section("Prototype", `Mean and standard deviation of its windows${sampled}, in the units of the series; `
    + `${p.before > 0 ? "shaded: the samples that the position was embedded from; " : ""}dashed: the channel’s mean over all series.${some}`, grid);
}

// The channels, or "mean", whose window a row follows.
function emphasisedChannels(i) {
  const name = follows(i) || "", found = /channel (\d+)$/.exec(name);
  if (DATA.rows > 1) return new Set();
  if (found) return new Set([Number(found[1])]);
  return new Set(name.endsWith("mean of channels") ? ["mean"] : []);
}

const SIMILARITY = {cosine: "cosine", euclidean: "minus the squared distance", inner_product: "inner product"};

function windowsSection(i, profile) {
  const found = windowsOf(i), grid = make("div", {class: "grid"});
  let low = Infinity, high = -Infinity;
  for (const v of found.flatMap(w => w.channels.flatMap(c => [...rawSeries(w.shown, c)]))) {
    if (!Number.isNaN(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  }
  if (!(high > low)) { low -= 1; high += 1; }
  const emphasised = emphasisedChannels(i);
  for (const w of found) {
    const where = `series ${w.series}` + (w.channel === null ? "" : `, channel ${w.channel}`)
      + `, samples ${w.span[0]}–${w.span[1] - 1}`;
    grid.append(make("figure", {}, make("figcaption", {}, make("b", {}, w.label === null ? "" : `class ${w.label} `),
      make("span", {}, where), make("i", {title: CODES ? "similarity to the code" : "activation"}, number(w.activation))),
      windowChart(w, [low, high], emphasised, profile)));
  }
  const sample = DATA.series.length < DATA.total ? ` Of a sample of ${DATA.series.length} series.` : "";
  const blue = emphasised.has("mean") ? "the mean of the channels" : `channel ${[...emphasised][0]}`;
  const order = CODES ? `The most similar first (${SIMILARITY[hookOf(i).kind]} to the code on the right). ` : "";
  return section("Strongest windows", order + `Shaded: the samples that the position was embedded from. Bars below: ${CODES ? "positions at which it is active"
    : "activation at every position"}.` + (emphasised.size ? ` Blue: ${blue}, whose window it follows (see below).` : "")
    + ` One window per series${DATA.rows > 1 ? " and channel" : ""}.` + sample, grid);
}

// A latent's share of each class' series, or a code's places by class.
function classSection(i) {
  const n = DATA.classes.length, c = DATA.classTable;
  if (!c) return null;
  const entries = DATA.classes.map((name, k) => {
    const at = i * n + k, of = DATA.counts[k];
    if (CODES) {
      const count = array(c.places)[at], series = array(c.series)[at], all = array(T.support)[i];
      return {name, value: count / all, text: `${count ? percent(count / all) : "0 %"}   ${series} of ${of}`,
        title: `${count} of its ${all} positions lie in series of class ${name}; active in ${series} of the ${of} series`};
    }
    const value = array(c.share)[at], area = array(c.auc)[at];
    return {name, value, text: `${percent(value)}   AUC ${Number.isNaN(area) ? "–" : area.toFixed(2)}`,
      title: `active in ${percent(value)} of the ${of} series of class ${name}`};
  });
  entries.full = 1;
  const note = CODES ? "Share of its positions in each class’ series, and the series of that class in which it is active anywhere."
    : `Share of each class’ series in which it is active. Best class ${word("class", i)}: q = ${chance(column("q_class")[i])}; `
      + `with shuffled labels the best AUC is ${number(array(c.chance)[i])} off 0.5 on average.`;
  return section("Classes", note, bars(entries, false));
}

function points(value) {
  const text = value.toFixed(2);
  return Number(text) === 0 ? "0.00" : (value > 0 ? "+" : "") + text.replace("-", "−");
}

function effectSection(i) {
  const e = DATA.effects;
  if (!e) return null;
  const n = e.names.length, change = array(e.change), used = array(e.series)[i];
  const probability = e.probability ? array(e.probability) : null;
  if (!used) return section("Effect on the output", "Not active in the series that effects were measured on.");
  const entries = e.names.map((name, o) => {
    const value = change[i * n + o];
    const more = probability ? `   (${points(100 * probability[i * n + o])})` : "";
    return {name, value, text: number(value, true) + more, title: `${name}: ${number(value, true)}`};
  });
  const unit = e.task === "class" ? "logits (in brackets: of the probability, in percentage points)" : "the forecast, in its units";
  return section("Effect of removing it", `Mean change of ${unit} over the ${used} series where it is strongest. `
    + "Measured: everything after it is computed anew.", bars(entries, true));
}

function mapNote() {
  const rows = DATA.series.length * DATA.rows;
  const what = DATA.rows > 1 ? "series and channels" : "series";
  return (rows > MOST_MAP_ROWS ? `${MOST_MAP_ROWS} of ${rows} ${what}` : `All ${rows} ${what}`)
    + (DATA.series.length < DATA.total ? ` (a sample of ${DATA.total})` : "")
    + (DATA.labels ? ", by class, the strongest of a class first." : ", the strongest first.");
}

function propertySection(i) {
  const p = DATA.properties;
  if (!p) return null;
  const [which, r, q, heldout] = [p.which, p.r, p.q, p.heldout].map(array), rows = [];
  for (let at = i * p.count; at < (i + 1) * p.count; at++) {
    if (!Number.isNaN(r[at])) rows.push([p.names[which[at]], number(r[at], true), chance(q[at]), number(heldout[at], true)]);
  }
  return section("What it follows", `Pearson correlation ${CODES ? "of being active " : ""}with windows of up to ${DATA.windowLength} samples; q controls `
    + `false discoveries over all ${NOUN}s; the last column is from series that did not pick it.`,
    rows.length ? tableOf(["property of the window", "r", "q", "r held out"], rows)
      : make("p", {}, "Active in too few of the series that pick properties."));
}

// Rows of the most similar directions; of codes those that are active at the same places.
function nearSection(i) {
  const n = DATA.similar, which = array(n.which), cosine = array(n.cosine), overlap = n.overlap && array(n.overlap), rows = [];
  for (let at = i * n.count; at < (i + 1) * n.count; at++) {
    if (overlap && !(overlap[at] > 0)) continue;
    const other = which[at], one = word("class", other);
    rows.push([linkTo(other), ...(overlap ? [percent(overlap[at])] : []), number(cosine[at], true), percent(column("density")[other]),
      one === null ? "–" : `class ${one}`, noteOf(other)]);
  }
  const head = ["", ...(overlap ? ["overlap"] : []), "cosine", "active at", "", ""];
  if (overlap) return section("Codes like it", "Overlap: of the positions of either, the share of both (Jaccard). Cosine: of entries of one table.",
    rows.length ? tableOf(head, rows) : make("p", {}, "No other code is active where it is."));
  return section("Nearest latents", "By the angle between directions.", tableOf(head, rows));
}

function route() {
  const i = show(document.getElementById(NOUN), openOne);
  document.title = i === null ? DATA.title : `${titleOf(i)} · ${DATA.title}`;
}

function setUp() {
  document.getElementById("about").textContent = DATA.about;
  if (DATA.beside && DATA.beside.rows.length) document.getElementById("summary").append(make("details", {},
    make("summary", {}, "Beside a random dictionary and the neurons"), tableOf(DATA.beside.head, DATA.beside.rows)));
  setUpNotes();
  setUpSearches();
  setUpPlaces();
  setUpTable();
  setUpKeys(document.getElementById(NOUN));
  addEventListener("hashchange", route);
  route();
}

setUp();
