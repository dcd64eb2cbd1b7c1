// DOM helpers of both pages. Text from models, problems and files becomes textContent, never HTML.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "click") element.addEventListener("click", value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(Boolean));
  return element;
}

export const whole = (number) => number.toLocaleString("en");
export const plural = (number, word) => `${whole(number)} ${word}${number === 1 ? "" : "s"}`;

export function short(number) {
  if (number < 1000) return String(number);
  return number < 1e6 ? `${(number / 1e3).toFixed(number < 1e4 ? 1 : 0)}k` : `${(number / 1e6).toFixed(2)}M`;
}

export function time(seconds) {
  if (seconds === null) return "?";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const total = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(total / 3600), Math.floor((total % 3600) / 60), total % 60];
  if (total < 100 && total !== 60) return `${total} s`;
  if (hours) return minutes ? `${hours} h ${minutes} min` : `${hours} h`;
  return rest ? `${minutes} min ${rest} s` : `${minutes} min`;
}

export const quiet = (text, tag = "span") => make(tag, { class: "quiet", text });
export const pill = (kind, text) => make("span", { class: `pill ${kind}`, text });

// Renders a list of [name, value] without the empty values.
export const facts = (list) =>
  make("dl", { class: "facts" }, list.filter(([, value]) => value !== null && value !== undefined && value !== "").map(
    ([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value })),
  ));

// Rendered when first opened, since reasoning is long.
export function folded(title, content, attributes = {}) {
  const details = make("details", attributes, make("summary", { text: title }));
  details.addEventListener("toggle", () => details.open && details.children.length === 1 && details.append(content()));
  return details;
}

// Makes a scrolling region reachable by keyboard.
export function scrolling(element) {
  element.classList.add("scrolling");
  element.tabIndex = 0;
  return element;
}

export const toolCalls = (calls) =>
  calls.map(({ name, arguments: given }) =>
    make("div", { class: "call" }, make("strong", { text: `calls ${name}` }), make("pre", { text: given })));
