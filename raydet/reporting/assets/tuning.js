const better = (one, other) => (data.less_is_better ? one < other : one > other);
const measured = data.trials.map((trial, number) => ({ ...trial, number })).filter((trial) => trial.value !== null);
const about = (trial) => [
  `${plain(trial.name)}, ${plain(trial.state)}`, `${plain(data.metric)} ${trial.value.toFixed(4)}`,
  ...data.axes.map((axis, index) => `${plain(axis.name)} ${short(trial.texts[index], 60)}`),
].join("<br>");

function drawProgress(element) {
  const tones = { finished: ["tone-1", "circle"], stopped: ["tone-4", "diamond"], unfinished: ["tone-5", "x"], failed: ["tone-0", "square"] };
  const traces = Object.entries(tones).map(([state, [tone, symbol]]) => {
    const trials = measured.filter((trial) => trial.state === state);
    return {
      type: "scatter", mode: "markers", name: state, x: trials.map((trial) => trial.number), y: trials.map((trial) => trial.value),
      marker: { color: colour(tone), symbol, size: 10 }, text: trials.map(about), hovertemplate: "%{text}<extra></extra>",
    };
  }).filter((trace) => trace.x.length);
  let best = null;
  const line = measured.map((trial) => { best = best === null || better(trial.value, best) ? trial.value : best; return best; });
  traces.unshift({
    type: "scatter", mode: "lines", name: "best so far", x: measured.map((trial) => trial.number), y: line,
    line: { color: colour("ink"), width: 1.5, shape: "hv" }, hoverinfo: "skip",
  });
  return draw(element, traces, { height: 360, xaxis: { title: title("trial"), dtick: data.trials.length > 30 ? undefined : 1 }, yaxis: { title: title(plain(data.metric)) } });
}

/* Interpolate between the theme's low and high colours. */
function shade(share) {
  const [low, high] = ["accent-soft", "high-colour"].map((name) => colour(name).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)));
  return `rgb(${low.map((value, index) => Math.round(value + (high[index] - value) * share)).join(",")})`;
}
function drawSpace(element) {
  const values = measured.map((trial) => trial.value);
  const worst = values.reduce((one, other) => (better(one, other) ? other : one), values[0]);
  const top = values.reduce((one, other) => (better(one, other) ? one : other), values[0]);
  const share = (value) => (top === worst ? 1 : (value - worst) / (top - worst));
  const last = data.axes.length;
  const height = (value) => (top === worst ? 0.5 : data.less_is_better ? 1 - share(value) : share(value));
  const traces = [...measured].sort((one, other) => share(one.value) - share(other.value)).map((trial) => ({
    type: "scatter", mode: "lines+markers", showlegend: false, connectgaps: false,
    x: [...data.axes.keys(), last], y: [...trial.places, height(trial.value)],
    line: { color: shade(share(trial.value)), width: 1 + 2 * share(trial.value) }, marker: { size: 7 },
    text: Array(last + 1).fill(about(trial)), hovertemplate: "%{text}<extra></extra>",
  }));
  const label = (x, y, text) => ({ x, y, text, xanchor: "right", xshift: -8, showarrow: false, font: { size: 11, color: colour("soft") } });
  const ends = data.less_is_better ? [top, worst] : [worst, top];
  const annotations = data.axes.flatMap((axis, index) => axis.ticks.map(([place, text]) => label(index, place, short(text, 18))));
  if (values.length) annotations.push(...(top === worst ? [label(last, 0.5, top.toFixed(3))] : [label(last, 0, ends[0].toFixed(3)), label(last, 1, ends[1].toFixed(3))]));
  const names = [...data.axes.map((axis) => short(axis.name, 26)), `<b>${plain(data.metric)}</b>`];
  element.style.minWidth = `${(last + 1) * 130}px`;
  return draw(element, traces, {
    height: 420, annotations, margin: { l: 70, r: 30, t: 16, b: 44 },
    shapes: names.map((_, index) => ({ type: "line", x0: index, x1: index, y0: 0, y1: 1, layer: "below", line: { color: colour("line"), width: 1 } })),
    xaxis: { range: [-0.6, last + 0.3], tickvals: [...names.keys()], ticktext: names, showgrid: false, showline: false },
    yaxis: { range: [-0.06, 1.06], visible: false },
  });
}
function drawImportance(element) {
  const names = data.importance.map(([name]) => short(name, 40));
  const shares = data.importance.map(([, share]) => share);
  return draw(element, [{
    type: "bar", orientation: "h", y: names, x: shares, marker: { color: colour("tone-1") },
    text: shares.map((share) => `${(100 * share).toFixed(0)} %`), textposition: "outside", cliponaxis: false, hoverinfo: "skip",
  }], { height: 70 + 34 * names.length, margin: { l: 48, r: 60, t: 8, b: 44 }, xaxis: { range: [0, Math.max(...shares) * 1.02], tickformat: ".0%" } });
}
start({ "chart-progress": drawProgress, "chart-space": drawSpace, "chart-importance": drawImportance });
