/* One picture, or one for each of two runs, with its boxes, which are switched on and off by kind, class and score. */
import { answersOf, detailOf, draw, isShown, kindOf, label, nameOf, sideSwitches } from "./boxes.js";
import * as grid from "./grid.js";
import { BOX, SIDE, ask, byId, className, make, many, on, state, tell } from "./state.js";

const MOST_LISTED = 200;
const viewer = byId("viewer");
let number = 0;
let card = null;
let zoom = 1;
let stages = [];
let pointed = null;

export const isOpen = () => viewer.open;

export async function open(at) {
  if (at < 0 || at >= grid.numShown()) return;
  number = at;
  let answer;
  try { answer = await ask("/api/image", grid.request(at, 1)); } catch { return; }
  if (at !== number || !answer.images.length) return;
  card = answer.images[0];
  state.shown.hiddenClasses.clear();
  zoom = 1;
  pointed = null;
  if (!viewer.open) viewer.showModal();
  build();
  grid.focus(number, { isQuiet: true });
  const after = grid.cardAt(at + 1);
  if (after) new Image().src = `/picture/${after.image}`;
}

function build() {
  const name = card.path || `image ${card.image_id}`;
  byId("viewer-title").textContent = name;
  byId("viewer-title").title = name;
  byId("previous").disabled = number === 0;
  byId("next").disabled = number + 1 >= grid.numShown();
  byId("viewer-selected").checked = card.selected;
  const runs = state.about.sides.filter((side) => side.index === SIDE.first || side.index === SIDE.second);
  const kinds = runs.length > 1 ? runs.map((run) => [run.name, new Set([SIDE.labels, SIDE.suspects, run.index])]) : [["", null]];
  stages = kinds.map(([title, sides], place) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const image = make("img", { src: `/picture/${card.image}`, alt: "" });
    const inner = make("div", { className: "inner" }, image, svg);
    const stage = make("div", { className: "stage", on: { dblclick: () => setZoom(zoom > 1 ? 1 : 2.5) } }, inner);
    image.addEventListener("error", () => { image.replaceWith(grid.absence(card)); });
    stage.addEventListener("scroll", () => { for (const other of stages) if (other.stage !== stage) { other.stage.scrollTop = stage.scrollTop; other.stage.scrollLeft = stage.scrollLeft; } });
    return { stage, inner, svg, sides, isSecond: place === 1, element: make("figure", {}, ...(title ? [make("figcaption", { text: title })] : []), stage) };
  });
  byId("stages").replaceChildren(...stages.map((one) => one.element));
  byId("stages").classList.toggle("two", stages.length > 1);
  facts();
  classSwitches();
  redraw();
}

function facts() {
  const pairs = [["id", String(card.image_id)], ["size", card.width && card.height ? `${card.width} × ${card.height} px` : "unknown"]];
  if ("false_1" in card) pairs.push(["first run", `${card.false_1} false, ${card.missed_1} missed`]);
  if ("false_2" in card) pairs.push(["second run", `${card.false_2} false, ${card.missed_2} missed`]);
  if (card.f1_1 !== undefined && card.f1_1 !== null) pairs.push(["F1", card.f1_2 === undefined || card.f1_2 === null ? card.f1_1.toFixed(3) : `${card.f1_1.toFixed(3)} → ${card.f1_2.toFixed(3)}`]);
  if (card.error) pairs.push(["error", card.error]);
  byId("facts").replaceChildren(...pairs.map(([term, text]) => make("div", {}, make("dt", { text: term }), make("dd", { text }))));
}

function classSwitches() {
  const counts = new Map();
  for (const box of card.boxes) counts.set(box[BOX.category], (counts.get(box[BOX.category]) ?? 0) + 1);
  const fieldset = byId("viewer-classes");
  fieldset.hidden = counts.size < 2;
  const switches = [...counts].sort((one, other) => other[1] - one[1]).map(([index, many]) => {
    const input = make("input", { type: "checkbox", on: { change: () => {
      if (input.checked) state.shown.hiddenClasses.delete(index); else state.shown.hiddenClasses.add(index);
      redraw();
    } } });
    input.checked = !state.shown.hiddenClasses.has(index);
    return make("label", { className: "switch" }, input, make("span", { text: className(index) }), make("small", { text: String(many) }));
  });
  fieldset.replaceChildren(fieldset.querySelector("legend"), ...switches);
}

