"""`stepjax <verb>`: parses, calls, prints. Users' mistakes are answered with one line, not with a traceback."""

import dataclasses
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from stepjax.errors import ConfigError, StepjaxError
from stepjax.figures import printable
from stepjax.stop_signals import end_on_signals

USAGE = """usage: stepjax VERB ...

  pretrain RECIPE [--dry-run] [--section.field VALUE ...]   train; run it again to go on after an interruption
  plan RECIPE --topology v5p-128 [--search]                 what a run needs and takes on TPUs that are not here
  eval RUN [--data FILE ...] [--examples N]                 score a run's last checkpoint on held-out questions
  generate MODEL --prompt TEXT [--image FILE ...]           answer a question about image files
  convert SRC DST [--dtype bfloat16] [--part decoder]       between Hugging Face directories and Orbax checkpoints
  serve MODEL [--port N] [--engine.max-sequences N ...]     answer OpenAI's requests, and chat in the browser
  pacore run PROBLEMS --model MODEL --out DIR               answer a file of problems by parallel trajectories
  pacore serve ...                                          the same, for OpenAI's requests
  pacore trace RUN ...                                      how an answer came about, as a page

RECIPE is a file such as configs/digits/pretrain.py, RUN a directory such as runs/digits or gs://bucket/runs/digits,
MODEL a run, a Hugging Face directory, or what `convert` made of one.
`stepjax VERB --help` says more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status. Without `arguments` this is the program: it ends at signals from here on.

    0     done
    1     a user's mistake, a file or a disk that cannot be used, or a fault of ours; the last line says which
    2     bad usage
    70    `serve`, `pacore run`: the engine failed; start it again
    75    `pretrain`: another process was lost; the same command goes on from the checkpoint
    130   SIGINT (Ctrl-C); `pretrain` has saved if a step was done, `pacore run` has its journal
    143   SIGTERM, likewise. `serve` and `pacore serve`, once they listen, end in order at either, with 0
    """
    is_program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbs = {
        "pretrain": _pretrain,
        "plan": _plan,
        "eval": _eval,
        "generate": _generate,
        "convert": _convert,
        "serve": _serve,
        "pacore": _pacore,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-V", "--version"):
        import stepjax

        print(f"stepjax {stepjax.__version__}")
        return 0
    if verb not in verbs:
        print(f"stepjax: no verb {verb!r}; there are {', '.join(verbs)}", file=sys.stderr)
        return 2
    if is_program:
        end_on_signals(f"stepjax {verb}")
    # Tracing makes objects by the million and hardly a cycle; the collector's looks at them are a tenth of a start.
    gc.set_threshold(50_000, 20, 50)
    try:
        status = verbs[verb](rest)
        sys.stdout.flush()  # here, where it is known what to say of a full disk
        return status
    except StepjaxError as error:
        problem = str(error)
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        problem = f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}"
    except MemoryError:
        problem = "there is not enough memory"
    except KeyboardInterrupt:  # of a caller in Python, or a second one while a command stops in order
        print(f"stepjax {verb}: stopped by SIGINT", file=sys.stderr)
        return 130
    except Exception as error:
        import traceback

        traceback.print_exc()
        problem = f"internal error, please report it: {type(error).__name__}: {error}"
    print(f"stepjax {verb}: {printable(problem)}", file=sys.stderr)  # it may name what others have written
    return 1


# Verbs. The imports are inside, so that usage errors do not wait for JAX.


def _pretrain(arguments: list[str]) -> int:
    from stepjax.config_file import load_recipe, override
    from stepjax.training.loop import pretrain
    from stepjax.training.run_directory import local_directory

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: stepjax pretrain RECIPE [--dry-run] [--section.field VALUE ...]")
        print("       stepjax pretrain RECIPE --help   lists every field with its value in the recipe")
        return 0 if arguments else 2
    recipe, rest = arguments[0], arguments[1:]
    dry_run = "--dry-run" in rest
    rest = [argument for argument in rest if argument != "--dry-run"]
    preset = load_recipe(recipe)
    config = override(preset, rest, prog=f"stepjax pretrain {recipe}")
    if dry_run:
        from stepjax.training.dry_run import describe

        print(describe(config, preset))
        return 0
    from stepjax.config_file import differences
    from stepjax.distributed import initialize, must_supervise, supervise

    if must_supervise():
        return supervise(["pretrain", *arguments])
    initialize()
    for line in differences(config, preset):
        print(f"override  {line}")

    sources = config.evaluation.sources

    def report(model, processor, step):
        _report(model, processor, config, local_directory(config), f"step {step}")

    outcome = pretrain(config, on_evaluation=report if sources else None)
    if outcome.stopped_by is not None:
        return {"SIGTERM": 143, "SIGINT": 130}[outcome.stopped_by]
    if sources:
        report(outcome.model, outcome.processor, outcome.step)
    return 0


def _plan(arguments: list[str]) -> int:
    from stepjax.planning.command import run

    return run(arguments)


def _convert(arguments: list[str]) -> int:
    from stepjax.interop.command import run

    return run(arguments)


def _serve(arguments: list[str]) -> int:
    from stepjax.serving.command import run

    return run(arguments)


