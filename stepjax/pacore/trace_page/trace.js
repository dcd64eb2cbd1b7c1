// Lays out the data of a trace, from the header to the last round.

function header() {
  const totals = trace.totals;
  const verdict = trace.correct === true ? pill("right", "right") : trace.correct === false ? pill("wrong", "wrong") : pill("", "not judged");
  const links = [["answer", trace.error ? "Error" : "Answer"], ["problem", "Problem"]];
  if (trace.rounds.length) links.push(["timeline", "Timeline"]);
  for (const round of trace.rounds) links.push([`round${round.number}`, roundName(round.number)]);
  return [
    make("div", { class: "title" },
      make("h1", { text: trace.title }),
      trace.error ? pill("wrong", "failed") : verdict,
    ),
    facts([
      ["problem", trace.title.includes(trace.id) ? null : trace.id],
      ["sample", trace.sample ? String(trace.sample) : null],
      ["schedule", `[${trace.rounds.filter((round) => !round.is_final).map((round) => round.trajectories.length).join(", ")}]`
        + (trace.rounds.some((round) => round.is_final) ? " + 1" : "")],
      ["answered by", ANSWERED_BY[trace.answered_by] ?? trace.answered_by],
      ["answer is of", trace.chosen && trace.rounds[trace.chosen[0]] ? nameOf(...trace.chosen) : null],
      ["calls", whole(totals.calls)],
      ["tries that failed", whole(totals.retries)],
      ["output tokens (TTC)", whole(totals.output_tokens)],
      ["lost tokens", whole(totals.lost_tokens)],
      ["prompt tokens", whole(totals.prompt_tokens)],
      ["of them shared", whole(totals.shared_tokens)],
      ["time", time(trace.seconds)],
      ["time of all calls", time(totals.seconds)],
      ["ended by", counted(totals.finish_reasons)],
    ]),
    ...trace.notes.map((text) => make("p", { class: "warning", text })),
    make("nav", { "aria-label": "Parts of the page" }, links.map(([id, text]) => make("a", { href: `#${id}`, text }))),
  ];
}

function answer() {
  if (trace.error) return section("answer", "No answer", make("p", { class: "error text", text: trace.error }));
  const made = trace.answer;
  const message = made.message.length ? textOf(made.message, ...trace.chosen) : made.tool_calls.length ? null : make("p", { class: "quiet", text: "empty" });
  return section("answer", "Answer",
    make("div", { class: "panel" },
      message,
      callsOf(made.tool_calls),
      made.finish_reason === "length" ? make("p", { class: "warning", text: "It is cut off: no tokens were left." }) : null,
      thoughtOf(made, ...trace.chosen),
    ),
    trace.problem.ground_truth !== null ? make("p", { class: "truth" }, make("span", { class: "quiet", text: "Should be " }), make("span", { class: "text", text: trace.problem.ground_truth })) : null,
  );
}

function problem() {
  const { messages, tools, extra } = trace.problem;
  const items = (message) => message.items.map((item) => {
    if (item.image) return make("img", { src: item.image, alt: item.name, title: item.name });
    return item.note ? make("p", { class: "quiet text", text: item.note }) : make("div", { class: "text", text: item.text });
  });
  return section("problem", "Problem",
    messages.map((message) => make("article", { class: "panel message" }, make("h3", { class: "role", text: message.role }), items(message), callsOf(message.tool_calls))),
    tools.length ? make("p", { class: "quiet", text: `Tools: ${tools.join(", ")}` }) : null,
    Object.keys(extra).length ? folded("Other fields of the record", () => facts(Object.entries(extra)), { class: "more" }) : null,
  );
}

// Rounds.

function references(round) {
  const { number } = round;
  if (!round.references.length) return make("p", { class: "quiet no-references", text: "Its prompt is the problem itself, without references." });
  const marks = { shortened: "shortened to its end", tail: "end of a thought" };
  const items = round.references.map((reference) => {
    const source = reference.index;
    return make("li", { id: sourceId(number, source), class: "reference", tabindex: "-1" },
      citation(labelOf(number, source), number, source),
      round.has_own_references ? null : make("span", { class: "quiet", text: `\u2190 ${sourceName(number, source)}` }),
      reference.state !== "whole" ? pill("cut", marks[reference.state]) : null,
      make("span", { class: "quiet", text: reference.cited_by ? `cited by ${whole(reference.cited_by)}` : "not cited" }),
      folded("Text", () => scrolling(make("div", { class: "text", text: reference.text }))),
    );
  });
  const dropped = round.left_out.map((index) =>
    make("li", { class: "reference dropped" }, make("strong", { text: sourceName(number, index) }), pill("lost", "left out: did not fit the prompt")));
  return make("details", { class: "references", open: true },
    make("summary", {}, make("h3", { text: `${round.has_own_references ? "References, each call has some of them" : "References in the order of the prompt"} (${whole(round.references.length)})` })),
    make("ol", {}, items, dropped));
}