function redraw() {
  if (!viewer.open || !card) return;
  for (const one of stages) {
    one.inner.style.width = `${zoom * 100}%`;
    one.inner.style.height = `${zoom * 100}%`;
    draw(one.svg, card, { sides: one.sides, isSecond: one.isSecond, scale: scaleOf(one), onPoint: point });
  }
  sideSwitches(byId("viewer-sides"), () => tell("boxes"));
  byId("viewer-score").value = state.shown.score;
  byId("viewer-score-value").textContent = state.shown.score.toFixed(2);
  const shown = card.boxes.map((box, index) => [box, index]).filter(([box]) => isShown(box, null));
  const items = shown.slice(0, MOST_LISTED).map(([box, index]) => {
    const entry = make("button", { className: "entry", "data-number": index, on: {
      pointerenter: () => point(index), pointerleave: () => point(null), focus: () => point(index), blur: () => point(null),
    } }, make("i", { className: `swatch ${kindOf(box)}` }), make("span", { text: nameOf(box) }), make("small", { text: detailOf(box) }),
      ...answersOf(box).map(([title, text]) => make("small", { className: "answer" }, `${title} `, make("b", { text }))));
    return make("li", {}, entry);
  });
  if (shown.length > MOST_LISTED) items.push(make("li", { className: "faint", text: `and ${many(shown.length - MOST_LISTED, "other")}` }));
  if (!shown.length) items.push(make("li", { className: "faint", text: card.boxes.length ? "All boxes are switched off." : "This image has no boxes." }));
  byId("box-list").replaceChildren(...items);
}

/* Image pixels per screen pixel. */
function scaleOf(one) {
  const room = one.inner.getBoundingClientRect();
  return Math.max(card.width / Math.max(room.width, 1), card.height / Math.max(room.height, 1));
}

function point(index) {
  if (index === pointed) return;
  pointed = index;
  for (const one of stages) {
    one.svg.querySelector("text.pointed")?.remove();
    for (const rect of one.svg.querySelectorAll(".box")) rect.classList.toggle("pointed", Number(rect.dataset.number) === index);
    if (index !== null && one.svg.querySelector(".box.pointed") && !one.svg.querySelector("text")) {
      const text = label(card.boxes[index], card, scaleOf(one));
      text.classList.add("pointed");
      one.svg.append(text);
    }
  }
  for (const entry of byId("box-list").querySelectorAll(".entry")) entry.classList.toggle("pointed", Number(entry.dataset.number) === index);
}

function setZoom(value) {
  const [{ stage }] = stages;
  const centre = [(stage.scrollLeft + stage.clientWidth / 2) / stage.scrollWidth, (stage.scrollTop + stage.clientHeight / 2) / stage.scrollHeight];
  zoom = Math.max(1, Math.min(12, value));
  redraw();
  stage.scrollLeft = centre[0] * stage.scrollWidth - stage.clientWidth / 2;
  stage.scrollTop = centre[1] * stage.scrollHeight - stage.clientHeight / 2;
}

async function toggle() {
  await grid.toggle(number);
  card.selected = grid.cardAt(number)?.selected ?? card.selected;
  byId("viewer-selected").checked = card.selected;
}

export function pressed(key) {
  const actions = {
    ArrowRight: () => open(number + 1), ArrowLeft: () => open(number - 1), j: () => open(number + 1), k: () => open(number - 1),
    x: toggle, "+": () => setZoom(zoom * 1.5), "=": () => setZoom(zoom * 1.5), "-": () => setZoom(zoom / 1.5), 0: () => setZoom(1),
  };
  if (!(key in actions)) return false;
  actions[key]();
  return true;
}

export function start() {
  byId("previous").addEventListener("click", () => open(number - 1));
  byId("next").addEventListener("click", () => open(number + 1));
  byId("close").addEventListener("click", () => viewer.close());
  byId("viewer-selected").addEventListener("change", toggle);
  viewer.addEventListener("close", () => { state.shown.hiddenClasses.clear(); card = null; tell("boxes"); grid.focus(number); });
  byId("viewer-score").addEventListener("input", () => { state.shown.score = Number(byId("viewer-score").value); tell("boxes"); });
  new ResizeObserver(() => redraw()).observe(byId("stages"));
  on("boxes", redraw);
}
