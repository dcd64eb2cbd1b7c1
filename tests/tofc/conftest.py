"""A small entropy model, trained for seconds on features as encoders give them: correlated, of unequal channels. And a
tiny run with a codec, which takes longer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from stepjax.cli import main
from stepjax.config import TofcConfig
from stepjax.tofc.hyperprior import Hyperprior, balance_sum, freeze

CONFIG = TofcConfig(width=32, experts=4, hidden=32, latents=4)
STEPS = 200
RECIPE = Path(__file__).parent.parent / "tiny_tofc.py"


@pytest.fixture(scope="session")
def sample_features():
    """A function from a count and a seed to features [count, 32]: three kinds, each with seven hidden causes."""
    rng = np.random.default_rng(5)
    causes = rng.standard_normal((3, 7, 32)) * np.linspace(3, 0.3, 32)
    middles = 3 * rng.standard_normal((3, 32))

    def sample(count, seed=0):
        rng = np.random.default_rng(seed)
        kind = rng.integers(0, 3, count)
        caused = np.einsum("nd,ndc->nc", rng.laplace(size=(count, 7)), causes[kind])
        return (20 + 4 * (middles[kind] + caused + 0.3 * rng.standard_normal((count, 32)))).astype(np.float32)

    return sample


@pytest.fixture(scope="session")
def trained(sample_features):
    """The `Hyperprior` after 200 steps on squared error + lambda * bits + balance."""
    model = Hyperprior(CONFIG, rngs=nnx.Rngs(0))
    model.calibrate(jnp.asarray(sample_features(2000)))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(model, state, x_NC, temperature):
        def loss(model):
            rate = model(x_NC, temperature=temperature)
            error = jnp.mean(jnp.square((rate.features_NC - x_NC) / model.spread[...]))
            return (
                error
                + 0.02 * jnp.mean(rate.bits_N) / CONFIG.channels
                + 0.1 * balance_sum(rate.weights_NE[None]) / len(x_NC)
            )

        updates, state = optimizer.update(jax.grad(loss)(model), state, model)
        return optax.apply_updates(model, updates), state

    state = optimizer.init(model)
    x_NC = sample_features(STEPS * 128, seed=1).reshape(STEPS, 128, -1)
    for index in range(STEPS):
        model, state = step(model, state, x_NC[index], 0.98**index + 0.02)
    return model


@pytest.fixture(scope="session")
def tables(trained):
    return freeze(trained)


@pytest.fixture(scope="session")
def run(finished_run, tmp_path_factory):
    """The tiny recipe, trained by the command line and frozen. Leave it as it is: all tests share it.

    A file that asks for it says `pytest_plugins = ("tiny_run",)`.
    """
    from tiny_run import _quick_runs

    out = tmp_path_factory.mktemp("runs")
    start = ["--init-from.decoder", str(finished_run.directory)]
    with _quick_runs():
        status = main(["tofc", "train", str(RECIPE), "--out", str(out), *start])
    assert status == 0
    return out / "tiny_tofc"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A picture with crops in two rows, and a small one without."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("large", (120, 80)), ("small", (40, 30))):
        pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{name}.png")
    return folder
