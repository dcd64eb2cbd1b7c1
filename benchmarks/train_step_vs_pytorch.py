"""The demo's train step against PyTorch, eager and compiled: same model, weights, batches, optimizer and cores.

    python benchmarks/train_step_vs_pytorch.py [--rounds 3] [--steps 10]

Needs PyTorch (`make .venv-parity/installed`) and, for torch.compile, a C++ compiler. PyTorch has SDPA attention, fused
AdamW, gradient clipping, static shapes and no graph breaks (benchmarks/pytorch_step_vl.py); our side is the step of
`stepjax pretrain` with the devices and the allocator that it sets. A step is timed from the host's batch to the updated
parameters. First both sides train from the same weights, and the losses must agree. Then they take turns: a round is
some steps of each side, and its figure the median step; the result is the median of the rounds.

Writes results/train_step_vs_pytorch.json.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import machine
import numpy as np
import pytorch_step_vl as peer
import torch  # pyright: ignore[reportMissingImports]

from stepjax.config import PretrainConfig
from stepjax.config_file import load_recipe
from stepjax.training.host import compiler_options, num_cores, prepare

RECIPE = Path(__file__).parent.parent / "configs" / "digits" / "pretrain.py"
AGREE_STEPS, TOLERANCE = 8, 1e-4  # rounding differs, and training amplifies it
Arrays = dict[str, np.ndarray]
Step = Callable[[Arrays], float]  # trains on a host batch; the loss, once the step is done


def our_side(config: PretrainConfig) -> tuple[Step, object, list[Arrays], np.ndarray]:
    """The step, the initial model, batches, and the learning rate of each step."""
    import jax

    from stepjax.data.loader import Loader
    from stepjax.models.step_vl import abstract_model, init_model
    from stepjax.sharding import make_mesh
    from stepjax.training.loop import make_processor, to_devices
    from stepjax.training.optimizer import learning_rate, make_optimizer
    from stepjax.training.step import make_train_step, new_state

    loader = iter(Loader(config.data, config.batch, config.images, make_processor(config), seed=config.seed))
    batches = [next(loader).arrays for _ in range(AGREE_STEPS)]
    loader.close()
    mesh = make_mesh(config.mesh)
    schedule = learning_rate(config.schedule, config.tokens_per_step)
    rates = np.asarray(schedule(np.arange(1000)), np.float64)
    optimizer = make_optimizer(config.optimizer, schedule, abstract_model(config.model, config.numerics))
    model = init_model(config.model, config.numerics, seed=config.seed, mesh=mesh)
    initial = jax.device_get(model)
    train_step = make_train_step(config, optimizer, schedule)
    train_step = jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options())
    with jax.set_mesh(mesh):
        state = jax.jit(lambda model: new_state(model, optimizer))(model)

    def step(arrays: Arrays) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, to_devices(arrays, mesh))
            jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, initial, batches, rates


def pytorch_side(config: PretrainConfig, initial: object, rates: np.ndarray, *, compiled: bool) -> Step:
    model, options = peer.load(initial, config.model), config.optimizer
    losses = torch.compile(model.losses, fullgraph=True, dynamic=False) if compiled else model.losses
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = options.beta1, options.beta2
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=options.eps, fused=True)
    done = 0

    def step(arrays: Arrays) -> float:
        nonlocal done
        optimizer.zero_grad(set_to_none=True)
        loss, mean = losses(peer.batch_of(arrays), config.loss.z_loss)
        loss.backward()
        if options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(rates[done])
        optimizer.step()
        done += 1
        return float(mean.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side in a round")
    arguments = parser.parse_args()
    config = load_recipe(RECIPE)
    prepare(config, config.batch.micro_rows)
    torch.set_num_threads(num_cores())
    ours, initial, batches, rates = our_side(config)
    sides = {"stepjax": ours}
    for name, compiled in (("pytorch_eager", False), ("pytorch_compiled", True)):
        sides[name] = pytorch_side(config, initial, rates, compiled=compiled)

    losses = {name: np.array([step(batch) for batch in batches]) for name, step in sides.items()}
    expected = losses.pop("stepjax")
    differences = {name: float(np.max(np.abs(found / expected - 1))) for name, found in losses.items()}
    if max(differences.values()) > TOLERANCE:
        sys.exit(f"the sides do not train the same model: losses differ by {differences}")

    rounds = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, step in sides.items():
            step(batches[0])  # not timed: the other side's threads come to rest
            times = []
            for i in range(arguments.steps):
                began = time.perf_counter()
                step(batches[i % len(batches)])
                times.append(time.perf_counter() - began)
            rounds[name].append(1e3 * statistics.median(times))
    step_ms = {name: statistics.median(times) for name, times in rounds.items()}
    speedup = {name: step_ms[name] / step_ms["stepjax"] for name in step_ms if name != "stepjax"}
    figures = {
        "command": "python benchmarks/train_step_vs_pytorch.py",
        "torch": torch.__version__,
        "threads": num_cores(),
        "largest_relative_difference_of_losses": differences,
        "step_ms": step_ms,
        "step_ms_of_rounds": rounds,
        "stepjax_is_faster_by": speedup,
    }
    path = machine.write("train_step_vs_pytorch", figures)
    for name, milliseconds in step_ms.items():
        print(f"  {name:<18} {milliseconds:7.1f} ms a step")
    for name, ratio in speedup.items():
        print(f"  stepjax is {ratio:.2f} x as fast as {name}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
