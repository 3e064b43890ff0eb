/* Filters, with counts and histograms that follow them. */
import { errorName } from "./boxes.js";
import { ask, byId, change, className, count, make, many, on, state, toggled } from "./state.js";

const facets = byId("facets");
const numberAsText = (value) => value.toFixed(2).replace(/\.?0+$/, "") || "0";
const FEW = 8; // values that need no search
let generation = 0;
let answer = null;
let classText = "";
let classTimer = null;
const answerTexts = new Map(); // of the chosen answers, for the chips
const open = new Set(["classes", "scores", "sides", "outcomes", "errors", "sizes"]);

const TITLES = {
  sides: "Kind of box", classes: "Class", scores: "Score", sizes: "Size", outcomes: "Outcome",
  second_outcomes: "Labels, second run", errors: "Error",
};
const SIZE_WORDS = { small: "small, below 32² px", medium: "medium, below 96² px", large: "large" };

function valueName(facet, value) {
  const about = state.about;
  if (facet === "sides") return about.sides.find((side) => side.index === value)?.name ?? about.outcomes[value];
  if (facet === "classes") return className(value);
  if (facet === "sizes") return SIZE_WORDS[about.sizes[value]];
  if (facet === "errors") return value ? errorName(value) : "no error";
  return about.outcomes[value];
}

export async function refresh() {
  const own = ++generation;
  byId("counts").classList.add("waiting");
  let found;
  try { found = await ask("/api/facets", state.filter); } catch { return; }
  if (own !== generation) return;
  answer = found;
  answer.answers.forEach((values, number) => { for (const [value, , text] of values) answerTexts.set(`${number} ${value}`, text); });
  byId("counts").classList.remove("waiting");
  const whole = answer.images === state.about.numImages ? "" : ` of ${count(state.about.numImages)}`;
  byId("counts").textContent = `${count(answer.images)}${whole} ${answer.images === 1 && !whole ? "image" : "images"} · ${many(answer.boxes, "box", "boxes")}`;
  drawChosen();
  drawFacets();
}

function drawFacets() {
  const active = document.activeElement?.dataset?.key;
  const sections = [];
  const about = state.about;
  if (about.sides.length > 1) sections.push(listed("sides", answer.sides));
  if (about.numClasses) sections.push(classes());
  if (answer.scores.length || state.filter.scores) sections.push(scores());
  for (const facet of ["outcomes", "second_outcomes", "errors", "sizes"]) {
    const pairs = answer[facet];
    const isTelling = pairs.some(([value]) => value !== 0) || facet === "sizes";
    if (pairs.length && (isTelling || state.filter[facet])) sections.push(listed(facet, pairs));
  }
  about.answers.forEach((column, number) => sections.push(answers(column, number, answer.answers[number])));
  about.groups.forEach((group, number) => sections.push(grouped(group, number, answer.groups[number])));
  facets.replaceChildren(...sections);
  if (active) facets.querySelector(`[data-key="${CSS.escape(active)}"]`)?.focus();
}

function section(key, title, ...content) {
  const details = make("details", { open: open.has(key) }, make("summary", { text: title, "data-key": `summary ${key}` }), ...content);
  details.addEventListener("toggle", () => { if (details.open) open.add(key); else open.delete(key); });
  return details;
}

function row(key, name, number, most, isChosen, click) {
  const bar = make("i", { className: "bar" });
  bar.style.width = `${Math.max(number / most, number ? 0.01 : 0) * 100}%`;
  return make("button", { className: "row", "aria-pressed": String(isChosen), "data-key": key, title: name, on: { click } },
    bar, make("span", { className: "name", text: name }), make("span", { className: "number", text: count(number) }));
}

function rows(facet, pairs) {
  const chosen = state.filter[facet] ?? [];
  const known = new Map(pairs);
  for (const value of chosen) if (!known.has(value)) known.set(value, 0);
  const most = Math.max(1, ...known.values());
  return [...known].map(([value, number]) =>
    row(`${facet} ${value}`, valueName(facet, value), number, most, chosen.includes(value), () => change({ [facet]: toggled(chosen, value) })));
}

