"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const isDark = () => root.dataset.theme === "dark";
const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
// Plotly interprets some HTML tags in texts; names must be shown verbatim.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, length = 22) => plain(text.length > length ? text.slice(0, length - 1) + "…" : text);
const count = (value) => value.toLocaleString("en-US");

/* Theme: the system's until the user chooses one. */
const systemTheme = matchMedia("(prefers-color-scheme: dark)");
function storedTheme() { try { return localStorage.getItem("raydet-theme"); } catch { return null; } }
function setTheme(theme) {
  root.dataset.theme = theme;
  const button = byId("theme");
  button.textContent = theme === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", theme === "dark" ? "Switch to light colours" : "Switch to dark colours");
  button.removeAttribute("aria-pressed");
}
setTheme(storedTheme() || (systemTheme.matches ? "dark" : "light"));
systemTheme.addEventListener("change", () => { if (!storedTheme()) { setTheme(systemTheme.matches ? "dark" : "light"); redraw(); } });
byId("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("raydet-theme", theme); } catch { /* the choice then lasts for this visit */ }
  setTheme(theme);
  redraw();
});

/* Class table: sort and filter. */
function sortBy(table, column, kind, ascending) {
  const body = table.tBodies[0];
  const key = (row) => {
    const cell = row.cells[column];
    if (kind === "text") return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const rows = Array.from(body.rows, (row) => [key(row), row]);
  const sign = ascending ? 1 : -1;
  rows.sort(([one], [other]) => {
    if (one === null || other === null) return (one === null) - (other === null);
    return sign * (kind === "text" ? one.localeCompare(other) : one - other);
  });
  body.append(...rows.map(([, row]) => row));
}
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = Array.from(table.tHead.rows[0].cells);
  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const ascending = before === "none" ? button.dataset.kind === "text" : before === "descending";
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortBy(table, column, button.dataset.kind, ascending);
    });
  });
}
const filter = byId("filter");
if (filter) filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  const rows = Array.from(byId("class-table").tBodies[0].rows);
  for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  const shown = rows.filter((row) => !row.hidden).length;
  byId("filter-count").textContent = shown === rows.length ? `${shown} classes` : `${shown} of ${rows.length} classes`;
});

/* Tabs: arrow keys switch between them, as in the ARIA pattern. */
const tabs = Array.from(document.querySelectorAll('[role="tab"]'));
function openTab(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    byId(other.getAttribute("aria-controls")).classList.toggle("closed", other !== tab);
  }
}
tabs.forEach((tab, number) => {
  tab.addEventListener("click", () => openTab(tab));
  tab.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: number + 1, ArrowLeft: number - 1, Home: 0, End: tabs.length - 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = tabs[(steps[event.key] + tabs.length) % tabs.length];
    openTab(next);
    next.focus();
  });
});

/* Charts. */
function layout(extra) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, ticks: "", fixedrange: true, automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = extra;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("soft") },
    margin: { l: 48, r: 12, t: 8, b: 44 }, dragmode: false, hovermode: "closest", autosize: true,
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink"), size: 13 } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colour("ink") }, itemclick: false, itemdoubleclick: false },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}
const title = (text) => ({ text, font: { size: 12.5 }, standoff: 8 });
const unit = { range: [0, 1.01], tickformat: ".1f", dtick: 0.2 };
function draw(element, traces, extra) {
  element.style.height = extra.height + "px";
  element.style.minHeight = "0";
  return Plotly.react(element, traces, layout(extra), { displayModeBar: false, responsive: true });
}
const lineOf = (y, name, tone, dash = "solid") => ({ y, name, type: "scatter", mode: "lines", line: { color: colour(tone), width: 2, dash } });
function say(element, text) {
  Plotly.purge(element);
  const line = document.createElement("p");
  line.className = "absent";
  line.textContent = text;
  element.replaceChildren(line);
}

/* Drawing functions by element id, set by `start`. */
let charts = {};
const drawn = new Set();
function drawChart(element) { drawn.add(element.id); charts[element.id](element); }
function redraw() { for (const id of drawn) drawChart(byId(id)); }

/* Pictures open in the size of the window. */
const enlarged = byId("enlarged");
function enlarge(picture) {
  const place = enlarged.querySelector("div");
  place.replaceChildren(picture.querySelector("svg").cloneNode(true));
  const figure = picture.closest("figure");
  if (figure) place.append(figure.querySelector("figcaption").cloneNode(true));
  enlarged.showModal();
}
for (const picture of document.querySelectorAll('.picture[role="button"]')) {
  picture.addEventListener("click", () => enlarge(picture));
  picture.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    enlarge(picture);
  });
}
enlarged.addEventListener("click", (event) => { if (!event.target.closest("figcaption, button")) enlarged.close(); });

/* Tables and charts that are larger than their frame show on which side they go on. */
for (const frame of document.querySelectorAll(".scroll, .scroller")) {
  const update = () => {
    const right = frame.scrollWidth - frame.clientWidth - frame.scrollLeft > 1;
    const below = frame.scrollHeight - frame.clientHeight - frame.scrollTop > 1;
    frame.dataset.more = [right && "right", below && "below"].filter(Boolean).join(" ");
  };
  const observer = new ResizeObserver(update);
  observer.observe(frame);
  if (frame.firstElementChild) observer.observe(frame.firstElementChild);
  frame.addEventListener("scroll", update, { passive: true });
}

/* The embedded chart library is compressed. Charts are drawn one by one, so that the page reacts meanwhile. */
async function loadLibrary() {
  const packed = Uint8Array.from(atob(byId("library").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}
async function start(drawings) {
  charts = drawings;
  const elements = Object.keys(charts).map(byId).filter(Boolean);
  if (!elements.length) return;
  await loadLibrary();
  for (const element of elements) {
    drawChart(element);
    await new Promise((drawNext) => setTimeout(drawNext));
  }
  // Charts keep their width unless they are drawn again.
  matchMedia("print").addEventListener("change", redraw);
}
