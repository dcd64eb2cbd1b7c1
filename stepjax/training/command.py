"""`stepjax pretrain` and `stepjax sft`."""

import dataclasses
import importlib
import sys
from typing import Annotated, Any, ClassVar

import tyro

from stepjax.config import PretrainConfig, RunConfig, SftConfig
from stepjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train a model from a recipe; rerun the same command to resume.

    Ctrl-C and SIGTERM checkpoint before exiting. At the end the model answers the recipe's held-out questions.
    Every field of the recipe is an option: `stepjax pretrain RECIPE --help` lists them with the recipe's values.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]  # such as configs/digits/pretrain.py
    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    dry_run: bool = False  # print the configuration, parameters, FLOPs and memory; train nothing
    trains_codec: ClassVar[bool] = False

    def run(self) -> int:
        """Returns 0 at the end of the schedule; 130 or 143 after a signal, with the last step saved.

        Raises:
            StepjaxError: the recipe, the data or a checkpoint cannot be used, or training diverged.
        """
        from stepjax.config_file import load_recipe

        config, preset = self.config, load_recipe(self.recipe, type(self.config))
        if isinstance(config, SftConfig) and not isinstance(self, Sft):
            raise ConfigError(f"{self.recipe} is a recipe for fine-tuning: run `stepjax sft {self.recipe}`")
        if config.model.tofc is not None and not self.trains_codec:
            raise ConfigError(f"{self.recipe} trains a codec (model.tofc): run `stepjax tofc train {self.recipe}`")
        if self.dry_run:
            from stepjax.training.dry_run import describe

            print(describe(config, preset))
            return 0
        return run_training(config, preset, "stepjax.training.loop:pretrain", unit="step")


def run_training(config: Any, preset: RunConfig, trainer: str, *, unit: str) -> int:
    """The rest of every command that trains: joins the other processes, trains, and asks the held-out questions.

    Args:
        trainer: module and name of the function that trains; it is imported once the CPU is prepared.
        unit: what the trainer counts.

    Returns:
        0 at the end; 130 or 143 after a signal.
    """
    from stepjax.config_file import differences
    from stepjax.distributed import initialize, must_supervise, supervise

    if must_supervise():
        return supervise(sys.argv[1:])
    from stepjax.training.host import prepare

    prepare(config, config.batch.micro_rows)
    initialize(config.heartbeat.lost_after)
    for line in differences(config, preset):
        print(f"override  {line}")

    from stepjax.evaluation.command import report
    from stepjax.training.run_directory import local_directory

    def on_evaluation(model, processor, step):
        report(model, processor, config, local_directory(config), f"{unit} {step}")

    module, name = trainer.split(":")
    train = getattr(importlib.import_module(module), name)
    has_questions = bool(config.evaluation.sources)
    outcome = train(config, on_evaluation=on_evaluation if has_questions else None)
    if outcome.stopped_by is not None:
        return {"SIGTERM": 143, "SIGINT": 130}[outcome.stopped_by]
    if config.model.tofc is not None:
        from stepjax.interop.codec_files import write_codec

        for line in write_codec(outcome.model, config):
            print(line)
    if has_questions:
        on_evaluation(outcome.model, outcome.processor, outcome.step)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(Pretrain):
    """Fine-tune a model on conversations from a recipe; rerun the same command to resume.

    The recipe is an SftConfig. `init_from` names the model, and `lora.rank` asks for adapters instead of new weights.
    Everything else is as in `stepjax pretrain`.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]  # such as configs/digits/sft.py
    config: Annotated[SftConfig, tyro.conf.arg(name="")]
    dry_run: bool = False  # print the configuration, parameters, FLOPs and memory; train nothing
