"""`stepjax VERB ...`: finds the verb's class, parses its fields with tyro, runs it. User errors print one line.

Every verb is a dataclass with a `run` method. Its fields are the options and their comments the help. The classes are
imported on demand and do not import JAX, so usage errors appear at once.
"""

import ast
import dataclasses
import difflib
import gc
import importlib
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from stepjax.errors import StepjaxError
from stepjax.figures import logging_to_stderr, printable
from stepjax.stop_signals import end_on_signals

VERBS = {
    "pretrain": "stepjax.training.command:Pretrain",
    "sft": "stepjax.training.command:Sft",
    "rl": "stepjax.post_training.command:Rl",
    "plan": "stepjax.planning.command:Plan",
    "eval": "stepjax.evaluation.command:Eval",
    "generate": "stepjax.inference.command:Generate",
    "convert": "stepjax.interop.command:Convert",
    "convert verify": "stepjax.interop.command:Verify",
    "serve": "stepjax.serving.command:Serve",
    "pacore run": "stepjax.pacore.command:PacoreRun",
    "pacore serve": "stepjax.serving.command:PacoreServe",
    "pacore trace": "stepjax.pacore.command:PacoreTrace",
    "tofc train": "stepjax.tofc.command:TofcTrain",
    "tofc encode": "stepjax.tofc.command:TofcEncode",
    "tofc decode": "stepjax.tofc.command:TofcDecode",
    "tofc evaluate": "stepjax.tofc.command:TofcEvaluate",
    "tofc page": "stepjax.tofc.command:TofcPage",
    "tofc ask": "stepjax.tofc.command:TofcAsk",
    "pacore cache": "stepjax.post_training.cache:PacoreCache",
}

_EXAMPLES = """
  stepjax pretrain configs/digits/pretrain.py --optimizer.weight-decay 0.1
  stepjax plan configs/step3_vl_10b/pretrain.py --topology v5p-128
  stepjax generate runs/digits --image strip.png --prompt "Transcribe the digits."
  stepjax convert runs/digits digits_hf
  stepjax pacore run problems.jsonl --model runs/digits --out runs/pacore

A model is a run (a directory, or a gs:// URL), a Hugging Face directory, or a converted checkpoint.
`stepjax VERB --help` lists the options of a verb with their defaults."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status. Without `arguments` this is the program, and signals end it from here on.

    0     done
    1     a user error, an unusable file or disk, or a bug of ours; the last line says which
    2     bad usage (raised as SystemExit when tyro finds it)
    70    `serve`, `pacore run`: the engine failed; restart it
    75    `pretrain`, `sft`: another process was lost; rerun the same command to resume from the checkpoint
    130   SIGINT (Ctrl-C); `pretrain` and `sft` checkpoint if they have done a step, `pacore run` has its journal
    143   SIGTERM, likewise. Once listening, `serve` and `pacore serve` shut down cleanly on either and return 0
    """
    is_program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-V", "--version"):
        import stepjax

        print(f"stepjax {stepjax.__version__}")
        return 0
    verb = next((name for name in (" ".join(arguments[:2]), *arguments[:1]) if name in VERBS), None)
    if verb is None:
        return _without_verb(arguments)
    if is_program:
        end_on_signals(f"stepjax {verb}")
    # Tracing allocates millions of objects and hardly any cycles: collecting them would take a tenth of the start-up.
    gc.set_threshold(50_000, 20, 50)
    try:
        with logging_to_stderr(logging.INFO, "%(message)s"):
            status = _parse(verb, arguments[len(verb.split()) :]).run()
        sys.stdout.flush()  # here, where a full disk can still be reported
        return status
    except StepjaxError as error:
        problem = str(error)
    except BrokenPipeError:  # such as `| head`: the reader is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        problem = f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}"
    except MemoryError:
        problem = "out of memory"
    except KeyboardInterrupt:  # a Python caller's, or a second Ctrl-C during a clean shutdown
        print(f"stepjax {verb}: stopped by SIGINT", file=sys.stderr)
        return 130
    except Exception as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing not in ("", "stepjax", "pallas_kernels"):
            problem = (
                f"{missing} is not installed: pip install 'stepjax[cpu]', or with tpu, cuda13 or serve in its place"
            )
        else:
            import traceback

            traceback.print_exc()
            problem = f"internal error, please report it: {type(error).__name__}: {error}"
    print(f"stepjax {verb}: {printable(problem)}", file=sys.stderr)  # it may quote untrusted text
    return 1


def _without_verb(arguments: list[str]) -> int:
    """Print help for all verbs or for a group such as `pacore`, or the error for an unknown verb."""
    group = arguments[0] if arguments and any(name.startswith(f"{arguments[0]} ") for name in VERBS) else None
    rest = arguments[1:] if group else arguments
    if rest and rest[0] not in ("-h", "--help"):
        given = " ".join(filter(None, (group, rest[0])))
        [meant] = difflib.get_close_matches(given, VERBS, n=1) or [None]
        remedy = f"did you mean {meant!r}?" if meant else f"choose from {', '.join(VERBS)}"
        print(printable(f"stepjax: no verb {given!r}; {remedy}"), file=sys.stderr)
        return 2
    names = [name for name in VERBS if group is None or name.startswith(group)]
    lines = [f"  {name:<15}{textwrap.shorten(_summary(name), 83, placeholder='...')}" for name in names]
    print("\n".join([f"usage: stepjax {group or 'VERB'} ...\n", *lines]))
    if group is None:
        print(f"\nexamples:{_EXAMPLES}")
    return 0 if rest else 2


def _summary(verb: str) -> str:
    """The first docstring line of a verb's class, read without importing its module."""
    module, name = VERBS[verb].split(":")
    source = Path(__file__).parent.parent.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(source.read_text()).body if source.exists() else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _parse(verb: str, arguments: list[str]) -> Any:
    """The verb with its options.

    If a verb has a field `recipe`, its field `config` is the recipe's configuration, which must be of that field's
    class: every field there is an option whose default is the recipe's value.

    Raises:
        SystemExit: after printing help or a parse error.
        ConfigError: the recipe cannot be used.
    """
    import tyro

    module, name = VERBS[verb].split(":")
    options, program = getattr(importlib.import_module(module), name), f"stepjax {verb}"
    if any(field.name == "recipe" for field in dataclasses.fields(options)):
        from stepjax.config_file import load_recipe

        is_first = bool(arguments) and not arguments[0].startswith("-")
        recipe = arguments[0] if is_first else tyro.cli(_without_recipe(options), args=arguments, prog=program).recipe
        preset = load_recipe(recipe, get_type_hints(options)["config"])
        options, program = _with_recipe(options, preset), f"{program} {recipe}"
    try:
        return tyro.cli(options, args=arguments, prog=program, config=(tyro.conf.AvoidSubcommands,))
    except StepjaxError as error:  # from options without a prefix; tyro reports errors from prefixed groups itself
        print(f"stepjax {verb}: {printable(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def _without_recipe(verb: Any) -> Any:
    """The verb's own options. (tyro finds the help comments of base classes only for full class definitions.)"""
    import tyro

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithoutRecipe(verb):
        config: tyro.conf.Suppress[None] = None

    WithoutRecipe.__doc__ = verb.__doc__
    return WithoutRecipe


def _with_recipe(verb: Any, preset: Any) -> Any:
    import tyro

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithRecipe(verb):
        config: Annotated[type(preset), tyro.conf.arg(name="")] = preset  # pyright: ignore[reportInvalidTypeForm]

    WithRecipe.__doc__ = verb.__doc__
    return WithRecipe


if __name__ == "__main__":
    sys.exit(main())
