"""`stepjax eval`, and the report at the end of training."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from stepjax.config import DigitsSource, DocumentsSource, JsonlSource, RunConfig, Split
from stepjax.errors import ConfigError
from stepjax.figures import printable

if TYPE_CHECKING:
    from stepjax.evaluation.evaluate import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a run's last checkpoint on held-out questions and documents.

    Writes evaluation.json (the results) and contact_sheet.png (sample answers) to the run's directory.
    """

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # a run's directory, or its URL
    data: tuple[str, ...] = ()  # JSON Lines files of questions and documents, instead of the recipe's sources
    examples: int | None = None  # records per source; None: the recipe's number
    split: Split | None = None  # split of digits and documents sources; None: the recipe's

    def run(self) -> int:
        """
        Raises:
            StepjaxError: the run or the data cannot be used, or an option does not apply to them.
        """
        from stepjax.interop.load import load_run

        model, processor, config = load_run(self.directory)
        config, title = self.chosen(config)
        report(model, processor, config, self.place(config), title)
        return 0

    def chosen(self, config: RunConfig) -> tuple[RunConfig, str]:
        """The run's configuration with the questions that the options choose, and what they are."""
        if self.examples is not None and self.examples < 1:
            raise ConfigError(f"--examples {self.examples}: must be at least 1")
        evaluation = config.evaluation
        sources = evaluation.sources
        if self.data:
            sources = tuple(JsonlSource(name=Path(path).stem, weight=1.0, path=path) for path in self.data)
        if self.split is not None:
            other = [source.name for source in sources if not isinstance(source, DigitsSource | DocumentsSource)]
            if other:
                raise ConfigError(f"--split {self.split}: {', '.join(other)} has no splits; omit the option")
            sources = tuple(dataclasses.replace(source, split=self.split) for source in sources)
        evaluation = dataclasses.replace(evaluation, sources=sources, examples=self.examples or evaluation.examples)
        title = ", ".join(self.data) or f"{self.split or 'held_out'} data"
        return dataclasses.replace(config, evaluation=evaluation), title

    def place(self, config: RunConfig) -> Path:
        """Where results go."""
        return Path("runs") / config.name if "://" in self.directory else Path(self.directory)


def report(model, processor, config: RunConfig, directory: Path, title: str) -> None:
    """Evaluate, print the table, and write it and the contact sheet to the directory."""
    import jax

    from stepjax.evaluation.evaluate import evaluate

    evaluated = evaluate(model, processor, config.evaluation, seed=config.seed)
    if jax.process_index() == 0:  # every process holds part of the model, so all evaluate; the first reports
        show(evaluated, config, directory, title)


def show(
    evaluated: "Report", config: RunConfig, directory: Path, title: str, *, prefix: str = "", **more: object
) -> None:
    """Print the table, and write it and the contact sheet to the directory.

    Args:
        prefix: of the files' names.
        more: fields of the table's file.
    """
    from stepjax.evaluation.contact_sheet import contact_sheet, pick_items
    from stepjax.evaluation.scoring import summary_table

    print(f"\n{config.name}, {title}\n{printable(summary_table(evaluated.results))}\n")
    picture, table = directory / f"{prefix}contact_sheet.png", directory / f"{prefix}evaluation.json"
    if evaluated.items:
        heading = f"{config.name}, {title}: questions and the model's answers"
        contact_sheet(pick_items(evaluated.items, 20), picture, title=heading)
    rows = [
        dataclasses.asdict(result) | {"accuracy": result.accuracy if result.total else None}  # JSON has no NaN
        for result in evaluated.results
    ]
    table.write_text(json.dumps({"title": title, **more, "results": rows}, indent=1) + "\n")
    print(f"answers in {picture}, results in {table}" if evaluated.items else f"results in {table}")