const listed = (facet, pairs) => section(facet, TITLES[facet], make("div", { className: "rows" }, ...rows(facet, pairs)));

function classes() {
  const list = make("div", { className: "rows tall" }, ...rows("classes", answer.classes));
  const parts = [list];
  if (state.about.numClasses > FEW) {
    const search = make("input", { type: "search", placeholder: `Find one of ${count(state.about.numClasses)} classes`, "aria-label": "Find a class", maxlength: 200, value: classText, "data-key": "find class", spellcheck: "false" });
    search.addEventListener("input", () => {
      classText = search.value;
      clearTimeout(classTimer);
      classTimer = setTimeout(() => findClasses(list), 150);
    });
    parts.unshift(search);
    if (classText) findClasses(list);
  }
  return section("classes", TITLES.classes, ...parts);
}

async function findClasses(list) {
  if (!classText.trim()) { list.replaceChildren(...rows("classes", answer.classes)); return; }
  const text = classText;
  const found = await ask(`/api/classes?text=${encodeURIComponent(text)}`);
  if (text !== classText) return;
  const known = new Map(answer.classes);
  const chosen = state.filter.classes ?? [];
  const most = Math.max(1, ...known.values());
  list.replaceChildren(...found.classes.map((value) => {
    const number = known.get(value);
    const button = row(`classes ${value}`, className(value), number ?? 0, most, chosen.includes(value), () => change({ classes: toggled(chosen, value) }));
    if (number === undefined) button.querySelector(".number").textContent = "";
    return button;
  }));
  if (!found.classes.length) list.append(make("p", { className: "faint", text: "No class has this name." }));
}

function scores() {
  const bins = state.about.scoreBins;
  const known = new Map(answer.scores);
  const most = Math.max(1, ...known.values());
  const [low, high] = state.filter.scores ?? [0, 1];
  const chart = make("div", { className: "histogram", role: "group", "aria-label": "Boxes by score" });
  for (let bin = 0; bin < bins; bin += 1) {
    const [from, to] = [bin / bins, (bin + 1) / bins];
    const number = known.get(bin) ?? 0;
    const text = `${from.toFixed(2)} to ${to.toFixed(2)}: ${many(number, "box", "boxes")}`;
    const inside = to > low + 1e-9 && from < high - 1e-9;
    const button = make("button", { title: text, "aria-label": text, "data-key": `score ${bin}`, className: inside ? "inside" : "", on: { click: () => change({ scores: [from, to] }) } });
    const bar = make("i");
    bar.style.height = `${number ? Math.max(2, (number / most) * 100) : 0}%`;
    button.append(bar);
    chart.append(button);
  }
  const field = (name, value, use) => {
    const input = make("input", { type: "number", min: 0, max: 1, step: 0.01, value: numberAsText(value), "data-key": `score ${name}` });
    input.addEventListener("change", () => use(Math.max(0, Math.min(1, Number(input.value) || 0))));
    return make("label", { className: "field" }, name, input);
  };
  const set = (from, to) => change({ scores: from <= 0 && to >= 1 ? null : [Math.min(from, to), Math.max(from, to)] });
  const parts = [chart, make("div", { className: "pair" }, field("from", low, (value) => set(value, high)), field("to", high, (value) => set(low, value)))];
  const thresholds = [...new Set(state.about.thresholds.filter((value) => value !== null).map(numberAsText))];
  if (thresholds.length) parts.push(make("p", { className: "faint", text: `Judged from a score of ${thresholds.join(" and ")}, at IoU 0.5.` }));
  return section("scores", TITLES.scores, ...parts);
}

function grouped(group, number, pairs) {
  const chosen = (state.filter.groups ?? []).filter(([one]) => one === number).map(([, value]) => value);
  const others = (state.filter.groups ?? []).filter(([one]) => one !== number);
  const known = new Map(pairs);
  const most = Math.max(1, ...known.values());
  const list = group.values.map((name, value) =>
    row(`group ${number} ${value}`, name, known.get(value) ?? 0, most, chosen.includes(value), () =>
      change({ groups: [...others, ...toggled(chosen, value).map((one) => [number, one])] })));
  return section(`group ${number}`, `${group.name.replaceAll("_", " ")} (images)`, make("div", { className: "rows tall" }, ...list));
}

