/* What all parts of the page share: the answers of the server, the filter, and which boxes are drawn. */
export const BOX = { side: 0, category: 1, score: 2, size: 3, outcome: 4, second: 5, error: 6, detected: 7, x: 8, y: 9, w: 10, h: 11, answers: 12, hit: 13 };
export const SIDE = { labels: 0, first: 1, second: 2, suspects: 3 };
export const state = {
  about: null,
  filter: {},
  sort: "id",
  total: 0,
  selected: 0,
  names: new Map(),
  shown: { sides: new Set(), score: 0, onlyHits: false, none: false, hiddenClasses: new Set() },
};

export const byId = (id) => document.getElementById(id);
export const count = (value) => value.toLocaleString("en-US");
export const many = (value, one, several = one + "s") => `${count(value)} ${value === 1 ? one : several}`;
export const className = (index) => state.names.get(index) ?? (index < 0 ? "–" : `class ${index}`);

/* Make an element; texts are text, never HTML. */
export function make(tag, options = {}, ...children) {
  const { text, className: names, on, ...attributes } = options;
  const element = document.createElement(tag);
  if (names) element.className = names;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const [name, handler] of Object.entries(on ?? {})) element.addEventListener(name, handler);
  element.append(...children);
  return element;
}

export function say(text) { byId("message").textContent = text; }

let numPending = 0;
function wait(change) {
  numPending += change;
  byId("scroller").setAttribute("aria-busy", String(numPending > 0));
}

export async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  wait(1);
  try {
    const response = await fetch(path, options);
    answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
  } catch (error) {
    say(error instanceof TypeError ? "The server does not answer; raydet browse may have ended." : error.message);
    throw error;
  } finally {
    wait(-1);
  }
  for (const [index, name] of Object.entries(answer.names ?? {})) state.names.set(Number(index), name);
  return answer;
}

/* Parts of the page subscribe to changes: "filter" (what is found), "boxes" (what is drawn), "selection". */
const listeners = new Map();
export function on(what, listener) { listeners.set(what, [...(listeners.get(what) ?? []), listener]); }
export function tell(what) { for (const listener of listeners.get(what) ?? []) listener(); }

export function change(part) {
  Object.assign(state.filter, part);
  for (const [name, value] of Object.entries(state.filter)) {
    if (value === null || value === "" || value === "all" || (Array.isArray(value) && !value.length)) delete state.filter[name];
  }
  remember();
  tell("filter");
}

export function toggled(values, value) {
  const all = values ?? [];
  return all.includes(value) ? all.filter((one) => one !== value) : [...all, value];
}

/* The filter is kept in the address, so that reloading keeps it. */
export function remember() {
  const content = JSON.stringify({ filter: state.filter, sort: state.sort });
  history.replaceState(null, "", `/#${encodeURIComponent(content)}`);
}
export function recall() {
  try {
    const { filter, sort } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    if (filter && typeof filter === "object") state.filter = filter;
    if (state.about.sorts.some((one) => one.key === sort)) state.sort = sort;
  } catch { /* an address without a filter */ }
}

export async function select(body) {
  const answer = await ask("/api/select", body);
  state.selected = answer.selected;
  tell("selection");
}
