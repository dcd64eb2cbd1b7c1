"""How long a batch run took: timing.json, apart from the results, which know no time."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepjax.pacore.journal import write_json
from stepjax.pacore.records import Round, Totals

TIMING = "timing.json"


class Timing:
    """Collects it. A run that was taken up again counts what its earlier processes took, up to what they last saved."""

    def __init__(self, directory: Path):
        self._path = directory / TIMING
        try:
            before = json.loads(self._path.read_text(encoding="utf-8"))
            self._before = (float(before["seconds"]), int(before["drawn_tokens"]), int(before["drawn_calls"]))
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or nothing that matters
            self._before = (0.0, 0, 0)
        self._begin = time.monotonic()
        self._tokens = self._calls = self._answers = 0
        self._rounds: dict[int, list[tuple[float, Totals]]] = {}

    def drew(self, tokens: int) -> None:
        """A trajectory of this process."""
        self._calls += 1
        self._tokens += tokens

    def answered(self, rounds: Sequence[Round]) -> None:
        self._answers += 1
        for each in rounds:
            begin = min(trajectory.start for trajectory in each.trajectories)
            end = max(trajectory.start + trajectory.seconds for trajectory in each.trajectories)
            self._rounds.setdefault(each.number, []).append((end - begin, each.totals))

    def save(self) -> None:
        before, tokens, calls = self._before
        seconds = before + time.monotonic() - self._begin
        tokens += self._tokens
        write_json(
            self._path,
            {
                "seconds": seconds,
                "drawn_calls": calls + self._calls,
                "drawn_tokens": tokens,
                "drawn_tokens_per_second": tokens / seconds if seconds else None,
                "answers_per_hour": 3600 * self._answers / seconds if seconds else None,
                "rounds": [{"round": number + 1, **_round(each)} for number, each in sorted(self._rounds.items())],
            },
        )


def _round(rounds: Sequence[tuple[float, Totals]]) -> dict[str, Any]:
    latencies = sorted(latency for latency, _ in rounds)
    output = sum(totals.output_tokens for _, totals in rounds)
    prompts, shared = (sum(getattr(t, name) for _, t in rounds) for name in ("prompt_tokens", "shared_tokens"))
    return {
        "mean_seconds": statistics.fmean(latencies),
        "median_seconds": statistics.median(latencies),
        "longest_seconds": latencies[-1],
        "tokens_per_second": output / sum(latencies) if sum(latencies) else None,  # of one problem
        "prompt_tokens": prompts,
        "shared_prompt_tokens": shared,  # computed once for several calls
    }