function answers({ title, areNumbers, numValues }, number, found) {
  const own = (state.filter.answers ?? []).filter(([one]) => one === number).map(([, value]) => value);
  const others = (state.filter.answers ?? []).filter(([one]) => one !== number);
  const most = Math.max(1, ...found.map(([, boxes]) => boxes));
  const sorted = areNumbers ? found.toSorted(([one], [other]) => one - other) : found;
  const list = sorted.map(([value, boxes, text]) => row(`answer ${number} ${value}`, text, boxes, most, own.includes(value), () =>
    change({ answers: [...others, ...toggled(own, value).map((one) => [number, one])] })));
  if (!list.length) list.push(make("p", { className: "faint", text: "No box found has an answer." }));
  const key = `answer ${number}`;
  const content = make("div", { className: "rows tall" }, ...list);
  const texts = state.filter.answer_texts ?? [];
  const isLong = !areNumbers && numValues > FEW;
  if (!isLong && !texts.some(([one]) => one === number)) return section(key, title, content);
  const search = make("input", { type: "search", placeholder: "Answer contains", "aria-label": `Answer to ${title} contains`, maxlength: 200, value: texts.find(([one]) => one === number)?.[1] ?? "", "data-key": `answer text ${number}`, spellcheck: "false" });
  search.addEventListener("change", () => {
    const rest = texts.filter(([one]) => one !== number);
    const text = search.value.trim();
    change({ answer_texts: text ? [...rest, [number, text]] : rest });
  });
  return section(key, title, search, content);
}

function drawChosen() {
  const chips = [];
  const chip = (text, part) => chips.push(make("button", { className: "chip", title: "Remove", on: { click: () => change(part) } }, make("span", { text }), make("b", { text: "×", "aria-hidden": "true" })));
  for (const facet of ["sides", "classes", "sizes", "outcomes", "second_outcomes", "errors"]) {
    const values = state.filter[facet] ?? [];
    for (const value of values) chip(valueName(facet, value), { [facet]: toggled(values, value) });
  }
  if (state.filter.scores) chip(`score ${state.filter.scores.map(numberAsText).join(" to ")}`, { scores: null });
  for (const [number, value] of state.filter.answers ?? []) {
    chip(`${state.about.answers[number].title}: ${answerTexts.get(`${number} ${value}`)}`, { answers: state.filter.answers.filter((one) => one[0] !== number || one[1] !== value) });
  }
  for (const [number, text] of state.filter.answer_texts ?? []) chip(`${state.about.answers[number].title}: “${text}”`, { answer_texts: state.filter.answer_texts.filter((one) => one[0] !== number) });
  for (const [number, value] of state.filter.groups ?? []) {
    const group = state.about.groups[number];
    if (group) chip(`${group.name}: ${group.values[value]}`, { groups: state.filter.groups.filter((one) => one[0] !== number || one[1] !== value) });
  }
  if (state.filter.text) chip(`“${state.filter.text}”`, { text: "" });
  if (state.filter.images) chip(state.filter.images, { images: null });
  if (chips.length > 1) chips.push(make("button", { className: "chip clear", text: "Clear all", on: { click: clear } }));
  byId("chosen").replaceChildren(...chips);
  if (document.activeElement !== byId("text")) byId("text").value = state.filter.text ?? "";
  byId("images").value = state.filter.images ?? "all";
}

function clear() {
  for (const name of Object.keys(state.filter)) delete state.filter[name];
  change({});
}

export function start() {
  state.about.answers.forEach((_, number) => open.add(`answer ${number}`));
  const kinds = [["all", "all"], ["without boxes", "without boxes"], ["selected", "selected"]];
  if (state.about.hasErrors) kinds.splice(2, 0, ["unreadable", "not readable"]);
  byId("images").append(...kinds.map(([value, text]) => make("option", { value, text })));
  byId("images").addEventListener("change", () => change({ images: byId("images").value }));
  let timer = null;
  byId("text").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => change({ text: byId("text").value.trim() }), 250);
  });
  on("filter", refresh);
}
