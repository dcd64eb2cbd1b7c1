"use strict";
// What the page is made of: names, numbers, texts with their citations. Whatever a model or a problem says becomes
// textContent, never HTML. The page's scripts follow one another as one: elements.js, timeline.js, trace.js.

const trace = JSON.parse(document.getElementById("data").textContent);

const STATES = {
  ok: "answered",
  cut: "answer cut off",
  tail: "end of its thought only",
  empty: "empty",
  truncated: "cut off in its thought",
  error: "error",
  timeout: "timed out",
  cancelled: "not waited for",
};
const LOST = new Set(["empty", "truncated", "error", "timeout", "cancelled"]);
const ANSWERED_BY = {
  synthesis: "synthesis",
  agreement: "agreement of a round",
  vote: "vote",
  score: "score",
  fallback: "fallback: the final call gave nothing",
};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "click") element.addEventListener("click", value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Numbers as they are read.

const whole = (number) => number.toLocaleString("en");
const plural = (number, word) => `${whole(number)} ${word}${number === 1 ? "" : "s"}`;

function short(number) {
  if (number < 1000) return String(number);
  return number < 1e6 ? `${(number / 1e3).toFixed(number < 1e4 ? 1 : 0)}k` : `${(number / 1e6).toFixed(2)}M`;
}

function time(seconds) {
  if (seconds === null) return "?";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  const all = Math.round(seconds);
  const [hours, minutes] = [Math.floor(all / 3600), Math.floor((all % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${all % 60} s`;
}

const speed = (each) => (each.seconds > 0 ? `${whole(Math.round(each.output_tokens / each.seconds))} tokens/s` : null);

// Names: rounds and trajectories count from 1, as the references in a prompt do.

function roundName(number) {
  if (!trace.rounds[number].is_final) return `Round ${number + 1}`;
  return trace.rounds.length > 1 ? "Final synthesis" : "The only call";
}

function nameOf(number, index) {
  const round = trace.rounds[number];
  if (!round.is_final) return `${number + 1}.${index + 1}`;
  return round.trajectories.length > 1 ? `final.${index + 1}` : "final";
}

const cardId = (number, index) => `t${number}-${index}`;
const isChosen = (number, index) => trace.chosen && trace.chosen[0] === number && trace.chosen[1] === index;
const byIndex = (number, index) => trace.rounds[number]?.trajectories.find((each) => each.index === index);

// A source is what a reference was made of: a trajectory of the round before, or a message that the problem came with.
// It has one label in a round, but for rounds in which each trajectory has references of its own.

const sourceName = (number, source) => (number ? nameOf(number - 1, source) : `given message ${source + 1}`);
const sourceId = (number, source) => `r${number}-${source}`;
const sourceOf = (number, index, label) => byIndex(number, index)?.references[label - 1];

function labelOf(number, source) {
  const round = trace.rounds[number];
  return round.has_own_references ? sourceName(number, source) : `Reference ${round.references.findIndex((each) => each.index === source) + 1}`;
}

// A light on a source and on all places that cite it.

let lit = null;

function light(number, source) {
  const same = lit && lit[0] === number && lit[1] === source;
  darken();
  if (same) return;
  lit = [number, source];
  const reference = document.getElementById(sourceId(number, source));
  const card = number ? document.getElementById(cardId(number - 1, source)) : null;
  const elements = [reference, card, card && document.getElementById(`bar-${card.id}`)];
  elements.push(...document.querySelectorAll(`[data-cites="${number}-${source}"]`));
  for (const element of elements) element?.classList.add("lit");
  const round = roundName(number).toLowerCase();
  const said = trace.rounds[number].has_own_references
    ? `Trajectory ${sourceName(number, source)} has labels of its own in each call of ${round}.`
    : `${labelOf(number, source)} of ${round} is ${number ? "trajectory " : ""}${sourceName(number, source)}.`;
  const panel = document.getElementById("lit");
  panel.replaceChildren(
    make("span", { text: said }),
    make("span", { class: "buttons" },
      make("button", { type: "button", text: "Show reference", click: () => show(reference) }),
      card && make("button", { type: "button", text: "Show trajectory", click: () => show(card) }),
      make("button", { type: "button", text: "Close", click: darken }),
    ),
  );
  panel.hidden = false;
}

function darken() {
  lit = null;
  for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
  document.getElementById("lit").hidden = true;
}

function show(element) {
  for (let outer = element.parentElement; outer; outer = outer.parentElement) if (outer.localName === "details") outer.open = true;
  element.scrollIntoView({ block: "center" });
  element.focus({ preventScroll: true });
}

addEventListener("keydown", (event) => event.key === "Escape" && darken());

// Texts.

function textOf(parts, number, index) {
  const element = make("div", { class: "text" });
  for (const part of parts) {
    if (typeof part === "string") element.append(part);
    else element.append(citation(part[1], number, sourceOf(number, index, part[0])));
  }
  return element;
}

const citation = (text, number, source, attributes = {}) =>
  make("button", { type: "button", class: "cite", text, "data-cites": `${number}-${source}`, click: () => light(number, source), ...attributes });

// Folded, and laid out only when it is opened: thoughts are long.
function folded(title, content, attributes = {}) {
  const details = make("details", attributes, make("summary", { text: title }));
  details.addEventListener("toggle", () => details.open && details.children.length === 1 && details.append(content()), false);
  return details;
}

// A region that scrolls by itself can be reached by keyboard.
const scrolling = (element) => (element.setAttribute("tabindex", "0"), element.classList.add("scrolling"), element);

function thoughtOf(each, number, index) {
  if (!each.thought.length) return null;
  const length = each.thought.reduce((sum, part) => sum + (typeof part === "string" ? part : part[1]).length, 0);
  return folded(`Thought, ${plural(length, "character")}`, () => scrolling(textOf(each.thought, number, index)), { class: "thought" });
}

const callsOf = (calls) =>
  calls.map((call) => make("div", { class: "call" }, make("strong", { text: `calls ${call.name}` }), make("pre", { text: call.arguments })));

const pill = (kind, text) => make("span", { class: `pill ${kind}`, text });
const facts = (list) =>
  make("dl", { class: "facts" }, list.filter(([, value]) => value !== null && value !== undefined && value !== "").map(
    ([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value })),
  ));
const section = (id, title, ...children) => make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title`, text: title }), ...children);
const counted = (counts, names = {}) =>
  Object.entries(counts).map(([name, count]) => `${whole(count)} ${names[name] ?? name.replaceAll("_", " ")}`).join(", ");
