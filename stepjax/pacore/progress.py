"""How a batch run is doing: one line that is refreshed on a terminal, a line now and then elsewhere.

12/100 answers  61.5% right  160 calls under way  1.21M tok  3.4k tok/s  lost 2 error, 1 truncated  eta 12m
"""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import TextIO

from stepjax.figures import human_number, human_time
from stepjax.pacore.events import Event, RoundEnded, RoundStarted, TrajectoryEnded
from stepjax.pacore.journal import Job

_LIVE_SECONDS, _LOG_SECONDS = 0.5, 30.0


class Progress:
    def __init__(self, total: int, stream: TextIO | None = None):
        """
        Args:
            total: how many answers there will be.
        """
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self.seconds = _LIVE_SECONDS if self._live else _LOG_SECONDS  # between two lines
        self._begin = time.monotonic()
        self._under_way: dict[Job, int] = {}
        self._losses: Counter[str] = Counter()
        self._answers = self._drawn_answers = self._right = self._scored = self._failed = 0
        self._drawn_tokens = self._earlier_tokens = 0  # by this process, and by those before it
        self._told: dict[Job, int] = {}  # tokens that this process has drawn for the round that is under way
        self._has_line = False

    def notify(self, job: Job, event: Event, known: int = 0) -> None:
        """
        Args:
            known: of a round that starts, how many trajectories are known already.
        """
        if isinstance(event, RoundStarted):
            self._under_way[job] = event.width - known
            self._told[job] = 0
        elif isinstance(event, TrajectoryEnded):
            self._under_way[job] -= 1
            self._drawn_tokens += event.trajectory.output_tokens
            self._told[job] += event.trajectory.output_tokens
        elif isinstance(event, RoundEnded):
            self._under_way.pop(job, None)
            self._losses.update(event.round.losses)
            self._earlier_tokens += event.round.totals.output_tokens - self._told.pop(job)

    def answered(self, job: Job, correct: bool | None, *, is_failed: bool, is_new: bool) -> None:
        """
        Args:
            is_new: it took calls of this process.
        """
        self._under_way.pop(job, None)
        self._told.pop(job, None)
        self._answers += 1
        self._drawn_answers += is_new
        self._failed += is_failed
        self._scored += correct is not None
        self._right += bool(correct)

    def tick(self) -> None:
        line = self.line()
        if self._live:
            columns = shutil.get_terminal_size((120, 24)).columns - 1
            self._stream.write("\r\x1b[2K" + line[:columns])  # to the first column, erase the line
            self._has_line = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line."""
        if self._has_line:
            self._stream.write("\n")
            self._stream.flush()
            self._has_line = False

    def line(self) -> str:
        seconds = time.monotonic() - self._begin
        fields = [f"{self._answers}/{self._total} answers"]
        if self._scored:
            fields.append(f"{100 * self._right / self._scored:.1f}% right")
        fields.append(f"{sum(self._under_way.values())} calls under way")
        fields.append(f"{human_number(self._drawn_tokens + self._earlier_tokens)} tok")
        if seconds > 0:
            fields.append(f"{human_number(self._drawn_tokens / seconds)} tok/s")
        losses: Mapping[str, int] = self._losses
        if losses:
            fields.append("lost " + ", ".join(f"{count} {name}" for name, count in sorted(losses.items())))
        if self._failed:
            fields.append(f"failed {self._failed}")
        if self._drawn_answers and self._answers < self._total:
            left = (self._total - self._answers) * seconds / self._drawn_answers
            fields.append(f"eta {human_time(left)}")
        return "  ".join(fields)