function matrix(round) {
  const cited = round.trajectories.filter((each) => Object.keys(each.citations).length);
  if (!cited.length || round.references.length < 2) return null;
  const { number } = round;
  const most = Math.max(...cited.flatMap((each) => Object.values(each.citations).map(([message, thought]) => message + thought)));
  const head = round.references.map(({ index: source }, i) =>
    make("th", { scope: "col", "data-cites": `${number}-${source}` },
      citation(round.has_own_references ? labelOf(number, source) : String(i + 1), number, source, { "aria-label": labelOf(number, source) })));
  const cell = (each, source) => {
    const label = each.references.indexOf(source) + 1;
    const [message, thought] = each.citations[label] ?? [0, 0];
    const count = message + thought;
    const made = make("td", {
      "data-cites": `${number}-${source}`, class: count ? "some" : null, text: count ? String(count) : label ? "\u00b7" : "",
      title: label
        ? `${nameOf(number, each.index)} cites reference ${label}: ${message} times in its message, ${thought} in its thought`
        : `${nameOf(number, each.index)} has not seen ${sourceName(number, source)}`,
    });
    if (count) made.style.setProperty("--heat", `${Math.round(15 + (60 * count) / most)}%`);
    return made;
  };
  const rows = round.trajectories.map((each) => make("tr", {},
    make("th", { scope: "row" }, make("a", { href: `#${cardId(number, each.index)}`, text: nameOf(number, each.index) })),
    round.references.map(({ index: source }) => cell(each, source))));
  return make("details", { class: "matrix", open: true },
    make("summary", {}, make("h3", { text: "Citations, in messages and thoughts" })),
    scrolling(make("div", { class: "wide", role: "region", "aria-label": "Citations" },
      make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "cites" }), head)), make("tbody", {}, rows)))));
}

// Which references of the next round a trajectory became.
function becomes(number, index) {
  const next = trace.rounds[number + 1];
  if (!next?.references.some((each) => each.index === index)) return null;
  const round = roundName(number + 1).toLowerCase();
  if (!next.has_own_references) {
    return make("p", { class: "cites" }, make("span", { class: "quiet", text: "is " }), citation(labelOf(number + 1, index), number + 1, index),
      make("span", { class: "quiet", text: ` of ${round}` }));
  }
  const seen = next.trajectories.filter((each) => each.references.includes(index)).map((each) => nameOf(number + 1, each.index));
  return make("p", { class: "cites" }, make("span", { class: "quiet", text: "seen by " }), citation(seen.join(", "), number + 1, index));
}

