// The page of one code.
function section(title, note, ...content) {
  return make("section", {}, make("h3", {}, title), note ? make("p", {class: "note"}, note) : null, ...content);
}

function openCode(unit) {
  const root = document.getElementById("code");
  root.replaceChildren(codeHead(unit), noteSection(unit));
  if (!SUPPORT[unit]) {
    root.append(make("p", {class: "note"}, "This code is never active on these series."));
    return;
  }
  const profile = activations(unit);
  root.append(prototypeSection(unit), windowsSection(unit, profile));
  const pair = make("div", {class: "pair"});
  for (const part of [classSection(unit), similarSection(unit)]) if (part) pair.append(part);
  root.append(pair, ...[foundSection(unit)].filter(Boolean));
  const rows = DATA.series.length * DATA.rows, what = DATA.rows > 1 ? "series and channels" : "series";
  const note = (rows > MOST_MAP_ROWS ? `${MOST_MAP_ROWS} of ${rows} ${what}` : `All ${rows} ${what}`)
    + (DATA.series.length < DATA.total ? ` (a sample of ${DATA.total})` : "") + (DATA.labels ? ", by class." : ".");
  root.append(section("Where it is active", note, heatMap(unit, profile)));
  const properties = propertySection(unit);
  if (properties) root.append(properties);
}

function codeHead(unit) {
  const at = state.order.indexOf(unit), hook = DATA.hooks[HOOK[unit]];
  const link = (to, label, id) => to === undefined ? null : make("a", {href: `#${to}`, id, class: "step"}, label);
  const facts = [`one of ${hook.codes} at ${hook.name}`, `active at ${SUPPORT[unit].toLocaleString("en")} positions (${percent(DENSITY[unit])})`,
    `in ${IN_SERIES[unit]} of ${DATA.total} series`];
  return make("div", {class: "head"},
    make("nav", {}, make("a", {href: "#", id: "back", class: "step"}, "All codes"),
      link(at > 0 ? state.order[at - 1] : undefined, "← previous", "previous"),
      link(at >= 0 ? state.order[at + 1] : undefined, "next →", "next")),
    make("h2", {}, `Code ${codeName(unit)}`), make("p", {class: "facts"}, facts.join(" · ")));
}

function prototypeSection(unit) {
  const p = DATA.prototypes, which = array(p.which), grid = make("div", {class: "proto"});
  const used = array(p.windows)[unit];
  for (let i = 0; i < p.count; i++) {
    const at = unit * p.count + i, from = at * p.width;
    const mean = array(p.mean).slice(from, from + p.width), spread = array(p.spread).slice(from, from + p.width);
    const channel = which[at];
    grid.append(make("figure", {}, make("figcaption", {}, DATA.rows > 1 ? "the channel that is read" : `channel ${channel}`),
      prototypeChart(mean, spread, p.overall[channel], p.before)));
  }
  const sampled = used < SUPPORT[unit] ? ` (${used} of them, evenly drawn)` : "";
  const some = p.count < DATA.channels && DATA.rows === 1 ? ` The ${p.count} of ${DATA.channels} channels that stand out most.` : "";
  return section("Prototype", `Mean and standard deviation of its windows${sampled}, in the units of the series; `
    + `${p.before > 0 ? "shaded: the samples that the position was embedded from; " : ""}dashed: the channel’s mean over all series.${some}`, grid);
}

// Two digits, for ticks.
function brief(value) {
  return String(Number(value.toPrecision(2))).replace("-", "−");
}

