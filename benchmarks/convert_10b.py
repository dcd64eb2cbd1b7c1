"""Convert the 10B checkpoint from Hugging Face to Orbax and back: byte equality, time and memory.

    python benchmarks/convert_10b.py [--layers N] [--directory DIR]

Makes a synthetic checkpoint of STEP3-VL-10B (20.3 GB of seeded bfloat16 values), converts it with `stepjax convert`,
deletes the source, exports it again, and compares every file: its header, and every tensor by SHA-256. The baseline is
a plain copy of the same files, each flushed to disk. Peak memory is the converting process's ru_maxrss. Files are
dropped from the page cache before they are read. Needs up to 41 GB of disk and frees all of it. Writes
results/convert_10b.json.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installing stepjax

from benchmarks import machine

SEED = 0
PIECE = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="layers of encoder and decoder; by default the model's own")
    parser.add_argument("--directory", help="working directory; by default the system's temporary directory")
    parser.add_argument("--make", help=argparse.SUPPRESS)  # make the checkpoint there, in this process
    arguments = parser.parse_args()
    if arguments.make:
        make_checkpoint(Path(arguments.make), arguments.layers)
        return
    with tempfile.TemporaryDirectory(prefix="convert_10b_", dir=arguments.directory) as directory:
        figures = measure(Path(directory), arguments.layers)
    print(f"\n{figures['parameters']:,} parameters, {figures['gigabytes']:.2f} GB in {figures['files']} files\n")
    print(f"{'':<24}{'seconds':>9}{'GB/s':>8}{'vs copy':>13}{'peak memory':>14}")
    for name, stage in figures["stages"].items():
        rate, share = figures["gigabytes"] / stage["seconds"], stage["seconds"] / figures["stages"]["copy"]["seconds"]
        print(f"{name:<24}{stage['seconds']:>9.1f}{rate:>8.3f}{share:>12.2f}x{stage['peak_gib']:>10.2f} GiB")
    print(f"\n{figures['tensors']} tensors, {figures['files']} files: identical byte for byte")
    if arguments.layers is None:
        print(f"written to {machine.write('convert_10b', figures).relative_to(Path.cwd())}")


def measure(directory: Path, layers: int | None) -> dict[str, Any]:
    source, orbax, back = directory / "source", directory / "orbax", directory / "back"
    run([sys.executable, __file__, "--make", str(source), *([] if layers is None else ["--layers", str(layers)])])
    expected = json.loads((directory / "digests.json").read_text())
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    stages = {}
    evict(source)
    stages["copy"] = run([sys.executable, "-c", COPY, str(source), str(directory / "copy")])
    evict(source)
    stages["convert to Orbax"] = run([*STEPJAX, "convert", str(source), str(orbax)])
    shutil.rmtree(source)
    evict(orbax)
    stages["export"] = run([*STEPJAX, "convert", str(orbax), str(back)])
    shutil.rmtree(orbax)
    found = digests(back)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        sys.exit(f"these files or tensors changed: {', '.join(differing)}")
    from stepjax.interop.model_spec import spec_from_hf

    spec = spec_from_hf(json.loads((back / "config.json").read_text()))
    return {
        "command": "python benchmarks/convert_10b.py",
        "parameters": sum(math.prod(shape) for shape in spec.shapes().values()),
        "gigabytes": size / 1e9,
        "files": len(list(back.glob("*.safetensors"))),
        "tensors": len([name for name in found if "/" in name]),
        "identical": True,
        "stages": stages,
    }


STEPJAX = (sys.executable, "-m", "stepjax.cli")
# Flushes and removes each copy before the next.
COPY = """
import os, pathlib, shutil, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    shutil.copyfile(path, sys.argv[2])
    with open(sys.argv[2], "rb") as file:
        os.fsync(file.fileno())
    os.unlink(sys.argv[2])
"""


def run(command: list[str]) -> dict[str, float]:
    """Wall time and peak memory of a process. The caller must be small: a fork counts its memory."""
    print(f"{' '.join(command[1:4])} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        sys.exit(f"{' '.join(command)} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 2), "peak_gib": round(usage.ru_maxrss / 2**20, 3), "cpu_seconds": round(cpu, 1)}


def evict(directory: Path) -> None:
    """Flush the files under a directory and drop them from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every tensor ("file/key"), every header, and every file that is not safetensors."""
    from stepjax.interop.safetensors_file import parse_header, read_header

    found = {}
    for path in sorted(directory.iterdir()):
        if path.suffix != ".safetensors":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            continue
        header = read_header(path)
        found[path.name] = hashlib.sha256(header.encode()).hexdigest()
        with path.open("rb") as file:
            for key, entry in parse_header(path, header).items():
                digest, left = hashlib.sha256(), entry.nbytes
                file.seek(entry.start)
                while left:
                    piece = file.read(min(left, PIECE))
                    digest.update(piece)
                    left -= len(piece)
                found[f"{path.name}/{key}"] = digest.hexdigest()
    return found


def make_checkpoint(directory: Path, layers: int | None) -> None:
    """Write the files, and their digests beside the directory."""
    import ml_dtypes
    import numpy as np

    from stepjax.config import ImageConfig, ModelConfig
    from stepjax.interop.export_files import config_json
    from stepjax.interop.hf_match import places
    from stepjax.interop.model_spec import ModelSpec
    from stepjax.interop.safetensors_file import create, index_of, parse_header, plan_shards

    model = ModelConfig()
    if layers is not None:
        parts = {name: dataclasses.replace(getattr(model, name), num_layers=layers) for name in ("vision", "decoder")}
        model = dataclasses.replace(model, **parts)
    spec = ModelSpec(model, ImageConfig())
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(spec, None, "bfloat16"), indent=2))
    tensors = [
        (place.key, np.dtype(ml_dtypes.bfloat16), place.shape) for place in places(spec.tensors(), spec.shapes())
    ]
    headers = plan_shards(tensors)
    (directory / "model.safetensors.index.json").write_text(index_of(headers))
    found = {}
    for name, header in headers.items():
        create(directory / name, header)
        found[name] = hashlib.sha256(header.encode()).hexdigest()
        with (directory / name).open("r+b") as file:
            for number, (key, entry) in enumerate(parse_header(directory / name, header).items()):
                rng, digest, left = np.random.default_rng([SEED, len(found), number]), hashlib.sha256(), entry.nbytes
                file.seek(entry.start)
                while left:
                    bits = np.frombuffer(rng.bytes(min(left, PIECE)), np.uint16) & 0xBFFF  # finite, below 2 in size
                    file.write(bits.data)
                    digest.update(bits.data)
                    left -= bits.nbytes
                found[f"{name}/{key}"] = digest.hexdigest()
    for name in ("config.json", "model.safetensors.index.json"):
        found[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    (directory.parent / "digests.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
