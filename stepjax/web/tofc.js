// What devices send of images, at the rates of several runs, and what the model answers. Its data: stepjax/evaluation/coded_page.py.

import { facts, folded, make, pill, quiet, whole } from "./elements.js";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { stops, pictures } = data;
const hasBase = stops.at(-1).codec === null;
const SHADES = { clusters: "clusters", experts: "experts", bits: "bits a feature", none: "nothing" };
const OTHERS = { right: "the stop to the right", left: "the stop to the left" };
if (hasBase) OTHERS.base = "the image itself";

let picture = 0;
let stop = 0;

// Parts that stay.

const slider = make("input", {
  type: "range", id: "rate", min: 0, max: stops.length - 1, step: 1, value: 0, "aria-label": "Stop of lambda",
});
const ticks = stops.map((_, index) => make("button", { type: "button", class: "tick-of", click: () => go(index) }));
const menu = (id, options) => make("select", { id },
  Object.entries(options).map(([value, text]) => make("option", { value, text })));
const shade = menu("shade", SHADES);
const against = menu("against", OTHERS);
const tip = make("div", { id: "tip", role: "tooltip", hidden: true });
const thumbnails = pictures.map(({ name, image }, index) => make("button",
  { type: "button", class: "thumbnail", title: name, "aria-label": name, click: () => choose(index) },
  make("img", { src: image, alt: "" })));

$("top").append(
  make("h1", { text: data.title }),
  quiet("Drag lambda, or use the arrow keys. The further left, the fewer bytes a device spends on the image.", "p"),
  make("div", { class: "thumbnails", role: "group", "aria-label": "Images" }, thumbnails));
$("main").append(
  make("div", { class: "rate panel", "--stops": stops.length }, slider, make("div", { class: "ticks" }, ticks)),
  make("div", { class: "halves" },
    make("section", { id: "pictures", "aria-label": "What the device sends" }),
    make("section", { id: "said", "aria-label": "Answers" })));
document.body.append(tip);
if (stops.length < 2) slider.disabled = true;
if (hasBase) against.value = "base";

slider.addEventListener("input", () => go(Number(slider.value)));
shade.addEventListener("change", () => drawPictures());
against.addEventListener("change", () => drawAnswers());
addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select, #rate")) return;
  event.preventDefault();
  go(stop + step);
});

function go(index) {
  stop = Math.min(Math.max(index, 0), stops.length - 1);
  refresh();
}

function choose(index) {
  picture = index;
  refresh();
}

function refresh() {
  slider.value = stop;
  slider.setAttribute("aria-valuetext", titleOf(stop));
  thumbnails.forEach((each, index) => each.setAttribute("aria-pressed", index === picture));
  ticks.forEach((each, index) => {
    const scored = pictures.flatMap(({ shown }) => shown[index].answers).filter(({ right }) => right !== null);
    const right = scored.filter((answer) => answer.right).length;
    each.setAttribute("aria-pressed", index === stop);
    each.setAttribute("aria-label", titleOf(index));
    each.title = stops[index].name;
    each.replaceChildren(
      make("strong", { text: lambdaOf(index) }),
      make("span", { text: bytes(pictures[picture].shown[index].bytes) + (stops[index].codec === null ? ", PNG" : "") }),
      scored.length ? quiet(`${right} of ${scored.length} right`) : "");
  });
  drawPictures();
  drawAnswers();
}

const lambdaOf = (index) => (stops[index].codec === null ? "the image" : `\u03bb ${stops[index].rate_weight}`);
const titleOf = (index) => `${lambdaOf(index)}, ${bytes(pictures[picture].shown[index].bytes)}`;
const bytes = (count) => (count < 1e5 ? `${whole(count)} bytes`
  : count < 1e6 ? `${Math.round(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`);

// The image, with its clusters.

function drawPictures() {
  const { name, width, height, sizes, shown } = pictures[picture];
  const { views, bytes: size } = shown[stop];
  tip.hidden = true;
  const crops = views ? views.slice(0, -1) : [];
  const global = views ? views.slice(-1) : [];
  $("pictures").replaceChildren(
    make("div", { class: "over" },
      crops.length ? figure(crops, `The image in ${crops.length} crop${crops.length > 1 ? "s" : ""}`, "large") : null,
      crops.length ? figure(global, "The global view", "small")
        : figure(global, views ? "The image, one global view" : "The image itself", "large")),
    views && make("div", { class: "choice" }, make("label", {}, quiet("Tint shows "), shade)),
    scale(views ? size : null, sizes),
    numbers(views),
    quiet(`${name}, ${width} x ${height} pixels. ${views ? `Run ${stops[stop].name}, codec ${stops[stop].codec}.`
      : `Run ${stops[stop].name}, which has no codec.`}`, "p"));
}

