"""`stepjax convert` and `stepjax convert verify`: options and output."""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stepjax.errors import CheckpointError
from stepjax.figures import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert between a Hugging Face directory and a checkpoint that Orbax restores.

    A Hugging Face directory (config.json and *.safetensors: STEP3-VL, or a plain Qwen3 or Llama text model) becomes an
    Orbax checkpoint. A converted checkpoint, a training run or one step of it becomes a Hugging Face directory. A run's
    adapters are merged into the model. Rerun the same command to resume a conversion that was stopped.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]  # what to convert
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]  # directory to create
    dtype: Literal["keep", "bfloat16", "float32"] = "keep"  # dtype of the written tensors; keep: unchanged
    part: Literal["all", "decoder"] = "all"  # decoder: the text model alone, as a plain Qwen3
    side_files: Path | None = None  # Hugging Face directory whose tokenizer, template and code to export with a run
    adapters: bool = False  # of a run that trains adapters (lora): write them alone, as PEFT loads them
    merge: Path | None = None  # PEFT's directory of an adapter, to add to the weights of a Hugging Face directory
    overwrite: bool = False  # replace DST, or another conversion's unfinished work

    def run(self) -> int:
        """
        Raises:
            CheckpointError: a path is unusable.
        """
        # Set before JAX is imported: a conversion computes nothing and should not occupy devices.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from stepjax.interop.adapters import MERGED, merged_run
        from stepjax.interop.convert import to_hf, to_orbax
        from stepjax.interop.hf_directory import HFDirectory
        from stepjax.interop.load import open_checkpoint
        from stepjax.interop.peft_layout import Merged

        source, destination = open_checkpoint(_local(self.source)), _local(self.destination)
        if self.adapters:
            return self._write_adapters(source, destination)
        if self.merge is not None:
            if not isinstance(source, HFDirectory):
                raise CheckpointError(f"--merge {self.merge} is for a Hugging Face directory, unlike {self.source}")
            source = Merged(source.path, self.merge)
        if isinstance(source, HFDirectory):
            self._refuse_side_files("a Hugging Face directory brings its own")
            written = to_orbax(source, destination, dtype=self.dtype, part=self.part, overwrite=self.overwrite)
            print(f"{destination}: an Orbax checkpoint of {written}; `stepjax.load` reads it")
            return 0
        if source.run is not None and source.run.model.tofc is not None:
            raise CheckpointError(f"{self.source} has a codec (model.tofc), which the public layout has no place for")
        if source.run is None:
            self._refuse_side_files("the checkpoint kept its original ones")
        with contextlib.ExitStack() as stack:
            if source.run is not None and source.run.adapters is not None:
                scratch = destination.with_name(destination.name + MERGED)
                source = stack.enter_context(merged_run(source, scratch))
            written = to_hf(
                source,
                destination,
                dtype=self.dtype,
                part=self.part,
                side_files=self.side_files,
                overwrite=self.overwrite,
            )
        print(f"{destination}: a Hugging Face directory of {written}")
        return 0

    def _write_adapters(self, source: Any, destination: Path) -> int:
        from stepjax.interop.hf_directory import HFDirectory
        from stepjax.interop.peft_layout import write_adapters

        others = [
            name
            for name in ("dtype", "part", "side_files", "merge")
            if getattr(self, name) not in ("keep", "all", None)
        ]
        if isinstance(source, HFDirectory) or others:
            what = f"--{others[0].replace('_', '-')}" if others else f"{source.path}, a Hugging Face directory"
            raise CheckpointError(f"--adapters writes the adapters of a run as they are: it does not go with {what}")
        written = write_adapters(source, destination, overwrite=self.overwrite)
        print(f"{destination}: {written}; `peft.PeftModel.from_pretrained(base, {str(destination)!r})` loads them")
        return 0

    def _refuse_side_files(self, reason: str) -> None:
        if self.side_files is not None:
            raise CheckpointError(f"--side-files {self.side_files} is for exporting a training run: {reason}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare a model with recorded activations, computed in float32.

    The exit status is 1 if a tensor differs by more than the tolerance.
    """

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # any input that `convert` reads
    golden: Path  # recorded inputs and activations, safetensors
    tolerance: float = 1e-3  # largest allowed difference of a value

    def run(self) -> int:
        """
        Raises:
            CheckpointError: the model or the recorded file cannot be used.
        """
        from stepjax.interop.verify import verify

        differences, left_out = verify(_local(self.directory), self.golden)
        print(f"{'name':<18}{'largest difference':>20}{'of at most':>14}")
        failed = []
        for difference in differences:
            tokens = difference.name == "greedy_tokens"
            bad = not difference.largest <= (0 if tokens else self.tolerance)  # NaN is bad too
            failed += [difference.name] if bad else []
            largest = f"{difference.largest:.0f} tokens" if tokens else f"{difference.largest:.3g}"
            remark = "   above the tolerance" if bad else ""
            print(f"{difference.name:<18}{largest:>20}{difference.scale:>14.3g}{remark}")
        if left_out:
            print(f"not compared: {printable(', '.join(left_out))}")
        if failed:
            print(f"{self.directory} differs in {', '.join(failed)} (--tolerance {self.tolerance:g})", file=sys.stderr)
        return 1 if failed else 0


def _local(path: str) -> Path:
    if "://" in path:
        raise CheckpointError(
            f"{path}: conversions read and write local directories; copy it with the store's own tool"
        )
    return Path(path).expanduser().absolute()
