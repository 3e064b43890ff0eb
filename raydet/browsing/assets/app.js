/* Start of the page, its toolbar and its keyboard. */
import { LEGEND, sideSwitches } from "./boxes.js";
import * as filters from "./filters.js";
import * as grid from "./grid.js";
import { SIDE, ask, byId, many, make, on, recall, remember, say, select, state, tell } from "./state.js";
import * as viewer from "./viewer.js";

async function start() {
  state.about = await ask("/api/about");
  const about = state.about;
  document.title = `${about.title} · raydet browse`;
  byId("title").textContent = about.title;
  byId("title").title = about.uri;
  byId("notes").append(...about.notes.map((text) => make("p", { className: "note", text })));
  byId("sort").append(...about.sorts.map((sort) => make("option", { value: sort.key, text: sort.name })));
  recall();
  if (Object.keys(state.filter).length) {
    // The address may be of other data.
    try { await ask("/api/facets", state.filter); } catch { state.filter = {}; say(""); }
  }
  remember();
  byId("sort").value = state.sort;
  for (const side of about.sides) if (side.index !== SIDE.suspects) state.shown.sides.add(side.index);
  // A detector finds many boxes of low scores: the page first shows those that are judged.
  if (about.thresholds.length) state.shown.score = Math.min(...about.thresholds);
  byId("legend").append(...LEGEND.map(([kind, text]) => make("li", {}, make("i", { className: `swatch ${kind}` }), text)));
  for (const id of ["min-score", "viewer-score"]) byId(id).parentElement.hidden = !about.thresholds.length;
  filters.start();
  grid.start();
  viewer.start();
  toolbar();
  on("open", () => viewer.open(grid.focusedNumber()));
  on("boxes", showSwitches);
  on("selection", showSelection);
  showSwitches();
  showSelection();
  tell("filter");
}

function showSwitches() {
  sideSwitches(byId("sides"), () => tell("boxes"));
  byId("min-score").value = state.shown.score;
  byId("min-score-value").textContent = state.shown.score.toFixed(2);
}

function showSelection() {
  byId("num-selected").textContent = state.selected ? `${many(state.selected, "image")} selected` : "";
  byId("save").disabled = !state.selected;
  byId("select-none").disabled = !state.selected;
}

function toolbar() {
  byId("save").title = `Write ${state.about.selection}.parquet, and .txt if the images are files`;
  byId("sort").addEventListener("change", () => { state.sort = byId("sort").value; remember(); grid.reset(); });
  byId("min-score").addEventListener("input", () => { state.shown.score = Number(byId("min-score").value); tell("boxes"); });
  byId("only-hits").addEventListener("change", () => { state.shown.onlyHits = byId("only-hits").checked; tell("boxes"); });
  byId("select-all").addEventListener("click", async () => { await select({ is_selected: true, filter: state.filter }); tell("reload"); });
  byId("select-none").addEventListener("click", async () => { await select({ is_selected: false, filter: {} }); if (state.filter.images === "selected") tell("filter"); else tell("reload"); });
  byId("save").addEventListener("click", async () => {
    const answer = await ask("/api/save", {});
    say(`${many(answer.selected, "image")} saved: ${answer.files.join(" and ")}`);
  });
  byId("show-filters").addEventListener("click", () => {
    const isOpen = document.body.classList.toggle("with-filters");
    byId("show-filters").setAttribute("aria-expanded", String(isOpen));
    byId("show-filters").textContent = isOpen ? "Images" : "Filters";
  });
  byId("show-help").addEventListener("click", () => byId("help").showModal());
  byId("close-help").addEventListener("click", () => byId("help").close());
  on("filter", () => say(""));
}

function switchBoxes(key) {
  const sides = { l: SIDE.labels, 1: SIDE.first, 2: SIDE.second, s: SIDE.suspects };
  if (key === "h") state.shown.none = !state.shown.none;
  else if (key in sides && state.about.sides.some((side) => side.index === sides[key])) {
    if (!state.shown.sides.delete(sides[key])) state.shown.sides.add(sides[key]);
    state.shown.none = false;
  } else return false;
  tell("boxes");
  return true;
}

const TYPED = new Set(["text", "search", "number", "range"]);
document.addEventListener("keydown", (event) => {
  if (!state.about || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  if (target instanceof HTMLSelectElement || (target instanceof HTMLInputElement && TYPED.has(target.type))) return;
  if (byId("help").open) return;
  let isHandled = switchBoxes(event.key);
  if (!isHandled && viewer.isOpen()) isHandled = viewer.pressed(event.key);
  else if (!isHandled) {
    const isInGrid = byId("grid").contains(target) || target === document.body || target === byId("scroller");
    if (isInGrid && grid.moved(event.key)) isHandled = true;
    else if (event.key === "x" && isInGrid) { grid.toggle(grid.focusedNumber()); isHandled = true; }
    else if (event.key === "Enter" && target === document.body) { tell("open"); isHandled = true; }
    else if (event.key === "/") { byId("text").focus(); isHandled = true; }
    else if (event.key === "?") { byId("help").showModal(); isHandled = true; }
  }
  if (isHandled) event.preventDefault();
});

start().catch((error) => say(error.message));
