let shownClass = -1;
const splitNames = { data: "data", val: "validation" };

function drawHistogram(element, name) {
  const { labels, unit: axis, what, splits } = data.histograms[name];
  const parts = splits.map((rows) => rows[shownClass] || labels.map(() => 0));
  const sums = parts.map((values) => values.reduce((one, other) => one + other, 0));
  if (!sums.some(Boolean)) return say(element, "This class has no data.");
  if (element.querySelector(".absent")) element.replaceChildren();
  const filled = labels.map((_, bin) => parts.some((values) => values[bin]));
  const first = Math.max(0, filled.indexOf(true) - 1);
  const last = Math.min(labels.length, filled.lastIndexOf(true) + 2);
  const isCompared = parts.length > 1;
  const traces = parts.map((values, split) => {
    const shown = values.slice(first, last);
    const shares = shown.map((value) => (sums[split] ? value / sums[split] : 0));
    return {
      type: "bar", name: splitNames[data.splits[split]], x: labels.slice(first, last), y: isCompared ? shares : shown,
      marker: { color: colour(split ? "tone-4" : "tone-1") }, textposition: "none",
      text: shown.map((value, bin) => `${labels[first + bin]}<br>${count(value)} ${what} (${(100 * shares[bin]).toFixed(1)} %)`), hovertemplate: "%{text}<extra></extra>",
    };
  });
  return draw(element, traces, {
    height: 270, showlegend: isCompared, bargap: 0.12, xaxis: { type: "category", title: title(axis), tickangle: -45 },
    yaxis: { title: title(isCompared ? `share of ${what}` : what), nticks: 5, ...(isCompared ? { tickformat: ".0%" } : { tickformat: "~s" }) },
  });
}
function heatmap(z, texts, extra) {
  return {
    type: "heatmap", z, hovertext: texts, hovertemplate: "%{hovertext}<extra></extra>", hoverongaps: false, zmin: 0,
    colorscale: [[0, colour("low-colour")], [0.02, colour("accent-soft")], [1, colour("high-colour")]], ...extra,
  };
}
function drawCentres(element) {
  const { grid, cells } = data.centres;
  const values = cells[shownClass];
  if (!values.some(Boolean)) return say(element, "This class has no boxes.");
  if (element.querySelector(".absent")) element.replaceChildren();
  const rows = Array.from({ length: grid }, (_, row) => values.slice(row * grid, (row + 1) * grid));
  const percent = (place) => `${Math.round((100 * place) / grid)}–${Math.round((100 * (place + 1)) / grid)} %`;
  const texts = rows.map((row, y) => row.map((value, x) => `${count(value)} boxes<br>${percent(x)} from the left<br>${percent(y)} from the top`));
  const bare = { showgrid: false, showticklabels: false, constrain: "domain" };
  return draw(element, [heatmap(rows, texts, { colorbar: { thickness: 10, len: 0.9, outlinewidth: 0, tickformat: "~s" } })], {
    height: 380, margin: { l: 24, r: 12, t: 8, b: 40 }, xaxis: { ...bare, title: title("left to right") }, yaxis: { ...bare, autorange: "reversed", scaleanchor: "x", title: title("top to bottom") },
  });
}
function drawTogether(element) {
  const { names, images, cells } = data.together;
  const size = names.length;
  const counts = Array.from({ length: size }, () => new Array(size).fill(0));
  images.forEach((value, place) => { counts[place][place] = value; });
  for (const [one, other, value] of cells) { counts[one][other] = value; counts[other][one] = value; }
  const shares = counts.map((row, place) => row.map((value) => (value ? value / images[place] : null)));
  const texts = counts.map((row, one) => row.map((value, other) => (one === other
    ? `<b>${plain(names[one])}</b><br>in ${count(value)} images`
    : `<b>${plain(names[one])}</b> and <b>${plain(names[other])}</b><br>in ${count(value)} images (${(100 * (value / images[one])).toFixed(1)} % of those with ${plain(short(names[one]))})`)));
  const cell = size > 30 ? 12 : size > 14 ? 22 : 44;
  const left = cell < 20 ? 110 : 130;
  const fit = Math.max(size * cell, Math.min(300, element.parentElement.clientWidth - left - 70));
  const places = names.map((_, place) => place);
  const tick = { tickfont: { size: cell < 20 ? 9.5 : 12, color: colour("ink") }, showgrid: false, tickmode: "array", tickvals: places, ticktext: names.map((name) => short(name, 17)), constrain: "domain", automargin: false };
  const trace = heatmap(shares, texts, { x: places, y: places, xgap: 1, ygap: 1, zmax: 1, colorbar: { thickness: 10, len: Math.min(1, 260 / fit), y: 1, yanchor: "top", tickformat: ".0%", outlinewidth: 0, x: 1, xpad: 8 } });
  if (size <= 12) Object.assign(trace, { texttemplate: "%{text}", text: counts.map((row) => row.map((value) => (value ? count(value) : ""))) });
  return draw(element, [trace], {
    width: fit + left + 70, height: fit + 120, autosize: false, margin: { l: left, r: 70, t: 105, b: 15 },
    xaxis: { ...tick, side: "top", tickangle: -60, range: [-0.5, size - 0.5] }, yaxis: { ...tick, range: [size - 0.5, -0.5] },
  });
}
const inspectCharts = Object.fromEntries(Object.keys(data.histograms).map((name) => [`chart-${name}`, (element) => drawHistogram(element, name)]));
if (data.together) inspectCharts["chart-together"] = drawTogether;
inspectCharts["chart-centres"] = drawCentres;

const classChoice = byId("chart-class");
if (classChoice) {
  classChoice.value = "-1"; // browsers may restore a previous choice
  classChoice.addEventListener("change", () => {
    shownClass = Number(classChoice.value);
    redraw();
  });
}
const galleryChoice = byId("gallery-class");
if (galleryChoice) {
  galleryChoice.selectedIndex = 0;
  galleryChoice.addEventListener("change", () => {
    for (const panel of document.querySelectorAll(".gallery-panel")) panel.classList.toggle("closed", panel.id !== galleryChoice.value);
  });
}
start(inspectCharts);
