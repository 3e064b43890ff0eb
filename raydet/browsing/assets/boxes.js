/* Boxes of an image as SVG over its picture, and how each is coloured and named. */
import { BOX, SIDE, className, make, state } from "./state.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_NAMED = 12;
const LONGEST_LABEL = 48;
const LEAST_LABEL = 12;
const CHARACTER = 0.63; // width of an average one, in font sizes

/* Labels are found or missed by the first run, or by the second where that is drawn. */
export function kindOf(box, isSecond = false) {
  const place = isSecond && box[BOX.side] === SIDE.labels ? BOX.second : BOX.outcome;
  const outcome = state.about.outcomes[box[place]];
  if (box[BOX.side] === SIDE.suspects) return "suspect";
  if (outcome === "ignored") return "ignored";
  if (box[BOX.side] === SIDE.labels) return outcome === "missed" ? "missed" : "label";
  if (outcome === "false") return "false";
  if (outcome === "correct") return "correct";
  return box[BOX.side] === SIDE.second ? "other" : "detection";
}

export const LEGEND = [
  ["label", "label"], ["missed", "label that the run missed"], ["detection", "detection that is not judged"],
  ["other", "detection of the second run that is not judged"], ["correct", "correct detection"],
  ["false", "false positive"], ["suspect", "suspect label"], ["ignored", "ignored: a crowd, or inside one"],
];

const WORDS = {
  no_truth: "missing label?", not_found: "really there?", other_class: "other class?",
  class: "wrong class", location: "badly placed", both: "wrong class and place", duplicate: "duplicate",
  background: "background", missed: "missed",
};
export const errorName = (index) => WORDS[state.about.errors[index]] ?? state.about.errors[index];

export function nameOf(box) {
  const parts = [className(box[BOX.category])];
  if (box[BOX.detected] >= 0 && box[BOX.detected] !== box[BOX.category]) parts.push(`or ${className(box[BOX.detected])}?`);
  if (box[BOX.score] !== null) parts.push(box[BOX.score].toFixed(2));
  return parts.join(" ");
}

/* What a second model said about a box: pairs of a question and an answer. */
export const answersOf = (box) => state.about.answers.map(({ title }, place) => [title, box[BOX.answers][place]]).filter(([, text]) => text !== null);

export function detailOf(box) {
  const outcome = state.about.outcomes[box[BOX.outcome]];
  const second = state.about.outcomes[box[BOX.second]];
  const parts = [];
  if (outcome !== "unjudged") parts.push(outcome);
  if (second !== "unjudged") parts.push(`${second} by the second`);
  if (box[BOX.error] && state.about.errors[box[BOX.error]] !== outcome) parts.push(errorName(box[BOX.error]));
  parts.push(`${Math.round(box[BOX.w])} × ${Math.round(box[BOX.h])} px`);
  return parts.join(" · ");
}

export function isShown(box, sides) {
  const shown = state.shown;
  if (shown.none || !shown.sides.has(box[BOX.side]) || (sides && !sides.has(box[BOX.side]))) return false;
  if (shown.onlyHits && !box[BOX.hit]) return false;
  if (shown.hiddenClasses.has(box[BOX.category])) return false;
  return box[BOX.score] === null || box[BOX.score] >= shown.score;
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/* Draw the boxes that are switched on. `scale` is the number of image pixels a screen pixel shows; with it, boxes are
   named if they are few, and can be pointed at. */
export function draw(svg, card, { sides = null, isSecond = false, scale = 0, onPoint = null } = {}) {
  svg.replaceChildren();
  if (!card.width || !card.height) return;
  svg.setAttribute("viewBox", `0 0 ${card.width} ${card.height}`);
  const boxes = card.boxes.map((box, number) => [box, number]).filter(([box]) => isShown(box, sides));
  const isNamed = scale > 0 && boxes.length <= MOST_NAMED;
  for (const [box, number] of boxes) {
    const place = { x: box[BOX.x], y: box[BOX.y], width: box[BOX.w], height: box[BOX.h] };
    const kind = kindOf(box, isSecond);
    svg.append(shape("rect", { ...place, class: "halo" }));
    const rect = shape("rect", { ...place, class: `box ${kind}${box[BOX.hit] ? "" : " faint"}`, "data-number": number });
    if (onPoint) {
      rect.addEventListener("pointerenter", () => onPoint(number));
      rect.addEventListener("pointerleave", () => onPoint(null));
    }
    svg.append(rect);
  }
  if (isNamed) for (const [box] of boxes) svg.append(label(box, card, scale));
}

export function label(box, card, scale) {
  const size = 14 * scale;
  const above = box[BOX.y] > size * 1.3;
  const x = Math.max(2 * scale, Math.min(box[BOX.x] + 2 * scale, card.width - 40 * scale));
  const text = shape("text", {
    x,
    y: above ? box[BOX.y] - 4 * scale : Math.max(box[BOX.y], 0) + size,
    "font-size": size, "stroke-width": 3.5 * scale, class: kindOf(box),
  });
  const name = [nameOf(box), ...answersOf(box).map(([, answer]) => answer)].join(" · ");
  const most = Math.max(LEAST_LABEL, Math.min(LONGEST_LABEL, Math.floor((card.width - x) / (size * CHARACTER))));
  text.textContent = name.length > most ? `${name.slice(0, most - 1)}…` : name;
  return text;
}

/* Switches for the kinds of boxes, as often as they are shown on the page. */
export function sideSwitches(fieldset, changed) {
  const legend = fieldset.querySelector("legend");
  fieldset.replaceChildren(legend);
  for (const side of state.about.sides) {
    const input = make("input", { type: "checkbox", "data-side": side.index, on: { change: () => {
      if (input.checked) state.shown.sides.add(side.index); else state.shown.sides.delete(side.index);
      state.shown.none = false;
      changed();
    } } });
    input.checked = state.shown.sides.has(side.index) && !state.shown.none;
    const kind = ["label", "detection", "other", "suspect"][side.index];
    fieldset.append(make("label", { className: "switch" }, input, make("i", { className: `swatch ${kind}` }), make("span", { text: side.name })));
  }
}