function prototypeChart(mean, spread, overall, before) {
  const width = 200, height = 112, left = 40, right = 4, top = 6, bottom = height - 16;
  let low = overall, high = overall;
  mean.forEach((v, t) => { if (!Number.isNaN(v)) { low = Math.min(low, v - spread[t]); high = Math.max(high, v + spread[t]); } });
  if (!(high > low)) { low -= 1; high += 1; }
  const x = t => left + (mean.length > 1 ? t / (mean.length - 1) : 0.5) * (width - left - right);
  const y = v => top + (high - v) / (high - low) * (bottom - top);
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "prototype of one channel"});
  const last = mean.length - 1 - before, edge = t => Math.min(Math.max(x(t), left), width - right);
  if (before > 0) {
    svg.append(make("rect", {class: "window", x: edge(before - 0.5), y: top, width: Math.max(edge(last + 0.5) - edge(before - 0.5), 1), height: bottom - top}));
  }
  const upper = Array.from(mean, (v, t) => v + spread[t]), lower = Array.from(mean, (v, t) => v - spread[t]);
  const there = [...mean.keys()].filter(t => !Number.isNaN(mean[t]));
  if (there.length) {
    const points = [...there.map(t => `${x(t).toFixed(1)} ${y(upper[t]).toFixed(1)}`), ...there.reverse().map(t => `${x(t).toFixed(1)} ${y(lower[t]).toFixed(1)}`)];
    svg.append(make("path", {class: "band", d: `M${points.join("L")}Z`}));
  }
  svg.append(make("line", {class: "middle", x1: left, x2: width - right, y1: y(overall), y2: y(overall)}));
  svg.append(make("path", {class: "line strong", d: linePath(mean, x, y)}));
  svg.append(make("text", {x: left - 4, y: y(high) + 8, class: "tick end"}, brief(high)), make("text", {x: left - 4, y: y(low), class: "tick end"}, brief(low)));
  svg.append(make("text", {x: x(before), y: height - 3, class: "tick"}, "0"), make("text", {x: width - right, y: height - 3, class: "tick end"}, `+${mean.length - 1 - before}`));
  return svg;
}

function emphasisedChannels(unit) {
  const name = follows(unit) || "", found = /channel (\d+)$/.exec(name);
  if (DATA.rows > 1 || !name) return new Set();
  return new Set(found ? [Number(found[1])] : name.endsWith("mean of channels") ? ["mean"] : []);
}

function windowsSection(unit, profile) {
  const found = windowsOf(unit), grid = make("div", {class: "grid"});
  let low = Infinity, high = -Infinity;
  for (const w of found) {
    for (const c of w.channel === null ? Array(DATA.channels).keys() : [w.channel]) {
      for (const v of rawSeries(w.shown, c)) if (!Number.isNaN(v)) { low = Math.min(low, v); high = Math.max(high, v); }
    }
  }
  if (!(high > low)) { low -= 1; high += 1; }
  const emphasised = emphasisedChannels(unit);
  for (const w of found) {
    const where = `series ${w.series}` + (w.channel === null ? "" : `, channel ${w.channel}`) + `, samples ${w.span[0]}–${w.span[1] - 1}`;
    grid.append(make("figure", {}, make("figcaption", {}, make("b", {}, w.label === null ? "" : `class ${w.label} `),
      make("span", {}, where), make("i", {title: "similarity to the code"}, number(w.activation))), windowChart(w, [low, high], emphasised, profile)));
  }
  const sample = DATA.series.length < DATA.total ? ` Of a sample of ${DATA.series.length} series.` : "";
  const blue = emphasised.has("mean") ? "the mean of the channels" : `channel ${[...emphasised][0]}`;
  const similarity = {cosine: "cosine", euclidean: "minus the squared distance", inner_product: "inner product"}[DATA.hooks[HOOK[unit]].kind];
  return section("Windows", `The most similar first (${similarity} to the code on the right), one per series${DATA.rows > 1 ? " and channel" : ""}. Shaded: the samples `
    + "that the position was embedded from. Bars below: positions at which it is active." + (emphasised.size ? ` Blue: ${blue}, whose window it follows.` : "") + sample, grid);
}

