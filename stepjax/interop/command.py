"""`stepjax convert`: its arguments, and what it prints."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stepjax.errors import CheckpointError
from stepjax.figures import printable

_DESCRIPTION = """Convert between a Hugging Face directory and a checkpoint that Orbax restores.

SRC is a Hugging Face directory (config.json and *.safetensors: STEP3-VL, or a plain Qwen3 or Llama text model), which
becomes an Orbax checkpoint; or a converted checkpoint, a training run or one step of it, which becomes a Hugging Face
directory. A conversion that was stopped goes on when it is started again.

`stepjax convert verify DIR --golden FILE` compares a model with recorded activations."""


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 well, 1 a tensor differs by more than the tolerance, 2 bad usage.

    Raises:
        CheckpointError: what is at a path cannot be used.
    """
    verifies = bool(arguments) and arguments[0] == "verify"
    parser = _verify_parser() if verifies else _convert_parser()
    if not arguments:
        parser.print_usage(sys.stderr)
        return 2
    try:
        options = parser.parse_args(list(arguments[1:] if verifies else arguments))
    except SystemExit as error:  # the message is printed
        return error.code if isinstance(error.code, int) else 2
    try:
        return _verify(options) if verifies else _convert(options)
    except OSError as error:
        raise CheckpointError(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}") from error


def _convert(given: argparse.Namespace) -> int:
    # Before JAX is imported: a conversion computes nothing, and takes no device that others use.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from stepjax.interop.convert import Options, to_hf, to_orbax
    from stepjax.interop.hf_directory import HFDirectory
    from stepjax.interop.load import open_checkpoint
    from stepjax.interop.progress import Progress

    source, destination = open_checkpoint(_local(given.source)), Path(_local(given.destination)).expanduser().absolute()
    options = Options(
        dtype=given.dtype,
        part=given.part,
        side_files=None if given.side_files is None else Path(given.side_files),
        overwrite=given.overwrite,
    )
    if isinstance(source, HFDirectory):
        _refuse_side_files(given, "a Hugging Face directory brings its own")
        written = to_orbax(source, destination, options, Progress)
        if written.left_out:
            print(printable(f"left out of {source.path}: {', '.join(written.left_out)}"), file=sys.stderr)
        print(f"{destination}: an Orbax checkpoint of {written}; `stepjax.load` reads it")
    else:
        if source.run is None:
            _refuse_side_files(given, "the checkpoint has kept those that it came with")
        written = to_hf(source, destination, options, Progress)
        print(f"{destination}: a Hugging Face directory of {written}")
    return 0


def _verify(given: argparse.Namespace) -> int:
    from stepjax.interop.verify import verify

    differences, left_out = verify(_local(given.directory), given.golden)
    print(f"{'name':<18}{'largest difference':>20}{'of at most':>14}")
    failed = []
    for difference in differences:
        tokens = difference.name == "greedy_tokens"
        bad = not difference.largest <= (0 if tokens else given.tolerance)  # NaN is bad too
        failed += [difference.name] if bad else []
        largest = f"{difference.largest:.0f} tokens" if tokens else f"{difference.largest:.3g}"
        print(f"{difference.name:<18}{largest:>20}{difference.scale:>14.3g}{'   above the tolerance' if bad else ''}")
    if left_out:
        print(f"not compared: {printable(', '.join(left_out))}")
    if failed:
        print(f"{given.directory} differs in {', '.join(failed)} (--tolerance {given.tolerance:g})", file=sys.stderr)
    return 1 if failed else 0


def _local(path: str) -> str:
    if "://" in path:
        raise CheckpointError(
            f"{path}: conversions read and write local directories; copy it with the store's own tool"
        )
    return path


def _refuse_side_files(given: argparse.Namespace, reason: str) -> None:
    if given.side_files is not None:
        raise CheckpointError(f"--side-files {given.side_files} is for exporting a training run: {reason}")


def _convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepjax convert", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument(
        "--dtype", choices=("keep", "bfloat16", "float32"), default="keep", help="of the tensors written (keep)"
    )
    parser.add_argument(
        "--part", choices=("all", "decoder"), default="all", help="decoder: the text model alone, as a plain Qwen3"
    )
    parser.add_argument(
        "--side-files",
        metavar="DIR",
        help="Hugging Face directory whose tokenizer, template and code go beside an exported run",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST, and the unfinished work of another source"
    )
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepjax convert verify",
        description="Compute recorded tensors in float32 and compare. The exit status is 1 where one differs by more.",
    )
    parser.add_argument("directory", metavar="DIR", help="anything that `stepjax convert` reads")
    parser.add_argument("--golden", metavar="FILE", required=True, help="recorded inputs and activations, safetensors")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a value (0.001)")
    return parser