function numbers(views) {
  if (!views) return null;
  const sent = views.flatMap((each) => each.bits);
  const all = views.reduce((total, each) => total + each.clusters.length, 0);
  const experts = new Set(views.flatMap((each) => each.experts));
  const bits = sent.reduce((total, each) => total + each, 0) / sent.length;
  return facts([
    ["features sent", `${whole(sent.length)} of ${whole(all)}`],
    ["bits a feature", bits.toFixed(1)],
    ["bits a value", (bits / stops[stop].channels).toFixed(2)],
    ["experts used", `${experts.size} of ${stops[stop].experts}`],
  ]);
}

// The bytes of the frame and of image codecs, drawn to scale.
function scale(frame, sizes) {
  const rows = frame === null ? sizes : [["what the device sends", frame], ...sizes];
  const most = Math.max(...rows.map(([, size]) => size));
  return make("dl", { class: "scale" }, rows.map(([name, size], index) => make("div", {},
    make("dt", { text: name }),
    make("dd", {}, make(frame !== null && !index ? "strong" : "span", { text: bytes(size) }),
      frame !== null && index ? quiet(` ${times(size / frame)}`) : null),
    make("dd", { class: "length", "--share": size / most })))); // the last, so that a narrow page can put it below
}

const times = (ratio) => `${ratio < 9.95 ? ratio.toFixed(1) : whole(Math.round(ratio))} times`;

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat());
  return element;
}

function figure(views, caption, kind) {
  const { image, width, height } = pictures[picture];
  // Crops may reach beyond the image; what is there is black.
  const right = Math.max(width, ...views.map(({ box: [x, , across] }) => x + across));
  const bottom = Math.max(height, ...views.map(({ box: [, y, , down] }) => y + down));
  const svg = draw("svg", { viewBox: `0 0 ${right} ${bottom}`, role: "img", "aria-label": caption },
    draw("rect", { width: right, height: bottom, class: "beyond" }),
    draw("image", { href: image, width, height, preserveAspectRatio: "none", class: width > 512 ? "" : "pixels" }),
    views.map((each, index) => view(each, index, (kind === "large" ? 0.012 : 0.04) * Math.max(right, bottom))));
  return make("figure", { class: kind, "--aspect": right / bottom }, svg, quiet(caption, "figcaption"));
}

function view({ box: [left, top, across, down], side, clusters, centres, experts, bits }, index, most) {
  const [width, height] = [across / side, down / side];
  const at = (cell) => [left + (cell % side) * width, top + Math.floor(cell / side) * height];
  const cells = centres.map(() => []);
  clusters.forEach((cluster, cell) => cells[cluster]?.push(cell));
  const mostBits = Math.max(...pictures[picture].shown.flatMap(({ views }) => (views ?? []).flatMap((each) => each.bits)));
  const group = draw("g", { class: `view ${shade.value}` });
  if (shade.value !== "none") {
    cells.forEach((own, cluster) => {
      const hue = shade.value === "clusters" ? cluster * 137.508 + index * 47 : experts[cluster] * 137.508 + 20;
      const path = draw("path", {
        d: own.map((cell) => `M${at(cell)}h${width}v${height}h${-width}z`).join(""),
        fill: shade.value === "bits" ? "#d1495b" : `hsl(${(hue % 360).toFixed(1)} 85% 50%)`,
        "fill-opacity": shade.value === "bits" ? (0.85 * bits[cluster] / mostBits).toFixed(3) : 0.32,
        class: "cluster",
      });
      path.addEventListener("pointermove", (event) => tell(event, [
        `Cluster ${cluster + 1} of ${centres.length}`,
        `${own.length} of ${clusters.length} features`,
        `expert ${experts[cluster] + 1}`,
        `${bits[cluster].toFixed(1)} bits`,
      ]));
      path.addEventListener("pointerleave", () => { tip.hidden = true; });
      group.append(path);
    });
    const edges = clusters.map((cluster, cell) => {
      const [x, y] = at(cell);
      const isLast = cell % side === side - 1;
      return (isLast || clusters[cell + 1] === cluster ? "" : `M${x + width} ${y}v${height}`)
        + (cell + side >= clusters.length || clusters[cell + side] === cluster ? "" : `M${x} ${y + height}h${width}`);
    }).join("");
    group.append(draw("path", { d: edges, class: "edge" }));
    group.append(draw("rect", { x: left, y: top, width: across, height: down, class: "frame" }));
    for (const centre of centres.filter((each) => each !== null)) {
      const [x, y] = at(centre);
      const radius = Math.min(0.16 * width, 0.16 * height, most);
      group.append(draw("circle", { cx: x + width / 2, cy: y + height / 2, r: radius, class: "centre" }));
    }
  }
  return group;
}

