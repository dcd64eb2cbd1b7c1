// Timeline: a row for each call, as wide as the whole of the problem took.

function describe(number, each) {
  const said = [`${nameOf(number, each.index)}: ${STATES[each.state]}`, plural(each.output_tokens, "token"), time(each.seconds), speed(each)];
  if (each.finish_reason) said.push(`ended by ${each.finish_reason}`);
  if (each.earlier) said.push(`${plural(each.earlier, "failed try").replace("trys", "tries")} before`);
  said.push(`from ${time(each.start)}`);
  return said.filter(Boolean).join(" \u00b7 ");
}

function timeline() {
  const calls = trace.rounds.flatMap((round) => round.trajectories);
  const end = Math.max(trace.seconds ?? 0, ...calls.map((each) => (each.start ?? 0) + (each.seconds ?? 0)), 0.001);
  const rough = end / 7;
  const power = 10 ** Math.floor(Math.log10(rough));
  const steps = rough > 30 ? [60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400] : [1, 2, 5, 10].map((each) => each * power);
  const step = steps.find((each) => each >= rough) ?? Math.ceil(rough / 3600) * 3600;
  const share = (seconds) => `${Math.max(0, (100 * seconds) / end)}%`;
  const hint = "Point at a bar, or go through them with the arrow keys; Enter shows the trajectory.";
  const readout = make("p", { id: "readout", class: "quiet", text: hint });
  const rows = [];

  function rowOf(number, each) {
    const track = make("span", { class: "track" });
    // When a failed try began is not recorded: it is drawn right before the next one.
    let before = each.start;
    for (const attempt of each.attempts.slice(0, each.earlier).reverse()) {
      const bar = make("span", { class: `bar try ${attempt.status}` });
      bar.style.left = share(before - attempt.seconds);
      bar.style.width = share(Math.min(attempt.seconds, before));
      before = Math.max(0, before - attempt.seconds);
      track.append(bar);
    }
    const bar = make("span", { class: `bar ${each.state}${isChosen(number, each.index) ? " chosen" : ""}` });
    bar.style.left = share(each.start);
    bar.style.width = share(each.seconds);
    const note = make("span", { class: "note", text: short(each.output_tokens) });
    const ends = (each.start + each.seconds) / end;
    if (ends < 0.88) note.style.left = `calc(${share(each.start + each.seconds)} + 4px)`;
    else note.classList.add("inside"), (note.style.right = `calc(${100 - 100 * ends}% + 4px)`);
    track.append(bar, note);
    const row = make("a", {
      class: "row", id: `bar-${cardId(number, each.index)}`, href: `#${cardId(number, each.index)}`, tabindex: rows.length ? "-1" : "0",
      "aria-label": describe(number, each),
    }, make("span", { class: "name", text: nameOf(number, each.index) }), track);
    const tell = () => (readout.textContent = describe(number, each));
    row.addEventListener("pointerenter", tell);
    row.addEventListener("focus", () => (tell(), focusable(row)));
    row.addEventListener("click", (event) => (event.preventDefault(), show(document.getElementById(cardId(number, each.index)))));
    rows.push(row);
    return row;
  }

  const focusable = (row) => rows.forEach((each) => each.setAttribute("tabindex", each === row ? "0" : "-1"));
  const chart = make("div", { class: `chart ${calls.length > 64 ? "dense" : ""}` },
    trace.rounds.map((round) => make("div", { class: "group", role: "group", "aria-label": roundName(round.number) },
      make("h3", {}, `${roundName(round.number)} `, make("span", { class: "quiet", text: summary(round) })),
      round.trajectories.map((each) => rowOf(round.number, each)),
    )));
  chart.style.setProperty("--step", share(step));
  chart.addEventListener("keydown", (event) => {
    const at = rows.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (at < 0 || to === undefined || !rows[to]) return;
    event.preventDefault();
    rows[to].focus();
  });
  const ticks = make("span", { class: "track" });
  for (let at = 0; at <= end * 1.0001; at += step) {
    const tick = make("span", { class: "tick", text: step >= 60 ? (at < 3600 ? `${Math.round(at / 60)} min` : `${+(at / 3600).toFixed(2)} h`) : `${+at.toPrecision(6)} s` });
    if (at / end > 0.87) tick.classList.add("last");
    tick.style.left = share(at);
    ticks.append(tick);
  }
  chart.append(make("div", { class: "row axis", "aria-hidden": "true" }, make("span", { class: "name" }), ticks));

  const present = new Set(calls.map((each) => each.state));
  const legend = make("ul", { class: "legend" },
    Object.keys(STATES).filter((state) => present.has(state)).map((state) => make("li", {}, make("span", { class: `bar ${state}` }), STATES[state])),
    calls.some((each) => each.earlier) ? make("li", {}, make("span", { class: "bar try" }), "a try that failed") : null,
    trace.chosen ? make("li", {}, make("span", { class: "bar ok chosen" }), "the answer") : null,
  );
  return section("timeline", "Timeline", legend, readout, chart,
    make("p", { class: "quiet", text: "Numbers beside bars are output tokens. A bar is the last try of a call; earlier tries stand right before it, for when they began is not recorded." }));
}

function summary(round) {
  const lost = round.trajectories.filter((each) => LOST.has(each.state)).length;
  const said = [plural(round.trajectories.length, "call"), `${short(round.totals.output_tokens)} tokens`];
  if (lost) said.push(`${whole(lost)} lost`);
  return said.join(", ");
}
