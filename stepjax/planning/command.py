"""`stepjax plan`: options and output."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from stepjax.config import PretrainConfig, RunConfig
from stepjax.config_file import load_recipe
from stepjax.errors import ConfigError
from stepjax.planning import StepKind
from stepjax.post_training.config import RLConfig

if TYPE_CHECKING:
    from stepjax.planning.topologies import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile a step ahead of time for a TPU topology: its memory, time and MFU.

    Of a recipe of `stepjax rl` it compiles a whole iteration: decoding, scoring, the gradients and steps of policy and
    critic; the memory of each with all that lives beside it, and the price of an iteration and of the run.
    No TPU is needed. The fields of the recipe are options too, as in `stepjax pretrain`.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]  # such as configs/digits/pretrain.py
    topology: str  # v5p-128, v5e-256, v6e-256, tpu7x-128, v5p:4x4x8, ...
    step: StepKind = "train"  # the step to plan: training, scoring, prefill or decoding
    weights: Literal["int8"] | None = None  # of prefill and decoding: the engine's option of this name
    answer_tokens: int | None = None  # of `stepjax rl`: length of every answer, for the price; None: the longest
    slices: int = 1  # slices of this topology, joined by the data-centre network; set mesh.slice too
    json: bool = False  # print JSON instead of the table
    hlo: Path | None = None  # write the text of the compiled program to this file
    search: bool = False  # try meshes, micro-batches and rematerialisation policies
    budget_minutes: float = 60.0  # time limit for --search
    write: Path | None = None  # write the best layout of --search to this file, as a recipe
    config: Annotated[RunConfig, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Returns 0 if the step, or every program of the iteration, fits; 1 if not.

        Raises:
            ConfigError: the recipe, the topology or their combination cannot work.
        """
        # Before importing JAX: a plan uses no device, even if one is present.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from stepjax.interop.init_from import describe, plan_start
        from stepjax.planning import iteration, iteration_report, plan, report, topologies

        self._check()
        topology = topologies.find(self.topology, self.slices)
        starts = describe(plan_start(self.config, must_exist=False), self.config)  # before minutes of compilation
        if isinstance(self.config, RLConfig):
            of_run = iteration.plan_iteration(self.config, topology, answer_tokens=self.answer_tokens)
            fits, fields, text = of_run.fits, iteration_report.to_json(of_run), iteration_report.to_text(of_run)
        elif self.search:
            return self._search(topology, self._trained)
        else:
            made = plan.make_plan(self._trained, topology, kind=self.step, weights=self.weights, keep_text=self.hlo)
            fits, fields, text = made.fits, report.to_json(made), report.to_text(made)
        if self.json:
            print(json.dumps(fields | {"init_from": starts}, indent=1))
        else:
            lines = ["parameters start", *(f"  {line}" for line in starts)] if starts else []
            print("\n".join([text, *lines]))
        return 0 if fits else 1

    @property
    def _trained(self) -> PretrainConfig:
        assert isinstance(self.config, PretrainConfig)
        return self.config

    def _check(self) -> None:
        if isinstance(self.config, RLConfig):
            given = {
                "--search": self.search,
                "--write": self.write is not None,
                f"--step {self.step}": self.step != "train",
                f"--weights {self.weights}": self.weights is not None,
                "--hlo": self.hlo is not None,
            }
            refused = [option for option, is_given in given.items() if is_given]
            if refused:
                raise ConfigError(
                    f"{', '.join(refused)}: not for recipes of `stepjax rl`, whose whole iteration is planned; omit it"
                )
        elif self.answer_tokens is not None:
            raise ConfigError(f"--answer-tokens {self.answer_tokens}: only for recipes of `stepjax rl`; omit it")
        if self.budget_minutes <= 0:
            raise ConfigError(f"--budget-minutes {self.budget_minutes}: must be positive")
        if self.weights is not None and self.step not in ("prefill", "decode"):
            raise ConfigError(f"--weights {self.weights}: only for --step prefill and decode; omit it")
        if self.search and self.step != "train":
            raise ConfigError(f"--step {self.step}: --search is only for training; omit one of them")
        if self.write is not None and not self.search:
            raise ConfigError(f"--write {self.write}: writes the result of --search; add --search")
        for name, path in (("hlo", self.hlo), ("write", self.write)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"--{name} {path}: no directory {path.absolute().parent}; create it")

    def _search(self, topology: "Topology", config: PretrainConfig) -> int:
        from stepjax.planning.search import outcome, search, write_recipe

        say: Callable[[str], None] = (lambda line: None) if self.json else (lambda line: print(line, flush=True))
        found = search(config, topology, budget_seconds=60 * self.budget_minutes, say=say)
        best = found.best
        if self.json:
            print(json.dumps(found.to_json(), indent=1))
        say(f"\n{found.to_text(load_recipe(self.recipe))}")
        if best is None:
            return 1
        if self.write is not None:
            headline = f"{topology.name}, {topology.slices} slice(s): {outcome(best)}, by the compiler's estimate"
            write_recipe(self.write, Path(self.recipe), best.config, headline)
            say(f"\nwritten to {self.write}; train it with: stepjax pretrain {self.write}")
        return 0