function card(round, each) {
  const { number } = round;
  const name = nameOf(number, each.index);
  const cites = Object.entries(each.citations);
  const line = [plural(each.output_tokens, "token"), time(each.seconds), speed(each), each.finish_reason];
  const attempts = each.attempts.map((attempt) =>
    make("li", { class: "text", text: `${STATES[attempt.status] ?? attempt.status} after ${time(attempt.seconds)}${attempt.output_tokens ? `, ${plural(attempt.output_tokens, "token")} lost` : ""}: ${attempt.error}` }));
  const dropped = trace.rounds[number + 1]?.left_out.includes(each.index);
  return make("article", { id: cardId(number, each.index), class: `card ${LOST.has(each.state) ? "lost" : each.state}`, tabindex: "-1", "aria-label": `Trajectory ${name}` },
    make("header", {},
      make("h4", { text: name }),
      isChosen(number, each.index) ? pill("chosen", "the answer") : null,
      each.state === "ok" ? null : pill(LOST.has(each.state) ? "lost" : "cut", STATES[each.state]),
      each.correct === true ? pill("right", "right") : each.correct === false ? pill("wrong", "wrong") : null,
      each.answer ? make("span", { class: "short", text: each.answer, title: "the answer found in the message" }) : null,
    ),
    make("p", { class: "quiet", text: line.filter(Boolean).join(" \u00b7 ") }),
    each.error ? make("p", { class: "error text", text: each.error }) : null,
    each.message.length ? scrolling(textOf(each.message, number, each.index)) : null,
    callsOf(each.tool_calls),
    each.passed_on ? make("div", { class: "passed" }, make("p", { class: "quiet", text: "Passed on, the end of its thought:" }), scrolling(make("div", { class: "text", text: each.passed_on }))) : null,
    thoughtOf(each, number, each.index),
    round.has_own_references ? make("p", { class: "cites" }, make("span", { class: "quiet", text: "sees " }), each.references.map((source, i) =>
      citation(`${i + 1} \u2190 ${sourceName(number, source)}`, number, source))) : null,
    cites.length ? make("p", { class: "cites" }, make("span", { class: "quiet", text: "cites " }), cites.map(([label, [message, thought]]) =>
      citation(`${label}${message + thought > 1 ? ` \u00d7${message + thought}` : ""}`, number, sourceOf(number, each.index, Number(label)),
        { "aria-label": `Reference ${label}, ${message} times in the message, ${thought} in the thought` }))) : null,
    becomes(number, each.index),
    dropped ? make("p", { class: "quiet", text: `left out of ${roundName(number + 1).toLowerCase()}: did not fit the prompt` }) : null,
    attempts.length ? make("details", { class: "more" }, make("summary", { text: plural(attempts.length, "failed try").replace("trys", "tries") }), make("ul", {}, attempts)) : null,
    folded("Details", () => facts([
      ["in the records", `round ${number}, index ${each.index}`],
      ["seed", String(each.seed)],
      ["start", time(each.start)],
      ["prompt tokens", whole(each.prompt_tokens)],
      ["of them shared", whole(each.cached_tokens)],
      ["mean log-probability", each.mean_logprob === null ? null : each.mean_logprob.toFixed(3)],
    ]), { class: "more" }),
  );
}

function roundOf(round) {
  const { did_not_fit: dropped, ...losses } = round.losses;
  const lost = Object.keys(losses).length ? `Lost: ${counted(losses, STATES)}.` : "";
  const cut = [
    dropped ? `${plural(dropped, "reference")} left out: did not fit the prompt` : null,
    round.cut_references ? `${plural(round.cut_references, "reference")} shortened to fit the prompt` : null,
    round.cut_answers ? `${plural(round.cut_answers, "answer")} cut off by the limit of tokens, passed on all the same` : null,
  ].filter(Boolean).join("; ");
  const totals = round.totals;
  const said = [
    plural(round.trajectories.length, "call"), `${whole(totals.output_tokens)} output tokens`,
    `${whole(totals.prompt_tokens)} prompt tokens, ${whole(totals.shared_tokens)} of them shared`,
    totals.retries ? plural(totals.retries, "failed try").replace("trys", "tries") : null,
    totals.lost_tokens ? `${whole(totals.lost_tokens)} tokens lost with them` : null,
    `ended by ${counted(totals.finish_reasons)}`,
  ].filter(Boolean).join(" \u00b7 ");
  return section(`round${round.number}`, roundName(round.number),
    make("p", { class: "quiet", text: said }),
    lost || cut ? make("p", { class: "warning", text: [lost, cut && `${cut}.`].filter(Boolean).join(" ") }) : null,
    round.answers.length > 1 || (round.answers.length && round.trajectories.length > 1)
      ? make("ul", { class: "answers", "aria-label": "Answers" }, round.answers.map(([text, count]) => make("li", {}, make("span", { class: "text", text }), make("strong", { text: `\u00d7${count}` }))))
      : null,
    references(round),
    matrix(round),
    make("div", { class: `cards ${round.trajectories.length === 1 ? "one" : ""}` }, round.trajectories.map((each) => card(round, each))),
  );
}

document.getElementById("top").append(...header().filter(Boolean));
document.getElementById("main").append(
  answer(),
  problem(),
  ...(trace.rounds.length ? [timeline()] : []),
  ...trace.rounds.map(roundOf),
);
if (!trace.has_thoughts) document.getElementById("main").append(make("p", { class: "quiet", text: "This page was made without the chains of thought." }));
// Long messages are cut short until asked for. First all are measured, then changed.
const long = [...document.querySelectorAll(".card > .scrolling")].filter((text) => text.scrollHeight > text.clientHeight + 40);
for (const text of long) {
  const button = make("button", { type: "button", class: "more-text", text: "Show all", "aria-expanded": "false", click: () => {
    const isOpen = text.classList.toggle("open");
    button.textContent = isOpen ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(isOpen));
  } });
  text.after(button);
}
// What the address names was not there when the page was read.
if (location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
