let chosenClass = -1;
const ofClass = (items) => items.filter((item) => (item.class === null ? -1 : item.class) === chosenClass);

function drawCurves(element) {
  const curves = ofClass(data.curves);
  if (!curves.length) return say(element, "This class has no labelled boxes and therefore no curve.");
  if (element.querySelector(".absent")) element.replaceChildren();
  const looks = { 0.5: ["IoU .50", "tone-1", "solid"], 0.75: ["IoU .75", "tone-4", "dash"], null: ["mean of .50 to .95", "tone-0", "dot"] };
  const traces = curves.map((curve) => {
    const [name, tone, dash] = looks[curve.iou];
    const hasScore = Boolean(curve.score);
    return {
      ...lineOf(curve.precision, name, tone, dash), x: curve.recall || data.curves[0].recall,
      customdata: (curve.score || []).map((score) => (score === null ? "not reached" : score.toFixed(3))),
      hovertemplate: `recall %{x:.2f}<br>precision %{y:.3f}${hasScore ? "<br>score threshold %{customdata}" : ""}<extra>${name}</extra>`,
    };
  });
  return draw(element, traces, { height: 340, xaxis: { ...unit, title: title("recall") }, yaxis: { ...unit, title: title("precision") } });
}
function drawCalibration(element) {
  const bins = ofClass(data.calibration)[0];
  byId("calibration-error").textContent = bins && bins.error !== null ? `expected calibration error (ECE) ${bins.error.toFixed(3)}` : "";
  if (!bins || !bins.count.some(Boolean)) return say(element, "This class has no detections.");
  if (element.querySelector(".absent")) element.replaceChildren();
  const middle = bins.low.map((low, index) => (low + bins.high[index]) / 2);
  const width = bins.low.map((low, index) => (bins.high[index] - low) * 0.9);
  const texts = bins.low.map((low, index) => `score ${low.toFixed(1)} to ${bins.high[index].toFixed(1)}<br>` + (bins.count[index]
    ? `precision ${bins.precision[index].toFixed(3)}<br>mean score ${bins.mean_score[index].toFixed(3)}<br>` : "") + `${count(bins.count[index])} detections`);
  const most = Math.max(...bins.count);
  return draw(element, [
    { type: "bar", name: "precision", x: middle, y: bins.precision, width, marker: { color: colour("tone-1") }, text: texts, textposition: "none", hovertemplate: "%{text}<extra></extra>" },
    { type: "scatter", mode: "lines", name: "score = precision", x: [0, 1], y: [0, 1], line: { color: colour("ink"), width: 1.5, dash: "dash" }, hoverinfo: "skip" },
    { type: "bar", name: "detections", showlegend: false, x: middle, y: bins.count, width, yaxis: "y2", marker: { color: colour("tone-5"), opacity: 0.6 }, text: texts, textposition: "none", hovertemplate: "%{text}<extra></extra>" },
  ], {
    height: 340, barmode: "overlay", xaxis: { ...unit, range: [0, 1], title: title("score"), anchor: "y2" }, yaxis: { ...unit, domain: [0.26, 1], title: title("precision") },
    yaxis2: { domain: [0, 0.17], range: [0, most * 1.05], tickvals: [0, most], ticktext: ["", count(most)], gridcolor: colour("line"), fixedrange: true, automargin: true, zeroline: false },
  });
}
function drawErrors(element) {
  const names = data.errors.classes.map((index) => data.classes[index]);
  if (!names.length) return say(element, "There are no errors.");
  const places = names.map((_, index) => index);
  const traces = data.errors.kinds.map((kind, number) => ({
    type: "bar", orientation: "h", name: kind.name, y: places, x: kind.points, marker: { color: colour("tone-" + number) },
    text: names.map((name, index) => `<b>${plain(name)}</b><br>${kind.name}: ${(kind.points[index] ?? 0).toFixed(1)} points, ${count(kind.count[index])} times`), textposition: "none", hovertemplate: "%{text}<extra></extra>",
  }));
  return draw(element, traces, {
    height: Math.max(300, names.length * 22 + 90), barmode: "relative", bargap: 0.28,
    margin: { l: 20, r: 12, t: 62, b: 30 }, legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yref: "container", yanchor: "top", font: { color: colour("ink"), size: 11.5 }, itemclick: false, itemdoubleclick: false },
    xaxis: { ticksuffix: "", side: "top", title: { text: "" } }, yaxis: { autorange: false, range: [names.length - 0.4, -0.6], tickvals: places, ticktext: names.map((name) => short(name, 18)), showgrid: false, tickfont: { color: colour("ink") } },
  });
}
function drawConfusion(element) {
  const { names, cells, sums } = data.confusion;
  const size = names.length + 1;
  const counts = Array.from({ length: size }, () => new Array(size).fill(0));
  for (const [row, column, value] of cells) counts[row][column] += value;
  const shares = counts.map((row, index) => {
    const sum = index < size - 1 ? sums[index] : row.reduce((one, other) => one + other, 0);
    return row.map((value) => (value && sum ? value / sum : null));
  });
  const rowNames = [...names.map(plain), "no label"];
  const columnNames = [...names.map(plain), "not found"];
  const texts = counts.map((row, one) => row.map((value, other) => `labelled <b>${rowNames[one]}</b><br>detected <b>${columnNames[other]}</b><br>${count(value)} (${(100 * (shares[one][other] || 0)).toFixed(1)} % of the row)`));
  const cell = size > 40 ? 11 : size > 16 ? 22 : 44;
  const places = names.map((_, index) => index).concat(size - 1);
  const labels = (all) => all.map((_, index) => (index < size - 1 ? short(names[index], 17) : all[index]));
  const side = size * cell;
  const room = element.parentElement.clientWidth;
  const left = cell < 20 || room < 480 ? 100 : 140;
  const right = room < 480 ? 36 : 70; // the last column's slanted name needs some
  const fit = Math.max(side, Math.min(440, room - left - right));
  const trace = {
    type: "heatmap", z: shares, x: places, y: places, hovertext: texts, hovertemplate: "%{hovertext}<extra></extra>", hoverongaps: false, showscale: right === 70,
    xgap: 1, ygap: 1, zmin: 0, zmax: 1, colorscale: [[0, colour("low-colour")], [0.02, colour("accent-soft")], [1, colour("high-colour")]],
    colorbar: { thickness: 10, len: Math.min(1, 260 / fit), y: 1, yanchor: "top", tickformat: ".0%", outlinewidth: 0, x: 1, xpad: 8 },
  };
  if (size <= 16) Object.assign(trace, { texttemplate: "%{text}", text: counts.map((row) => row.map((value) => (value ? count(value) : ""))) });
  const tick = { tickfont: { size: cell < 20 ? 9.5 : 12, color: colour("ink") }, showgrid: false, tickmode: "array", tickvals: places, constrain: "domain" };
  draw(element, [trace], {
    width: fit + left + right, height: fit + 130, autosize: false, margin: { l: left, r: right, t: 115, b: 15 },
    xaxis: { ...tick, automargin: false, side: "top", tickangle: -60, ticktext: labels(columnNames), range: [-0.5, size - 0.5] },
    yaxis: { ...tick, automargin: false, ticktext: labels(rowNames), range: [size - 0.5, -0.5] },
    shapes: [["x", "y"], ["y", "x"]].map(([fixed, free]) => ({ type: "line", [fixed + "0"]: size - 1.5, [fixed + "1"]: size - 1.5, [free + "0"]: -0.5, [free + "1"]: size - 0.5, line: { color: colour("soft"), width: 1 } })),
  });
  listPairs(names, counts, sums);
}
function listPairs(names, counts, sums) {
  const pairs = [];
  names.forEach((_, row) => names.forEach((__, column) => { if (row !== column && counts[row][column]) pairs.push([counts[row][column], row, column]); }));
  pairs.sort((one, other) => other[0] - one[0]);
  const element = byId("confused-pairs");
  element.replaceChildren();
  const half = Math.min(6, Math.ceil(Math.min(12, pairs.length) / 2));
  for (const part of [pairs.slice(0, half), pairs.slice(half, 2 * half)]) {
    if (!part.length) continue;
    const list = document.createElement("ul");
    list.className = "pairs";
    list.setAttribute("aria-label", "Most frequent confusions");
    for (const [value, row, column] of part) {
      const item = document.createElement("li");
      const words = document.createElement("span");
      words.textContent = `${names[row]} detected as ${names[column]}`;
      const figure = document.createElement("span");
      figure.className = "faint";
      figure.textContent = `${count(value)} of ${count(sums[row])}`;
      item.append(words, figure);
      list.append(item);
    }
    element.append(list);
  }
}
function drawImages(element) {
  const bins = data.images.count;
  const x = bins.map((_, index) => (index + 0.5) / bins.length);
  return draw(element, [{
    type: "bar", x, y: bins, marker: { color: colour("tone-1") }, width: 0.92 / bins.length, textposition: "none",
    text: bins.map((value, index) => `F1 ${(index / bins.length).toFixed(2)} to ${((index + 1) / bins.length).toFixed(2)}<br>${count(value)} images`), hovertemplate: "%{text}<extra></extra>",
  }], { height: 190, xaxis: { ...unit, range: [0, 1], title: title("F1") }, yaxis: { title: title("images"), tickformat: ",d", nticks: 4 } });
}
function drawTraining(element, columns, axis) {
  const traces = columns.filter(([name]) => data.training[name]).map(([name, label, tone, dash]) => ({
    ...lineOf(data.training[name], label, tone, dash), mode: "lines+markers", marker: { size: 5 }, x: data.training.epoch, connectgaps: true,
    hovertemplate: `epoch %{x}<br>${label} %{y:.4g}<extra></extra>`,
  }));
  return draw(element, traces, { height: 300, showlegend: traces.length > 1, xaxis: { title: title("epoch"), tickformat: "d", nticks: 10 }, yaxis: { title: title(axis), rangemode: "tozero" } });
}
const reportCharts = {
  "chart-errors": drawErrors, "chart-curves": drawCurves, "chart-calibration": drawCalibration, "chart-confusion": drawConfusion, "chart-images": drawImages,
  "chart-loss": (element) => drawTraining(element, [["loss", "loss", "tone-1", "solid"]], "loss"),
  "chart-validation": (element) => drawTraining(element, [["AP", "AP", "tone-1", "solid"], ["AP50", "AP50", "tone-4", "dash"], ["AP75", "AP75", "tone-0", "dot"]], "value"),
};

for (const select of document.querySelectorAll("[data-class-switch]")) {
  select.value = "-1"; // browsers may restore a previous choice
  select.addEventListener("change", () => {
    chosenClass = Number(select.value);
    for (const id of ["chart-curves", "chart-calibration"]) if (drawn.has(id)) drawChart(byId(id));
  });
}
start(reportCharts);
