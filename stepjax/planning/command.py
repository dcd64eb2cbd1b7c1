"""`stepjax plan`: its arguments, and what it prints."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stepjax.errors import ConfigError
from stepjax.planning.kinds import KINDS

_DESCRIPTION = """Compile a step of a recipe for a TPU topology, on any machine; say what it needs and takes.

Overrides of the recipe (--section.field VALUE) are those of `stepjax pretrain`."""


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 it fits, 1 it does not, 2 bad usage.

    Raises:
        ConfigError: the recipe, the topology or their combination cannot work.
    """
    parser = _parser()
    if not arguments:
        parser.print_usage(sys.stderr)
        return 2
    try:
        options, overrides = parser.parse_known_args(list(arguments))
    except SystemExit as error:  # the message is printed
        return error.code if isinstance(error.code, int) else 2
    # Before JAX is imported: a plan takes no device, not even one that is here.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from stepjax.config_file import load_recipe, override
    from stepjax.interop.init_from import describe, plan_start
    from stepjax.planning.plan import make_plan
    from stepjax.planning.report import to_json, to_text
    from stepjax.planning.topologies import find

    _check(options)
    topology = find(options.topology, options.slices)
    preset = load_recipe(options.recipe)
    config = override(preset, overrides, prog=f"stepjax plan {options.recipe}")
    starts = describe(plan_start(config, must_exist=False), config)  # before minutes of compilation
    if options.search:
        from stepjax.planning.search import search_and_print

        write = None if options.write is None else Path(options.write)
        return search_and_print(
            config,
            topology,
            Path(options.recipe),
            budget_minutes=options.budget_minutes,
            write=write,
            as_json=options.json,
        )
    plan = make_plan(config, topology, kind=options.step, keep_text=None if options.hlo is None else Path(options.hlo))
    if options.json:
        print(json.dumps(to_json(plan) | {"init_from": starts}, indent=1))
    else:
        print("\n".join([to_text(plan), *(["parameters start", *(f"  {line}" for line in starts)] if starts else [])]))
    return 0 if plan.fits else 1


def _check(options: argparse.Namespace) -> None:
    if options.budget_minutes <= 0:
        raise ConfigError(f"--budget-minutes {options.budget_minutes}: must be positive")
    if options.search and options.step != "train":
        raise ConfigError(f"--step {options.step}: --search is for training; leave one of them out")
    if options.write is not None and not options.search:
        raise ConfigError(f"--write {options.write}: it writes what --search finds; give that too")
    for name in ("hlo", "write"):
        path = getattr(options, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no directory {Path(path).absolute().parent}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepjax plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a file such as configs/step3_vl_10b/pretrain.py")
    parser.add_argument("--topology", required=True, help="v5p-128, v5e-256, v6e-256, tpu7x-128, v5p:4x4x8, ...")
    parser.add_argument(
        "--step", choices=KINDS, default="train", help="what is planned: train (default), score, prefill or decode"
    )
    parser.add_argument("--slices", type=int, default=1, help="slices joined by the data-centre network (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--hlo", metavar="FILE", help="leave the compiled program's text here")
    parser.add_argument("--search", action="store_true", help="try meshes, batches, remat policies and accumulations")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="how long to search (default 60)")
    parser.add_argument("--write", metavar="FILE", help="write the best of --search as a recipe")
    return parser
