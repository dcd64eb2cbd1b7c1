"""`stepjax rl`."""

import dataclasses
from typing import Annotated

import tyro

from stepjax.post_training.config import RLConfig
from stepjax.training.command import run_training


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
        from stepjax.config_file import load_recipe

        preset = load_recipe(self.recipe, RLConfig)
        return run_training(self.config, preset, "stepjax.post_training.loop:reinforce", unit="iteration")
