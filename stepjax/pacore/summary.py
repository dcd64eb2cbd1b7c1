"""What a batch run came to: accuracy, test-time compute, and everything that was lost on the way.

The accuracy is the mean over problems of the mean over their samples (mean@n); an answer that failed is a wrong one.
Its 95 % interval is Wilson's for one sample a problem. For several, which are not independent of each other, it is the
normal one over the problems' means, and says nothing of fewer than two problems. An answer that could not be compared
with the known one is counted apart, and neither right nor wrong.
"""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stepjax.figures import NORMAL_QUANTILE, human_number, wilson_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Of a row, what the summary is made of; see `results.row`."""

    place: int  # of the problem
    sample: int
    correct: bool | None
    is_failed: bool
    answered_by: str | None
    usage: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]  # width, output_tokens, losses, cut_references, cut_answers of each
    is_unjudged: bool = False

    @classmethod
    def of(cls, place: int, row: Mapping[str, Any]) -> "Figures":
        cuts = zip(row["losses"], row["cut_references"], row["cut_answers"], row["round_responses"], strict=True)
        return cls(
            place=place,
            sample=row["sample"],
            correct=row["correct"],
            is_unjudged=row.get("unjudged", False),
            is_failed=row["error"] is not None,
            answered_by=row["answered_by"],
            usage=row["usage"],
            rounds=tuple(
                {
                    "calls": len(responses),
                    "output_tokens": sum(each["output_tokens"] for each in responses),
                    "losses": losses,
                    "cut_references": references,
                    "cut_answers": answers,
                }
                for losses, references, answers, responses in cuts
            ),
        )


def summarise(
    figures: Iterable[Figures], *, method: str, num_problems: int, samples: int, matching: str
) -> dict[str, Any]:
    """The content of summary.json."""
    rows = sorted(figures, key=lambda each: (each.place, each.sample))
    output = sum(each.usage["output_tokens"] for each in rows)
    prompts = sum(each.usage["prompt_tokens"] for each in rows)
    return {
        "method": method,
        "problems": num_problems,
        "samples": samples,
        "answers": len(rows),
        "is_complete": len(rows) == num_problems * samples,
        "failed": sum(each.is_failed for each in rows),
        "unjudged": sum(each.is_unjudged for each in rows),
        "matching": matching,
        **_accuracy(rows),
        "calls": sum(each.usage["calls"] for each in rows),
        "failed_tries": sum(each.usage["failed_tries"] for each in rows),
        "output_tokens": output,
        "output_tokens_per_answer": output / len(rows) if rows else None,
        "prompt_tokens": prompts,
        "prompt_tokens_per_answer": prompts / len(rows) if rows else None,
        "lost_tokens": sum(each.usage["lost_tokens"] for each in rows),
        "answered_by": _sorted(Counter(each.answered_by for each in rows if each.answered_by)),
        "finish_reasons": _sum(each.usage["finish_reasons"] for each in rows),
        "rounds": _rounds(rows),
    }


def _accuracy(rows: Sequence[Figures]) -> dict[str, Any]:
    scored: dict[int, list[bool]] = {}
    by_sample: dict[int, list[bool]] = {}
    for each in rows:
        if each.correct is not None:
            scored.setdefault(each.place, []).append(each.correct)
            by_sample.setdefault(each.sample, []).append(each.correct)
    if not scored:
        return {"scored_problems": 0, "accuracy": None, "interval": None, "interval_by": None, "by_sample": []}
    means = [sum(each) / len(each) for each in scored.values()]
    accuracy, interval, by = statistics.fmean(means), None, None
    if max(map(len, scored.values())) == 1:
        interval, by = wilson_interval(round(sum(means)), len(means)), "Wilson"
    elif len(means) > 1:
        radius = NORMAL_QUANTILE * statistics.stdev(means) / math.sqrt(len(means))
        interval, by = (max(0.0, accuracy - radius), min(1.0, accuracy + radius)), "normal, over problems' means"
    return {
        "scored_problems": len(means),
        "accuracy": accuracy,
        "interval": interval,
        "interval_by": by,
        "by_sample": [sum(each) / len(each) for _, each in sorted(by_sample.items())],
    }


def _rounds(rows: Sequence[Figures]) -> list[dict[str, Any]]:
    """By the round's number; a problem that ended early has none of the later ones."""
    made = []
    for number in range(max((len(each.rounds) for each in rows), default=0)):
        there = [each.rounds[number] for each in rows if len(each.rounds) > number]
        sums = {name: sum(each[name] for each in there) for name in _SUMMED}
        made.append({"round": number + 1, **sums, "losses": _sum(each["losses"] for each in there)})
    return made


_SUMMED = ("calls", "output_tokens", "cut_references", "cut_answers")


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return _sorted(total)


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def table(summary: Mapping[str, Any]) -> str:
    """For reading."""
    answers = f"{summary['answers']} of {summary['problems']} problems"
    if summary["samples"] > 1:
        answers += f" x {summary['samples']} samples"
    lines = [("method", summary["method"]), ("answers", answers)]
    if summary["failed"]:
        lines.append(("failed", f"{summary['failed']} (counted as wrong where the answer is known)"))
    if summary["unjudged"]:
        lines.append(
            ("not judged", f"{summary['unjudged']} (neither right nor wrong; the log names the known answers)")
        )
    if summary["accuracy"] is not None:
        name = "accuracy" if summary["samples"] == 1 else f"mean@{summary['samples']}"
        lines.append((name, _percent(summary)))
    lines += [
        ("answered by", _counts(summary["answered_by"])),
        (
            "calls",
            f"{summary['calls']}"
            + (f", and {summary['failed_tries']} tries that failed" if summary["failed_tries"] else ""),
        ),
        ("TTC", _tokens(summary["output_tokens"], summary["output_tokens_per_answer"])),
        ("prompts", _tokens(summary["prompt_tokens"], summary["prompt_tokens_per_answer"])),
    ]
    if summary["lost_tokens"]:
        lines.append(("lost", f"{_number(summary['lost_tokens'])} tokens, of tries that failed"))
    lines.append(("ended by", _counts(summary["finish_reasons"])))
    for each in summary["rounds"]:
        losses = {**each["losses"]} | {
            name.replace("_", " "): each[name] for name in ("cut_references", "cut_answers") if each[name]
        }
        lost = f"; lost or cut: {_counts(losses)}" if losses else ""
        lines.append(
            (f"round {each['round']}", f"{each['calls']} calls, {_number(each['output_tokens'])} tokens{lost}")
        )
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def _percent(summary: Mapping[str, Any]) -> str:
    shown = f"{100 * summary['accuracy']:.1f} % of {summary['scored_problems']}"
    if summary["interval"] is None:
        return shown
    low, high = summary["interval"]
    return f"{shown} (95 %: {100 * low:.1f} to {100 * high:.1f}; {summary['interval_by']})"


def _tokens(total: int, mean: float | None) -> str:
    return f"{_number(total)} tokens" + ("" if mean is None else f", {human_number(mean)} an answer")


def _number(count: int) -> str:
    return str(count) if count < 1000 else human_number(count)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()) or "none"
