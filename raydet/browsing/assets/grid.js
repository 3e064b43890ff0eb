/* The grid of thumbnails: only what is on the screen has elements, and only the pages around it are asked for. */
import { draw } from "./boxes.js";
import { SIDE, ask, byId, count, make, many, on, select, state, tell } from "./state.js";

const GAP = 12;
const CAPTION = 42;
const LEAST_WIDTH = 190;
const PAGES_KEPT = 40;
const ROWS_BEYOND = 2;

const grid = byId("grid");
const scroller = byId("scroller");
const cells = new Map(); // number in the order → element
let pages = new Map(); // number of the page → its cards, or a promise
let generation = 0;
let columns = 1;
let width = LEAST_WIDTH;
let focused = 0;
let isAwaited = false; // the focused card is to get the focus when it is loaded

export const numShown = () => Math.min(state.total, state.about.mostInOrder);
export const request = (start, number) => ({ filter: state.filter, sort: state.sort, start, count: number });

export function cardAt(number) {
  const page = pages.get(Math.floor(number / state.about.pageSize));
  return Array.isArray(page) ? page[number % state.about.pageSize] : undefined;
}

async function load(page) {
  if (pages.has(page)) return;
  const own = generation;
  pages.set(page, null);
  let answer;
  try {
    answer = await ask("/api/page", request(page * state.about.pageSize, state.about.pageSize));
  } catch { if (own === generation) pages.delete(page); return; }
  if (own !== generation) return;
  pages.set(page, answer.images);
  while (pages.size > PAGES_KEPT) pages.delete(pages.keys().next().value);
  if (page === 0 || answer.total !== state.total) {
    state.total = answer.total;
    measure();
  }
  render();
}

export function reset() {
  generation += 1;
  pages = new Map();
  for (const cell of cells.values()) cell.remove();
  cells.clear();
  focused = 0;
  scroller.scrollTop = 0;
  load(0);
}

const rowHeight = () => Math.round(width * 0.75) + CAPTION + GAP;

function measure() {
  const room = grid.clientWidth;
  columns = Math.max(2, Math.floor((room + GAP) / (LEAST_WIDTH + GAP)));
  width = (room - GAP * (columns - 1)) / columns;
  grid.style.height = `${Math.ceil(numShown() / columns) * rowHeight()}px`;
  byId("end").textContent = state.total > numShown()
    ? `These are the first ${count(numShown())} of ${count(state.total)} images; narrow the filter or change the order to see others.`
    : "";
}

export function render() {
  if (!state.about) return;
  const top = scroller.scrollTop - grid.offsetTop;
  const first = Math.max(0, Math.floor(top / rowHeight()) - ROWS_BEYOND) * columns;
  const last = Math.min(numShown(), (Math.ceil((top + scroller.clientHeight) / rowHeight()) + ROWS_BEYOND) * columns);
  for (const [number, cell] of cells) {
    if (number < first || number >= last) { cell.remove(); cells.delete(number); }
  }
  for (let number = first; number < last; number += 1) {
    const card = cardAt(number);
    let cell = cells.get(number);
    if (!cell) {
      cell = make("div", { className: "cell", role: "listitem" });
      cells.set(number, cell);
      grid.append(cell);
    }
    cell.style.width = `${width}px`;
    cell.style.height = `${rowHeight() - GAP}px`;
    cell.style.transform = `translate(${(number % columns) * (width + GAP)}px, ${Math.floor(number / columns) * rowHeight()}px)`;
    if (card && !cell.firstChild) fill(cell, card, number);
  }
  if (last > first) {
    const size = state.about.pageSize;
    for (let page = Math.floor(first / size); page <= Math.floor((last - 1) / size); page += 1) load(page);
  }
}

