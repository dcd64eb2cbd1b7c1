"""`stepjax rl`."""

import dataclasses
import sys
from typing import Annotated

import tyro

from stepjax.post_training.config import RLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rl:
    """Train a model by reinforcement learning from a recipe; rerun the same command to resume.

    Writes a row of metrics, a page of samples and curves into OUT/NAME. Ctrl-C and SIGTERM checkpoint after the current
    iteration. At the end the model answers the recipe's held-out questions.
    Every field of the recipe is an option: `stepjax rl RECIPE --help` lists them with the recipe's values.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]  # such as configs/digits/rlvr.py
    config: Annotated[RLConfig, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Returns 0 after the last iteration; 130 or 143 after a signal, with the last iteration saved.

        Raises:
            StepjaxError: the recipe, the data or a checkpoint cannot be used, too many rewards are missing, or training
                diverged.
        """
        from stepjax.config_file import differences, load_recipe

        config, preset = self.config, load_recipe(self.recipe, RLConfig)
        from stepjax.distributed import initialize, must_supervise, supervise

        if must_supervise():
            return supervise(sys.argv[1:])
        from stepjax.training.host import prepare

        prepare(config, config.batch.micro_rows)
        initialize(config.heartbeat.lost_after)
        for line in differences(config, preset):
            print(f"override  {line}")

        from stepjax.evaluation.command import report
        from stepjax.post_training.loop import reinforce
        from stepjax.post_training.report import draw_curves
        from stepjax.training.run_directory import local_directory

        def on_evaluation(model, processor, step):
            report(model, processor, config, local_directory(config), f"iteration {step}")

        has_questions = bool(config.evaluation.sources)
        outcome = reinforce(config, on_evaluation=on_evaluation if has_questions else None)
        draw_curves(outcome.directory)
        if outcome.stopped_by is not None:
            return {"SIGTERM": 143, "SIGINT": 130}[outcome.stopped_by]
        if has_questions:
            on_evaluation(outcome.model, outcome.processor, outcome.step)
        return 0