function tell(event, lines) {
  tip.hidden = false;
  tip.replaceChildren(...lines.map((text, index) => make(index ? "span" : "strong", { text })));
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const y = event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18;
  tip.style.left = `${Math.max(x, 4)}px`;
  tip.style.top = `${Math.max(y, 4)}px`;
}

// The answers, with what changed.

function otherStop() {
  const other = { right: stop + 1, left: stop - 1, base: stops.length - 1 }[against.value];
  return other >= 0 && other < stops.length && other !== stop ? other : null;
}

function drawAnswers() {
  const { questions, shown } = pictures[picture];
  const other = otherStop();
  const cards = questions.map(({ text, truth }, index) => {
    const answer = shown[stop].answers[index];
    const before = other === null ? null : shown[other].answers[index];
    const parts = before === null ? [["same", answer.text]] : compared(before.text, answer.text);
    const kind = answer.right === null ? "" : answer.right ? "right" : "wrong";
    return make("article", { class: `panel question ${kind}` },
      make("h2", { class: "text", text: text.trim() }),
      make("p", { class: "text answer-of" }, answer.text ? parts.map(([how, part]) =>
        make(how === "same" ? "span" : how === "new" ? "ins" : "del", { text: part })) : quiet("(no answer)")),
      make("p", { class: "notes" },
        kind && pill(kind, kind),
        answer.cut && pill("cut", "cut off"),
        before && pill("", before.text === answer.text ? "same" : "changed"),
        truth !== null && quiet(`right: ${truth}`)),
      answer.thought && folded("Reasoning", () => make("p", { class: "text", text: answer.thought }), { class: "reasoning" }),
      overview(shown, index));
  });
  $("said").replaceChildren(
    make("div", { class: "choice" }, make("label", {}, quiet("Compared with "), against),
      other === null ? quiet(" there is none here") : quiet(` ${titleOf(other)}`)),
    ...cards);
}

// One mark a stop: right or wrong, else whether the answer is that of the last stop.
function overview(shown, index) {
  const last = shown.at(-1).answers[index].text;
  return make("div", { class: "marks", role: "group", "aria-label": "This answer at every stop" }, shown.map((each, at) => {
    const { text, right } = each.answers[index];
    const [kind, mark] = right === null
      ? text === last ? ["even", "="] : ["odd", "\u2260"]
      : right ? ["right", "\u2713"] : ["wrong", "\u2717"];
    return make("button", {
      type: "button", class: `mark ${kind}`, title: `${titleOf(at)}: ${text.slice(0, 200)}`, text: mark,
      "aria-label": `${titleOf(at)}: ${kind}`, "aria-pressed": String(at === stop), click: () => go(at),
    });
  }));
}

// The parts of two texts, in order: "same", "new" (only in the second) and "old" (only in the first).
function compared(old, now) {
  const [a, b] = [old, now].map((text) => text.match(/\s*(?:\p{N}|[\p{L}\p{M}]+|\S)|\s+$/gu) ?? []);
  if (a.length * b.length > 4e6) return old === now ? [["same", now]] : [["new", now]];
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const parts = [];
  const add = (how, text) => (parts.at(-1)?.[0] === how ? (parts.at(-1)[1] += text) : parts.push([how, text]));
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { add("same", b[j]); i++; j++; }
    else if (i < a.length && (j === b.length || length[i + 1][j] >= length[i][j + 1])) add("old", a[i++]);
    else add("new", b[j++]);
  }
  return parts;
}

refresh();