function fill(cell, card, number) {
  const picture = make("button", { className: "picture", tabindex: number === focused ? 0 : -1, "aria-label": `Open image ${card.image_id}${card.path ? `, ${card.path}` : ""}`, on: {
    click: () => { focused = number; tell("open"); },
    focus: () => setFocused(number),
  } });
  const image = make("img", { src: `/thumbnail/${card.image}`, alt: "", decoding: "async", on: { error: () => missing(picture, card) } });
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.append(image, svg);
  const mark = make("input", { type: "checkbox", "aria-label": `Select image ${card.image_id}`, tabindex: -1, on: { change: () => mark.checked !== card.selected && toggle(number) } });
  mark.checked = card.selected;
  cell.append(picture, make("div", { className: "caption" }, mark, caption(card)));
  cell.classList.toggle("selected", card.selected);
  draw(svg, card, drawn());
  if (isAwaited && number === focused) {
    isAwaited = false;
    picture.focus({ preventScroll: true });
  }
}

function missing(picture, card) {
  picture.querySelector("img").replaceWith(absence(card));
}

/* The place of a picture that cannot be shown, with the reason. */
export function absence(card) {
  const place = make("span", { className: "absent", text: "no picture" });
  fetch(`/thumbnail/${card.image}`).then((response) => response.json()).then((answer) => { place.textContent = answer.error; }, () => {});
  return place;
}

function caption(card) {
  const name = card.path ? card.path.split("/").pop() : `image ${card.image_id}`;
  const facts = [];
  if ("f1_2" in card && card.f1_1 !== null && card.f1_2 !== null) facts.push(`F1 ${card.f1_1.toFixed(2)} → ${card.f1_2.toFixed(2)}`);
  else if ("false_1" in card) facts.push(`${card.false_1} false`, `${card.missed_1} missed`);
  else if ("first" in card) facts.push(many(card.first, "box", "boxes"));
  else facts.push(many(card.labels, "label"));
  return make("div", { title: card.path ?? "" }, make("b", { text: name }), make("small", { text: facts.join(" · ") }));
}

/* Boxes of two runs would cover each other: the second run is drawn where the first is switched off. */
function drawn() {
  if (state.shown.sides.has(SIDE.first)) return { sides: new Set([SIDE.labels, SIDE.first, SIDE.suspects]) };
  return { isSecond: state.shown.sides.has(SIDE.second) };
}

export async function toggle(number) {
  const card = cardAt(number);
  if (!card) return;
  await select({ is_selected: !card.selected, images: [card.image] });
  card.selected = !card.selected;
  const cell = cells.get(number);
  if (cell) {
    cell.querySelector("input").checked = card.selected;
    cell.classList.toggle("selected", card.selected);
  }
}

export const focusedNumber = () => focused;
function setFocused(number) {
  cells.get(focused)?.querySelector("button")?.setAttribute("tabindex", "-1");
  focused = number;
  cells.get(number)?.querySelector("button")?.setAttribute("tabindex", "0");
}

export function focus(number, { isQuiet = false } = {}) {
  if (number < 0 || number >= numShown()) return;
  const top = grid.offsetTop + Math.floor(number / columns) * rowHeight();
  const room = byId("tools").offsetHeight;
  if (top - room < scroller.scrollTop) scroller.scrollTop = top - room - GAP;
  else if (top + rowHeight() > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + rowHeight() - scroller.clientHeight;
  render();
  setFocused(number);
  if (isQuiet) return;
  const button = cells.get(number)?.querySelector("button");
  isAwaited = !button;
  button?.focus({ preventScroll: true });
}

export function moved(key) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -focused, End: numShown() - 1 - focused };
  if (!(key in steps)) return false;
  focus(Math.max(0, Math.min(numShown() - 1, focused + steps[key])));
  return true;
}

export function start() {
  let isWaiting = false;
  scroller.addEventListener("scroll", () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => { isWaiting = false; render(); });
  }, { passive: true });
  new ResizeObserver(() => { measure(); render(); }).observe(grid);
  on("filter", reset);
  on("boxes", () => { for (const [number, cell] of cells) { const card = cardAt(number); const svg = cell.querySelector("svg"); if (card && svg) draw(svg, card, drawn()); } });
  on("reload", () => { const place = scroller.scrollTop; generation += 1; pages = new Map(); for (const cell of cells.values()) cell.replaceChildren(); render(); scroller.scrollTop = place; });
}
