// Drawings: a series with its window, horizontal bars, the map of activations.
function windowChart(found, limits, emphasised, profile) {
  const width = 380, height = 150, left = 38, right = 6, top = 6, strip = 26, axis = 18;
  const bottom = height - axis - strip, span = found.span;
  const x = t => left + (DATA.time > 1 ? t / (DATA.time - 1) : 0.5) * (width - left - right);
  const edge = t => Math.min(Math.max(x(t - 0.5), left), width - right);
  const y = v => top + (limits[1] - v) / (limits[1] - limits[0]) * (bottom - top);
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
    `series ${found.series}, samples ${span[0]} to ${span[1] - 1}`});
  svg.append(make("rect", {class: "window", x: edge(span[0]), y: top,
    width: edge(span[1]) - edge(span[0]), height: bottom - top}));
  for (const value of [limits[0], limits[1]]) {
    svg.append(make("text", {x: left - 4, y: y(value) + (value === limits[0] ? 0 : 8), class: "tick end"},
      number(value)));
  }
  const channels = [...found.channels].sort((a, b) => emphasised.has(a) - emphasised.has(b)), several = channels.length > 1;
  for (const channel of channels) {
    const strong = !several || emphasised.has(channel);
    const path = make("path", {d: linePath(rawSeries(found.shown, channel), x, y),
      class: strong ? "line strong" : "line"});
    path.append(make("title", {}, `channel ${channel}`));
    svg.append(path);
  }
  if (emphasised.has("mean")) {
    const all = channels.map(channel => rawSeries(found.shown, channel));
    const mean = all[0].map((_, t) => all.reduce((sum, values) => sum + values[t], 0) / all.length);
    svg.append(make("path", {d: linePath(mean, x, y), class: "line strong"},
      make("title", {}, "mean of channels")));
  }
  // The activation at every position, as bars under the series.
  const low = height - axis, first = found.row * DATA.pos;
  svg.append(make("line", {x1: left, x2: width - right, y1: low, y2: low, class: "base"}));
  const barWidth = Math.max(1, (width - left - right) / DATA.pos - 1);
  for (let pos = 0; pos < DATA.pos; pos++) {
    const share = profile[first + pos];
    if (!(share > 0)) continue;
    const middle = x((DATA.cells[pos][0] + DATA.cells[pos][1] - 1) / 2), tall = share * (strip - 4);
    svg.append(make("rect", {x: middle - barWidth / 2, width: barWidth, y: low - tall, height: tall,
      class: pos === found.pos ? "bar peak" : "bar"}));
  }
  for (const t of [0, DATA.time - 1]) {
    svg.append(make("text", {x: x(t), y: height - 4, class: t ? "tick end" : "tick"}, String(t)));
  }
  return svg;
}

function linePath(values, x, y) {
  let path = "", pen = false;
  const step = Math.max(1, Math.floor(values.length / 1500));
  for (let t = 0; t < values.length; t += step) {
    if (Number.isNaN(values[t])) { pen = false; continue; }
    path += `${pen ? "L" : "M"}${x(t).toFixed(1)} ${y(values[t]).toFixed(1)}`;
    pen = true;
  }
  return path;
}

// Two digits, for ticks.
function brief(value) {
  return String(Number(value.toPrecision(2))).replace("-", "−");
}

// Mean and spread of a code's windows in one channel, from `before` samples before the position.
function prototypeChart(mean, spread, overall, before) {
  const width = 200, height = 112, left = 40, right = 4, top = 6, bottom = height - 16, last = mean.length - 1;
  const there = [...mean.keys()].filter(t => !Number.isNaN(mean[t]));
  let low = Math.min(overall, ...there.map(t => mean[t] - spread[t])), high = Math.max(overall, ...there.map(t => mean[t] + spread[t]));
  if (!(high > low)) { low -= 1; high += 1; }
  const x = t => left + Math.min(Math.max(last ? t / last : 0.5, 0), 1) * (width - left - right);
  const y = v => top + (high - v) / (high - low) * (bottom - top), middle = y(overall);
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "prototype of one channel"});
  if (before > 0) {
    const from = x(before - 0.5), to = x(last - before + 0.5);
    svg.append(make("rect", {class: "window", x: from, y: top, width: Math.max(to - from, 1), height: bottom - top}));
  }
  const edge = sign => there.map(t => `${x(t).toFixed(1)} ${y(mean[t] + sign * spread[t]).toFixed(1)}`);
  if (there.length) svg.append(make("path", {class: "band", d: `M${[...edge(1), ...edge(-1).reverse()].join("L")}Z`}));
  svg.append(make("line", {class: "middle", x1: left, x2: width - right, y1: middle, y2: middle}),
    make("path", {class: "line strong", d: linePath(mean, x, y)}),
    make("text", {x: left - 4, y: y(high) + 8, class: "tick end"}, brief(high)), make("text", {x: left - 4, y: y(low), class: "tick end"}, brief(low)),
    make("text", {x: x(before), y: height - 3, class: "tick"}, "0"), make("text", {x: width - right, y: height - 3, class: "tick end"}, `+${last - before}`));
  return svg;
}

