// The page of one latent.
function section(title, note, ...content) {
  return make("section", {}, make("h3", {}, title), note ? make("p", {class: "note"}, note) : null, ...content);
}

function openLatent(latent) {
  const root = document.getElementById("latent"), density = column("density")[latent];
  root.replaceChildren(latentHead(latent));
  if (!(density > 0)) {
    root.append(make("p", {class: "note"}, "This latent is never active on these series."),
      neighboursSection(latent));
    return;
  }
  const profile = activations(latent);
  root.append(windowsSection(latent, profile));
  const pair = make("div", {class: "pair"});
  for (const part of [classSection(latent), effectSection(latent)]) if (part) pair.append(part);
  root.append(pair);
  root.append(section("Activation over series and time", mapNote(), heatMap(latent, profile)));
  const last = make("div", {class: "pair"});
  for (const part of [propertySection(latent), neighboursSection(latent)]) if (part) last.append(part);
  root.append(last);
}

function latentHead(latent) {
  const at = state.order.indexOf(latent), link = (to, label, id) => to === undefined ? null
    : make("a", {href: `#${to}`, id, class: "step"}, label);
  const facts = [`active at ${percent(column("density")[latent])} of ${DATA.positions.toLocaleString("en")} positions`,
    `in ${column("series")[latent]} of ${DATA.total} series`,
    `mean ${number(column("mean")[latent])}, largest ${number(column("max")[latent])}`];
  if (DATA.table.head) facts.unshift(`latent ${column("of_head")[latent]} at head ${column("head")[latent]}`);
  return make("div", {class: "head"},
    make("nav", {}, make("a", {href: "#", id: "back", class: "step"}, "All latents"),
      link(at > 0 ? state.order[at - 1] : undefined, "← previous", "previous"),
      link(at >= 0 ? state.order[at + 1] : undefined, "next →", "next")),
    make("h2", {}, `Latent ${latent}`), make("p", {class: "facts"}, facts.join(" · ")));
}

function emphasisedChannels(latent) {
  const name = word("property", latent) || "", found = /channel (\d+)$/.exec(name);
  if (DATA.rows > 1 || !(column("confirmed") || [])[latent]) return new Set();
  if (found) return new Set([Number(found[1])]);
  return new Set(name.endsWith("mean of channels") ? ["mean"] : []);
}

function windowsSection(latent, profile) {
  const found = windowsOf(latent), grid = make("div", {class: "grid"});
  let low = Infinity, high = -Infinity;
  for (const w of found) {
    for (const c of w.channel === null ? Array(DATA.channels).keys() : [w.channel]) {
      for (const v of rawSeries(w.shown, c)) if (!Number.isNaN(v)) { low = Math.min(low, v); high = Math.max(high, v); }
    }
  }
  if (!(high > low)) { low -= 1; high += 1; }
  const emphasised = emphasisedChannels(latent);
  for (const w of found) {
    const where = `series ${w.series}` + (w.channel === null ? "" : `, channel ${w.channel}`)
      + `, samples ${w.span[0]}–${w.span[1] - 1}`;
    grid.append(make("figure", {}, make("figcaption", {}, make("b", {}, w.label === null ? "" : `class ${w.label} `),
      make("span", {}, where), make("i", {}, number(w.activation))),
      windowChart(w, [low, high], emphasised, profile)));
  }
  const sample = DATA.series.length < DATA.total ? ` Of a sample of ${DATA.series.length} series.` : "";
  const blue = emphasised.has("mean") ? "the mean of the channels" : `channel ${[...emphasised][0]}`;
  const colour = emphasised.size ? ` Blue: ${blue}, whose window it follows (see below).` : "";
  return section("Strongest windows", "Shaded: the samples that the position was embedded from. Bars below: "
    + "activation at every position." + colour + " One window per series" + (DATA.rows > 1 ? " and channel." : ".") + sample, grid);
}

function classSection(latent) {
  if (!DATA.classTable) return null;
  const n = DATA.classes.length, auc = array(DATA.classTable.auc), share = array(DATA.classTable.share);
  const entries = DATA.classes.map((name, c) => {
    const value = share[latent * n + c], area = auc[latent * n + c];
    return {name, value, text: `${percent(value)}   AUC ${Number.isNaN(area) ? "–" : area.toFixed(2)}`,
      title: `active in ${percent(value)} of the ${DATA.counts[c]} series of class ${name}`};
  });
  entries.full = 1;
  const off = array(DATA.classTable.chance)[latent];
  return section("Classes", `Share of each class’ series in which it is active. Best class ${word("class", latent)}: `
    + `q = ${chance(column("q_class")[latent])}; with shuffled labels the best AUC is ${number(off)} off 0.5 on average.`, bars(entries, false));
}

function points(value) {
  const text = value.toFixed(2);
  return Number(text) === 0 ? "0.00" : (value > 0 ? "+" : "") + text.replace("-", "−");
}

function effectSection(latent) {
  const e = DATA.effects;
  if (!e) return null;
  const n = e.names.length, change = array(e.change), used = array(e.series)[latent];
  const probability = e.probability ? array(e.probability) : null;
  if (!used) return section("Effect on the output", "Not active in the series that effects were measured on.");
  const entries = e.names.map((name, o) => {
    const value = change[latent * n + o];
    const more = probability ? `   (${points(100 * probability[latent * n + o])})` : "";
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

function propertySection(latent) {
  const p = DATA.properties;
  if (!p) return null;
  const which = array(p.which), r = array(p.r), q = array(p.q), heldout = array(p.heldout), rows = [];
  for (let i = latent * p.count; i < (latent + 1) * p.count; i++) {
    if (Number.isNaN(r[i])) continue;
    rows.push(make("tr", {}, make("td", {class: "wide"}, p.names[which[i]]), make("td", {class: "num"}, number(r[i], true)),
      make("td", {class: "num"}, chance(q[i])), make("td", {class: "num"}, number(heldout[i], true))));
  }
  const head = ["property of the window", "r", "q", "r held out"].map((t, i) => make("th", {class: i ? "num" : "wide"}, t));
  return section("What it follows", `Pearson correlation with windows of up to ${DATA.windowLength} samples; q controls `
    + "false discoveries over all latents; the last column is from series that did not pick it.",
    rows.length ? make("table", {class: "small"}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows))
      : make("p", {}, "Active in too few of the series that pick properties."));
}

function neighboursSection(latent) {
  const n = DATA.neighbours, which = array(n.which), cosine = array(n.cosine), rows = [];
  for (let i = latent * n.count; i < (latent + 1) * n.count; i++) {
    rows.push(make("tr", {}, make("td", {}, make("a", {href: `#${which[i]}`}, `latent ${which[i]}`)),
      make("td", {class: "num"}, number(cosine[i], true)), make("td", {class: "num"}, percent(column("density")[which[i]])),
      make("td", {class: "wide"}, word("class", which[i]) === null ? "–" : `class ${word("class", which[i])}`)));
  }
  const head = ["", "cosine", "active at", ""].map((t, i) => make("th", {class: i % 3 ? "num" : "wide"}, t));
  return section("Nearest latents", "By the angle between directions.",
    make("table", {class: "small"}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows)));
}
