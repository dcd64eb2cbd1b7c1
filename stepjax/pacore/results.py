"""A batch run's result files: a row of results.jsonl for each outcome, and their sums in summary.json.

Rows use the field names of the released batch code's output and of the released training data, so results can be the
problems of another run. Rows and summary do not depend on time, on the order in which calls ended, or on caches, except
that an answer whose comparison takes too long is not judged. Durations are in timing.json.

The accuracy is the mean over problems of the mean over their samples (mean@n); failed answers count as wrong. With one
sample per problem its 95 % interval is Wilson's. Several samples of a problem are not independent, so the interval is
then the normal one over the problems' means and needs two problems. Answers that could not be compared with the ground
truth are counted separately, neither right nor wrong.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from stepjax.figures import NORMAL_QUANTILE, human_number, wilson_interval
from stepjax.pacore.compaction import CUT_MARK
from stepjax.pacore.problems import without_bytes
from stepjax.pacore.records import Outcome, Totals, Trajectory


def row(outcome: Outcome) -> dict[str, Any]:
    problem, rounds, totals = outcome.problem, outcome.rounds, outcome.totals
    has_failed, tool_calls = outcome.chosen is None, outcome.rollout.tool_calls
    return {
        "id": problem.id,
        "conversation": [without_bytes(message) for message in problem.messages],
        **({"tools": list(problem.tools)} if problem.tools else {}),
        "ground_truth": problem.ground_truth,
        "responses": [message.text for message in rounds[0].messages] if rounds else [],
        "sample": outcome.sample,
        "final_response": None if has_failed else outcome.content,
        "final_reasoning_content": outcome.rollout.reasoning,
        **({"final_tool_calls": list(tool_calls)} if tool_calls else {}),
        "answered_by": outcome.answered_by,
        "chosen": outcome.chosen and list(outcome.chosen),
        "correct": outcome.correct,
        **({"unjudged": True} if _is_unjudged(outcome) else {}),
        "round_responses": [[_response(each) for each in round_.trajectories] for round_ in rounds],
        "references": _references(outcome),
        "usage": {**_usage(totals), "finish_reasons": dict(sorted(totals.finish_reasons.items()))},
        "losses": [dict(sorted(round_.losses.items())) for round_ in rounds],
        "cut_references": [round_.cut_references for round_ in rounds],
        "cut_answers": [round_.cut_answers for round_ in rounds],
        "error": outcome.error,
        **({"extra": dict(problem.extra)} if problem.extra else {}),
    }


def _usage(totals: Totals) -> dict[str, int]:
    return {
        "calls": totals.calls,
        "failed_tries": totals.retries,
        "prompt_tokens": totals.prompt_tokens,
        "output_tokens": totals.output_tokens,
        "lost_tokens": totals.lost_tokens,
    }


def _is_unjudged(outcome: Outcome) -> bool:
    return outcome.problem.ground_truth is not None and outcome.correct is None


def _references(outcome: Outcome) -> list[list[list[list[int | None]]]]:
    """The references in each round's prompts: one list for all calls, or one for each. An item is a message's index
    and, if it was shortened for this prompt, the number of characters of its end that are left.
    """
    made, sources = [], outcome.problem.given
    for round_ in outcome.rounds:
        whole = {message.index: message.text for message in sources}
        made.append([
            [
                [each.index, None if whole.get(each.index) == each.text else len(each.text) - len(CUT_MARK)]
                for each in references
            ]
            for references in round_.own_references or (round_.references,)
        ])  # fmt: skip
        sources = round_.messages
    return made


def _response(trajectory: Trajectory) -> dict[str, Any]:
    rollout = trajectory.rollout
    return {
        "content": rollout.content,
        "reasoning_content": rollout.reasoning,
        **({"tool_calls": list(rollout.tool_calls)} if rollout.tool_calls else {}),
        "finish_reason": trajectory.finish_reason,
        "status": trajectory.status,
        "error": trajectory.error,
        "seed": rollout.seed,
        "prompt_tokens": rollout.num_prompt_tokens,
        "output_tokens": rollout.num_tokens,
        "lost_tokens": trajectory.lost_tokens,
        "failed_tries": len(trajectory.attempts),
        "mean_logprob": rollout.mean_logprob,
    }


class Tally:
    """Sums over outcomes, added one at a time."""

    def __init__(self):
        self._sums: Counter[str] = Counter()
        self._answered_by: Counter[str] = Counter()
        self._finish_reasons: Counter[str] = Counter()
        self._by_problem: dict[str, list[bool]] = defaultdict(list)
        self._by_sample: dict[int, list[bool]] = defaultdict(list)
        # For each round: sums, losses, and the seconds of each problem.
        self._rounds: list[tuple[Counter[str], Counter[str], list[float]]] = []

    def add(self, outcome: Outcome) -> None:
        totals = outcome.totals
        states = {"failed": outcome.chosen is None, "unjudged": _is_unjudged(outcome)}
        self._sums.update(answers=1, **states, **_usage(totals))
        self._finish_reasons.update(totals.finish_reasons)
        if outcome.answered_by is not None:
            self._answered_by[outcome.answered_by] += 1
        if outcome.correct is not None:
            self._by_problem[outcome.problem.id].append(outcome.correct)
            self._by_sample[outcome.sample].append(outcome.correct)
        for number, made in enumerate(outcome.rounds):
            if number == len(self._rounds):
                self._rounds.append((Counter(), Counter(), []))
            sums, losses, seconds = self._rounds[number]
            sums.update(
                calls=made.width,
                output_tokens=made.totals.output_tokens,
                cut_references=made.cut_references,
                cut_answers=made.cut_answers,
                prompt_tokens=made.totals.prompt_tokens,
                shared_prompt_tokens=made.totals.shared_tokens,
            )
            losses.update(made.losses)
            rollouts = [each.rollout for each in made.trajectories]
            seconds.append(max(each.start + each.seconds for each in rollouts) - min(each.start for each in rollouts))

    def summary(self, *, method: str, num_problems: int, samples: int, matching: str) -> dict[str, Any]:
        """The content of summary.json."""
        sums, count = self._sums, self._sums["answers"]
        summed = ("calls", "output_tokens", "cut_references", "cut_answers")
        return {
            "method": method,
            "problems": num_problems,
            "samples": samples,
            "answers": count,
            "is_complete": count == num_problems * samples,
            **{name: sums[name] for name in ("failed", "unjudged")},
            "matching": matching,
            **self._accuracy(),
            **{name: sums[name] for name in _usage(Totals())},
            "output_tokens_per_answer": sums["output_tokens"] / count if count else None,
            "prompt_tokens_per_answer": sums["prompt_tokens"] / count if count else None,
            "answered_by": dict(sorted(self._answered_by.items())),
            "finish_reasons": dict(sorted(self._finish_reasons.items())),
            "rounds": [  # a problem that ended early lacks the later ones
                {"round": i, **{name: sums[name] for name in summed}, "losses": dict(sorted(losses.items()))}
                for i, (sums, losses, _) in enumerate(self._rounds, start=1)
            ],
        }

    def timing(self, seconds: float) -> dict[str, Any]:
        """The content of timing.json.

        Args:
            seconds: the run's duration, over all its restarts.
        """
        calls, tokens = self._sums["calls"], self._sums["output_tokens"]
        return {
            "seconds": seconds,
            "drawn_calls": calls,
            "drawn_tokens": tokens,
            "drawn_tokens_per_second": tokens / seconds if seconds else None,
            "answers_per_hour": 3600 * self._sums["answers"] / seconds if seconds else None,
            "rounds": [
                {
                    "round": i,
                    "mean_seconds": statistics.fmean(latencies),
                    "median_seconds": statistics.median(latencies),
                    "longest_seconds": max(latencies),
                    # Per problem.
                    "tokens_per_second": sums["output_tokens"] / sum(latencies) if sum(latencies) else None,
                    "prompt_tokens": sums["prompt_tokens"],
                    "shared_prompt_tokens": sums["shared_prompt_tokens"],  # computed once for several calls
                }
                for i, (sums, _, latencies) in enumerate(self._rounds, start=1)
            ],
        }

    def _accuracy(self) -> dict[str, Any]:
        if not self._by_problem:
            return {"scored_problems": 0, "accuracy": None, "interval": None, "interval_by": None, "by_sample": []}
        means = [sum(each) / len(each) for each in self._by_problem.values()]
        accuracy, interval, by = statistics.fmean(means), None, None
        if max(map(len, self._by_problem.values())) == 1:
            interval, by = wilson_interval(round(sum(means)), len(means)), "Wilson"
        elif len(means) > 1:
            radius = NORMAL_QUANTILE * statistics.stdev(means) / math.sqrt(len(means))
            interval, by = (max(0.0, accuracy - radius), min(1.0, accuracy + radius)), "normal, over problems' means"
        return {
            "scored_problems": len(means),
            "accuracy": accuracy,
            "interval": interval,
            "interval_by": by,
            "by_sample": [sum(each) / len(each) for _, each in sorted(self._by_sample.items())],
        }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a text table."""
    lines = {"method": summary["method"], "answers": f"{summary['answers']} of {summary['problems']} problems"}
    if summary["samples"] > 1:
        lines["answers"] += f" x {summary['samples']} samples"
    if summary["failed"]:
        lines["failed"] = f"{summary['failed']} (counted as wrong if the answer is known)"
    if summary["unjudged"]:
        lines["not judged"] = f"{summary['unjudged']} (neither right nor wrong; see the log for their known answers)"
    if summary["accuracy"] is not None:
        name = "accuracy" if summary["samples"] == 1 else f"mean@{summary['samples']}"
        lines[name] = f"{100 * summary['accuracy']:.1f} % of {summary['scored_problems']}"
        if summary["interval"] is not None:
            low, high = summary["interval"]
            lines[name] += f" (95 %: {100 * low:.1f} to {100 * high:.1f}; {summary['interval_by']})"
    lines["answered by"] = _counts(summary["answered_by"])
    lines["calls"] = str(summary["calls"])
    if summary["failed_tries"]:
        lines["calls"] += f", and {summary['failed_tries']} failed attempts"
    for name, tokens in (("TTC", "output_tokens"), ("prompts", "prompt_tokens")):
        lines[name] = f"{_number(summary[tokens])} tokens"
        if summary["answers"]:
            lines[name] += f", {human_number(summary[f'{tokens}_per_answer'])} per answer"
    if summary["lost_tokens"]:
        lines["lost"] = f"{_number(summary['lost_tokens'])} tokens, in failed attempts"
    lines["ended by"] = _counts(summary["finish_reasons"])
    for each in summary["rounds"]:
        cuts = {name: each[name] for name in ("cut_references", "cut_answers") if each[name]}
        line = f"{each['calls']} calls, {_number(each['output_tokens'])} tokens"
        lines[f"round {each['round']}"] = line + (
            f"; lost or cut: {_counts({**each['losses'], **cuts})}" if each["losses"] or cuts else ""
        )
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _number(count: int) -> str:
    return str(count) if count < 1000 else human_number(count)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()) or "none"