def _pacore(arguments: list[str]) -> int:
    verbs = {"run": _pacore_run, "serve": _pacore_serve, "trace": _pacore_trace}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: stepjax pacore {{{','.join(verbs)}}} ...")
        print("       stepjax pacore run --help   and so on say more")
        return 0 if arguments else 2
    if arguments[0] not in verbs:
        print(f"stepjax pacore: no verb {arguments[0]!r}; there are {', '.join(verbs)}", file=sys.stderr)
        return 2
    return verbs[arguments[0]](arguments[1:])


def _pacore_run(arguments: list[str]) -> int:
    from stepjax.pacore.run_command import run

    return run(arguments)


def _pacore_serve(arguments: list[str]) -> int:
    from stepjax.serving.pacore_command import run

    return run(arguments)


def _pacore_trace(arguments: list[str]) -> int:
    from stepjax.pacore.trace_command import run

    return run(arguments)


def _eval(arguments: list[str]) -> int:
    import tyro

    from stepjax.config import DigitsSource, JsonlSource, Split

    @dataclasses.dataclass(frozen=True)
    class EvalArguments:
        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # directory of a run, or its URL
        data: tuple[str, ...] = ()  # JSON Lines files of questions and documents, in place of the recipe's sources
        examples: int | None = None  # records per source; the recipe's number by default
        split: Split | None = None  # of digits sources; the recipe's by default

    args = tyro.cli(EvalArguments, args=arguments, prog="stepjax eval", description="Score a run's last checkpoint.")
    if args.examples is not None and args.examples < 1:
        raise ConfigError(f"--examples {args.examples}: must be at least 1")
    from stepjax.interop.load import load_run

    model, processor, config = load_run(args.run)
    evaluation = config.evaluation
    sources = evaluation.sources
    if args.data:
        sources = tuple(JsonlSource(name=Path(path).stem, weight=1.0, path=path) for path in args.data)
    if args.split is not None:
        other = [source.name for source in sources if not isinstance(source, DigitsSource)]
        if other:
            raise ConfigError(f"--split {args.split}: {', '.join(other)} has no splits; leave it out")
        sources = tuple(dataclasses.replace(source, split=args.split) for source in sources)
    evaluation = dataclasses.replace(evaluation, sources=sources, examples=args.examples or evaluation.examples)
    directory = Path("runs") / config.name if "://" in args.run else Path(args.run)
    title = ", ".join(args.data) if args.data else f"{args.split or 'held_out'} data"
    _report(model, processor, dataclasses.replace(config, evaluation=evaluation), directory, title)
    return 0


def _generate(arguments: list[str]) -> int:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class GenerateArguments:
        # A run, or what `stepjax.load` takes.
        model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
        prompt: str  # the question
        image: tuple[str, ...] = ()  # image files, shown before the question
        frame: int | None = None  # of animations and files of several pages, from 0
        max_new_tokens: int = 64
        temperature: float = 0.0  # 0 always takes the likeliest token
        seed: int = 0
        thinking: bool | None = None  # start with a thought, or close it at once; the run's own way by default

    args = tyro.cli(GenerateArguments, args=arguments, prog="stepjax generate", description="Answer a question.")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.temperature < 0:
        raise ConfigError(f"--temperature {args.temperature}: must not be negative")
    from stepjax.inference.config import EngineConfig
    from stepjax.inference.engine import Engine
    from stepjax.inference.request import SamplingParams
    from stepjax.interop.load import load

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_new_tokens, seed=args.seed)
    model, processor = load(args.model)
    content: Any = args.prompt
    if args.image:
        images = [{"type": "image", "image": image, "frame": args.frame} for image in args.image]
        content = [*images, {"type": "text", "text": args.prompt}]
    prompt = processor.process_prompt([{"role": "user", "content": content}], enable_thinking=args.thinking)
    room = -(-(len(prompt.tokens) + args.max_new_tokens) // 64) * 64
    engine = Engine(model, processor, EngineConfig(max_sequences=1, max_context=room))
    engine.submit(prompt, params)
    finish_reason = None
    while engine.has_work:
        for delta in engine.step():
            print(printable(delta.text) if sys.stdout.isatty() else delta.text, end="", flush=True)
            finish_reason = delta.finish_reason
    print()
    if finish_reason == "length":
        print(f"(cut off after --max-new-tokens {args.max_new_tokens})", file=sys.stderr)
    return 0


# Shared parts


def _report(model, processor, config, directory: Path, title: str) -> None:
    """Evaluate, print the table, and leave it and the picture beside the run."""
    import json

    import jax

    from stepjax.evaluation.contact_sheet import contact_sheet, pick_items
    from stepjax.evaluation.evaluate import evaluate
    from stepjax.evaluation.scoring import summary_table

    report = evaluate(
        model, processor, config.evaluation, seed=config.seed, progress=lambda m: print(printable(m), file=sys.stderr)
    )
    if jax.process_index() > 0:  # all evaluate, for all hold a part of the model; one tells
        return
    print(f"\n{config.name}, {title}\n{printable(summary_table(report.results))}\n")
    picture, table = directory / "contact_sheet.png", directory / "evaluation.json"
    heading = f"{config.name}, {title}: questions and the model's answers"
    if report.items:
        contact_sheet(pick_items(report.items, 20), picture, title=heading)
    rows = [
        dataclasses.asdict(result) | {"accuracy": result.accuracy if result.total else None}  # JSON has no NaN
        for result in report.results
    ]
    table.write_text(json.dumps({"title": title, "results": rows}, indent=1) + "\n")
    print(f"answers shown in {picture}, figures in {table}" if report.items else f"figures in {table}")


if __name__ == "__main__":
    sys.exit(main())
