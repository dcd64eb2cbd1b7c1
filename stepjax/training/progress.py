"""The progress line: how the run is doing, in one line of about 160 columns.

    step 1200/50000  533ms  loss 2.341 (img 2.51 txt 2.10)  grad 0.831  lr 4.98e-5  12.3k tok/s  85.1 img/s  mfu 43.1%
    wait 0.4%  pack 98/84%  ckpt 62s  eta 7h14m

(that is one line; after the step its duration, "pack" is the share of token slots and of view slots that are filled,
"ckpt" the time since the last checkpoint)

On a terminal one live line is refreshed; elsewhere (a log file, a pod's console) lines are printed at an interval.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from stepjax.figures import human_number, human_time, printable

# The metrics that are shown, in order: (keys, text of their values). A field is shown when one of its keys is present;
# the absent ones are given as None. What a key means:
#   step_seconds                              wall time of a step
#   loss, loss/image, loss/text               mean over all tokens; of rows or sources with and without images
#   grad_norm, learning_rate
#   tokens_per_second, images_per_second      over all devices
#   mfu, data_wait                            fractions of 1: of peak FLOP/s; of the time that the step waited for data
#   packing/tokens, packing/vision            fractions of 1: filled token slots of the rows, filled view slots
#   seconds_since_checkpoint
FIELDS: tuple[tuple[tuple[str, ...], Callable[..., str]], ...] = (
    (("step_seconds",), lambda seconds: human_time(seconds)),
    (("loss", "loss/image", "loss/text"), lambda loss, image, text: _losses(loss, image, text)),
    (("grad_norm",), lambda norm: f"grad {norm:.3g}"),
    (("learning_rate",), lambda rate: "lr " + f"{rate:.2e}".replace("e-0", "e-")),
    (("tokens_per_second",), lambda rate: f"{human_number(rate)} tok/s"),
    (("images_per_second",), lambda rate: f"{human_number(rate)} img/s"),
    (("mfu",), lambda fraction: f"mfu {100 * fraction:.1f}%"),
    (("data_wait",), lambda fraction: f"wait {100 * fraction:.1f}%"),
    (("packing/tokens", "packing/vision"), lambda tokens, vision: f"pack {_percentages(tokens, vision)}"),
    (("seconds_since_checkpoint",), lambda seconds: f"ckpt {human_time(seconds)}"),
)
# On a narrow terminal these go first, in this order.
EXPENDABLE = (
    "packing/tokens",
    "seconds_since_checkpoint",
    "learning_rate",
    "data_wait",
    "images_per_second",
    "grad_norm",
)


class ProgressLine:
    """Prints or refreshes the progress of a run of `total_steps`.

    `update` may be called at every step: lines are printed where the step is a multiple of `every`, and at the last.
    `print` puts a message on a line of its own without tearing the live one. `close` ends the live line.
    """

    def __init__(self, total_steps: int, *, every: int = 1, stream: TextIO | None = None):
        self._total_steps = total_steps
        self._every = every
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = ""

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`metrics` holds any of the numbers named at `FIELDS`; others are ignored."""
        fields = format_progress(step, self._total_steps, metrics)
        if self._live:
            self._show(fit(fields, shutil.get_terminal_size((120, 24)).columns - 1))
        elif step % self._every == 0 or step == self._total_steps:
            self._stream.write("  ".join(fields.values()) + "\n")
            self._stream.flush()

    def print(self, message: str) -> None:
        shown = self._shown
        if shown:
            self._show("")
        self._stream.write(printable(message) + "\n")  # it may name records
        self._stream.flush()
        if shown:
            self._show(shown)

    def close(self) -> None:
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = ""

    def _show(self, line: str) -> None:
        self._stream.write("\r\x1b[2K" + line)  # to the first column, erase the line
        self._stream.flush()
        self._shown = line


def format_progress(step: int, total_steps: int, metrics: Mapping[str, Any]) -> dict[str, str]:
    """The fields of the line by their first key, in order. Numbers that are not finite are shown as they are."""
    fields = {"step": f"step {step}/{total_steps}"}
    for keys, text in FIELDS:
        values = [float(metrics[key]) if key in metrics else None for key in keys]
        if any(value is not None for value in values):
            fields[keys[0]] = text(*values)
    if "step_seconds" in metrics and step < total_steps:
        fields["eta"] = f"eta {human_time((total_steps - step) * float(metrics['step_seconds']))}"
    return fields


def fit(fields: Mapping[str, str], columns: int) -> str:
    """The line in at most `columns` columns, without the most expendable fields where it is too long."""
    fields = dict(fields)
    for key in EXPENDABLE:
        if len("  ".join(fields.values())) <= columns:
            break
        fields.pop(key, None)
    return "  ".join(fields.values())[: max(columns, 0)]


def _losses(loss: float | None, image: float | None, text: float | None) -> str:
    parts = [f"{name} {value:.2f}" for name, value in (("img", image), ("txt", text)) if value is not None]
    whole = "" if loss is None else f" {loss:.3f}"
    return f"loss{whole}" + (f" ({' '.join(parts)})" if parts else "")


def _percentages(tokens: float | None, vision: float | None) -> str:
    shown = ["-" if value is None else f"{100 * value:.0f}" for value in (tokens, vision)]
    return "/".join(shown) + "%"