// Bars from a zero line; entries are {name, value, text, title}.
function bars(entries, signed) {
  const longest = key => Math.max(...entries.map(e => Math.min(e[key].length, 30)));
  const row = 20, width = Math.min(480, innerWidth - 24), nameWidth = 12 + 7 * Math.min(longest("name"), 16);
  const textWidth = 14 + 6.6 * longest("text");
  const height = row * entries.length + 4;
  const largest = Math.max(...entries.map(e => Math.abs(e.value) || 0), 1e-30);
  const span = width - nameWidth - textWidth;
  const zero = signed ? nameWidth + span / 2 : nameWidth;
  const scale = (signed ? span / 2 : span) / (signed ? largest : Math.max(largest, entries.full || 0));
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", class: "bars"});
  entries.forEach((entry, i) => {
    const size = (Math.abs(entry.value) || 0) * scale, middle = i * row + row / 2 + 2;
    const name = entry.name.length > 16 ? entry.name.slice(0, 15) + "…" : entry.name;
    svg.append(make("text", {x: nameWidth - 6, y: middle + 4, class: "name end"}, name,
      make("title", {}, entry.name)));
    svg.append(make("rect", {x: entry.value < 0 ? zero - size : zero, y: middle - 6, height: 12,
      width: Math.max(size, 0.5), class: signed ? (entry.value < 0 ? "down" : "up") : "share"},
      make("title", {}, entry.title || entry.text)));
    svg.append(make("text", {x: width - textWidth + 8, y: middle + 4, class: "value"}, entry.text));
  });
  svg.append(make("line", {x1: zero, x2: zero, y1: 0, y2: height, class: "base"}));
  return svg;
}

const MOST_MAP_ROWS = 400;

// Rows of the map: by class, strongest first; where there are too many, evenly spaced ones.
function mapRows(profile) {
  const rows = [];
  for (let row = 0; row < DATA.series.length * DATA.rows; row++) {
    const shown = Math.floor(row / DATA.rows);
    let peak = 0;
    for (let pos = 0; pos < DATA.pos; pos++) peak = Math.max(peak, profile[row * DATA.pos + pos]);
    rows.push({row, shown, peak, label: DATA.labels ? DATA.labels[shown] : 0});
  }
  rows.sort((a, b) => a.label - b.label || b.peak - a.peak || a.row - b.row);
  if (rows.length <= MOST_MAP_ROWS) return rows;
  const every = rows.length / MOST_MAP_ROWS;
  return Array.from({length: MOST_MAP_ROWS}, (_, i) => rows[Math.floor(i * every)]);
}

function heatMap(latent, profile) {
  const rows = mapRows(profile), largest = array(DATA.heat.largest)[latent];
  const canvas = make("canvas", {width: DATA.pos, height: rows.length, class: "map", role: "img",
    "aria-label": `activation of ${NOUN} ${nameOf(latent)} over ${rows.length} series and ${DATA.pos} positions`});
  const context = canvas.getContext("2d"), image = context.createImageData(DATA.pos, rows.length);
  rows.forEach((entry, i) => {
    for (let pos = 0; pos < DATA.pos; pos++) {
      const slot = entry.row * DATA.pos + pos, share = profile[slot];
      image.data.set(isPadded(slot) ? [226, 230, 234, 255] : shade(share), 4 * (i * DATA.pos + pos));
    }
  });
  context.putImageData(image, 0, 0);
  const note = make("p", {class: "note", id: "pointed"}, "Point at the map to read a value.");
  canvas.style.height = Math.min(Math.max(rows.length * 3, 120), 480) + "px";
  canvas.addEventListener("pointermove", event => {
    const box = canvas.getBoundingClientRect();
    const i = Math.min(rows.length - 1, Math.max(0,
      Math.floor((event.clientY - box.top) / box.height * rows.length)));
    const pos = Math.min(DATA.pos - 1, Math.max(0,
      Math.floor((event.clientX - box.left) / box.width * DATA.pos)));
    const entry = rows[i], span = DATA.spans[pos], slot = entry.row * DATA.pos + pos;
    note.textContent = `series ${DATA.series[entry.shown]}`
      + (DATA.rows > 1 ? `, channel ${entry.row % DATA.rows}` : "")
      + (DATA.labels ? `, class ${DATA.classes[entry.label]}` : "")
      + `, samples ${span[0]}–${span[1] - 1}: `
      + (isPadded(slot) ? "padding" : number(profile[slot] > 0 ? profile[slot] * largest : 0));
  });
  return make("div", {}, make("div", {class: "mapbox"}, classMarks(rows, canvas.style.height), canvas),
    make("div", {class: "mapaxis"}, make("span", {}, "sample 0"),
      make("span", {}, `${DATA.time - 1}`)), note);
}

function classMarks(rows, height) {
  const box = make("div", {class: "marks"});
  box.style.height = height;
  if (!DATA.labels) return box;
  let first = 0;
  for (let i = 1; i <= rows.length; i++) {
    if (i < rows.length && rows[i].label === rows[first].label) continue;
    const name = DATA.classes[rows[first].label];
    const mark = make("span", {title: `class ${name}`}, name);
    mark.style.top = 100 * first / rows.length + "%";
    mark.style.height = 100 * (i - first) / rows.length + "%";
    box.append(mark);
    first = i;
  }
  return box;
}

// White to dark blue, as the house's sequential colours.
function shade(share) {
  const stops = [[247, 250, 252], [127, 178, 211], [16, 69, 126]];
  if (!(share > 0)) return [...stops[0], 255];
  const level = 0.18 + 0.82 * Math.min(share, 1), i = level < 0.5 ? 0 : 1, part = level * 2 - i;
  return [...stops[i].map((low, c) => Math.round(low + part * (stops[i + 1][c] - low))), 255];
}