function classSection(unit) {
  if (!T.places) return null;
  const places = array(T.places), inSeries = array(T.classSeries);
  const entries = DATA.classes.map((name, c) => {
    const count = places[unit * N_CLASSES + c], series = inSeries[unit * N_CLASSES + c];
    return {name, value: count / SUPPORT[unit], text: `${count ? percent(count / SUPPORT[unit]) : "0 %"}   ${series} of ${DATA.counts[c]}`,
      title: `${count} of its ${SUPPORT[unit]} positions lie in series of class ${name}; active in ${series} of the ${DATA.counts[c]} series`};
  });
  entries.full = 1;
  return section("Classes", "Share of its positions in each class’ series, and the series of that class in which it is active anywhere.", bars(entries, false));
}

function foundSection(unit) {
  const rows = [];
  for (const search of DATA.searches) {
    const row = search.rows.find(r => r.unit === unit);
    if (row) rows.push({search, row});
  }
  if (!rows.length) return DATA.searches.length ? section("Found by", "None of the searches on the start page found this code.") : null;
  const head = ["search", "rank", "precision", "recall", "base rate", "p", "best neuron", "best SAE latent"];
  const kept = head.map((_, i) => i).filter(i => i < 6 || rows.some(r => r.row[i === 6 ? "neuron" : "latent"]));
  const body = rows.map(({search, row}) => {
    const cells = [search.name, String(search.rows.indexOf(row) + 1), share(row.test, 0), share(row.test, 1), percent(search.base), chance(row.p),
      row.neuron ? `${share(row.neuron.test, 0)} at ${share(row.neuron.test, 1)}` : "–", row.latent ? `${share(row.latent.test, 0)} at ${share(row.latent.test, 1)}` : "–"];
    return make("tr", {}, kept.map(i => make("td", {class: i ? "num" + (i === 2 ? " best" : "") : ""}, cells[i])));
  });
  const part = section("Found by", searchNote(rows[0].search) + " Rivals: precision at recall.", make("div", {class: "scroll"}, make("table", {class: "small"},
    make("thead", {}, make("tr", {}, kept.map(i => make("th", {class: i ? "num" : ""}, head[i])))), make("tbody", {}, body))));
  part.classList.add("found");
  return part;
}

function similarSection(unit) {
  const s = DATA.similar, which = array(s.which), overlap = array(s.overlap), cosine = array(s.cosine), rows = [];
  for (let i = unit * s.count; i < (unit + 1) * s.count; i++) {
    if (!(overlap[i] > 0)) continue;
    rows.push(make("tr", {}, make("td", {}, codeLink(which[i])), make("td", {class: "num"}, percent(overlap[i])),
      make("td", {class: "num"}, number(cosine[i], true)), make("td", {class: "said"}, noteOf(which[i]))));
  }
  const head = ["", "overlap", "cosine", ""].map((t, i) => make("th", {class: i === 1 || i === 2 ? "num" : ""}, t));
  return section("Codes like it", "Overlap: of the positions of either, the share of both (Jaccard). Cosine: of entries of one table.",
    rows.length ? make("div", {class: "scroll"}, make("table", {class: "small"}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows)))
      : make("p", {}, "No other code is active where it is."));
}

function propertySection(unit) {
  const p = DATA.properties;
  if (!p) return null;
  const which = array(p.which), r = array(p.r), q = array(p.q), heldout = array(p.heldout), rows = [];
  for (let i = unit * p.count; i < (unit + 1) * p.count; i++) {
    if (Number.isNaN(r[i])) continue;
    rows.push(make("tr", {}, make("td", {class: "wide"}, p.names[which[i]]), make("td", {class: "num"}, number(r[i], true)),
      make("td", {class: "num"}, chance(q[i])), make("td", {class: "num"}, number(heldout[i], true))));
  }
  const head = ["property of the window", "r", "q", "r held out"].map((t, i) => make("th", {class: i ? "num" : "wide"}, t));
  return section("What it follows", `Pearson correlation of being active with windows of up to ${DATA.windowLength} samples; q controls `
    + "false discoveries over all codes; the last column is from series that did not pick it.",
    rows.length ? make("table", {class: "small"}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows))
      : make("p", {}, "Active in too few of the series that pick properties."));
}

setUp();
