"""One GPU, measured: numerics of the GPU routes, attention, a train step, decoding, sampling, the demo.

    make gpu                  # or: python benchmarks/gpu.py [--out DIR] [--only STAGE ...] [--seconds 480] [--dry]

Needs JAX on CUDA, flax, optax and Orbax, and no network. Packages that the machine lacks come from a folder of wheels
(`make gpu-wheels`; --wheels), installed into a temporary folder. PyTorch is measured if it is there.

Every stage runs in its own process, so that it frees its memory, and has a share of the time; what a stage leaves, the
next may use. DIR/gpu_STAGE.json (benchmarks/results by default) holds the figures from the first one on: a stage that
is cut keeps what it has, and says so. `--dry` runs everything on CPU with tiny shapes, into a temporary folder.

    numerics    largest error of each route against float32 on the CPU: attention over heads, masks and packings,
                decoding attention, sampling, the loss
    attention   TFLOP/s of useful work, forward and with backward: our routes, cuDNN by JAX, PyTorch's best
    train       a train step with Qwen3-8B's shapes and as many of its layers as fit: tokens/s, MFU
    decode      Qwen3-8B with random weights: tokens/s at batch 1, 16, 64, and the share of memory bandwidth that
                reading the weights once per step takes
    shared      K samples of one prompt against K prompts of that length
                (decode and shared measure decoding only: prompts are not computed)
    demo        tokens/s of `stepjax pretrain configs/digits/pretrain.py`, shortened, without its evaluation

Exits with 1 if a stage failed; a stage that was cut has not failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
ROOT = HERE.parent
# Script and seconds of every stage, the most important first.
STAGES = {
    "numerics": ("gpu_kernels.py", 45),
    "attention": ("gpu_kernels.py", 58),
    "train": ("gpu_models.py", 45),
    "decode": ("gpu_models.py", 165),
    "shared": ("gpu_models.py", 110),
    "demo": ("gpu_models.py", 57),
}
# Shares of the GPU's memory that JAX takes at once; PyTorch needs some beside it.
MEMORY = {"numerics": "0.5", "attention": "0.6"}
DRY = os.environ.get("STEPJAX_GPU_DRY") == "1"
MARK = "figures: "
Figures = dict[str, Any]


# In the process of a stage -------------------------------------------------------------------------------------------


def tell(figures: Figures) -> None:
    """The figures so far, for the file; those told last count."""
    import jax

    device = jax.devices()[0]
    print(MARK + json.dumps({"device": device.device_kind, "platform": device.platform, **figures}), flush=True)


def run_stage(stages: dict[str, Callable[[], None]]) -> None:
    """The main program of a stage's script."""
    import jax

    if not DRY and jax.default_backend() != "gpu":
        sys.exit(f"JAX runs on {jax.default_backend()!r} here: install JAX for CUDA, or try the script with --dry")
    stages[sys.argv[1]]()


# In the process that starts them -------------------------------------------------------------------------------------


def supervise(
    command: list[str], seconds: float, environment: dict[str, str], write: Callable[[Figures], None]
) -> Figures:
    """Runs a stage for `seconds` at most; `write` gets its figures whenever it tells some. Returns the last ones."""
    figures: Figures = {}
    began, cut = time.monotonic(), threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0
        )

        def kill() -> None:
            cut.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    figures = json.loads(line[len(MARK) :])
                    write(figures | {"unfinished": True})
                else:
                    print(line, end="", flush=True)
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                kill()
                process.wait()
        if cut.is_set():
            figures["cut"] = f"after {seconds:.0f} s; the figures are those it had"
        elif status:
            errors.seek(0)
            figures["failed"] = errors.read()[-3000:] or f"exit status {status}"
    return figures | {"stage_seconds": round(time.monotonic() - began, 1)}


def describe_machine() -> Figures:
    described = machine.describe()
    for package in ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch"):
        described["versions"][package] = machine.version(package)
    described["load"] = os.getloadavg()
    query = "name,driver_version,memory.total,memory.used,utilization.gpu,clocks.sm,clocks.max.sm,power.limit"
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        described["card"] = dict(zip(query.split(","), asked.stdout.strip().split(", "), strict=False))
    except (OSError, subprocess.TimeoutExpired):
        described["card"] = None
    return described


def install(wheels: Path, target: Path) -> None:
    files = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--target"]
    if files:
        subprocess.run([*pip, str(target), *files], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the figures")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, help="total time, shared among the stages: 480, dry 3600")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="folder of the packages that are missing")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on CPU")
    args = parser.parse_args()
    began = time.monotonic()
    out = args.out or (Path(tempfile.mkdtemp(prefix="stepjax-gpu-")) if args.dry else machine.RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if stage in args.only]
    share = (args.seconds or (3600 if args.dry else 480)) / sum(STAGES[stage][1] for stage in stages)
    failed, planned = [], 0.0
    with tempfile.TemporaryDirectory() as site:
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if not args.dry:
            install(args.wheels, Path(site))
            path.insert(1, site)
        # The CPU computes what the numerics are compared with.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "JAX_PLATFORMS": "cuda,cpu"}
        if args.dry:
            environment |= {"STEPJAX_GPU_DRY": "1", "JAX_PLATFORMS": "cpu"}
        for stage in stages:
            script, seconds = STAGES[stage]
            planned += share * seconds
            own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY.get(stage, "0.92")}
            if args.dry:  # compiling takes most of the time
                own["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
            described = describe_machine()

            def write(figures: Figures, stage=stage, described=described) -> None:
                text = json.dumps({"machine": described, **figures}, indent=1) + "\n"
                (out / f"gpu_{stage}.json").write_text(text)

            left = max(planned - (time.monotonic() - began), 1.0)
            command = [sys.executable, str(HERE / script), stage]
            figures = supervise(command, left, own | environment, write)
            write(figures)
            print(f"{stage}: {json.dumps(figures)}", flush=True)
            failed += [stage] * ("failed" in figures)
    print(f"{time.monotonic() - began:.0f} s, results in {out}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
