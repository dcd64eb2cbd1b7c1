"""Eight simulated CPU devices, and the small models that the tests share.

The device count must be set before JAX makes its backend, hence here and not in the tests that need it. Most tests
compile more than they compute, so code generation is told to hurry, which halves the time of a run and more. What XLA
does before it, partitioning over devices among it, is as always.
"""

import gc
import os
import shutil
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # LLVM's
if jax.__version_info__ < (0, 11):  # XLA refuses to start on a flag that it does not know (any more)
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    # One module a program: the tests' programs are small, and parts of them cost more together.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# Tracing makes objects by the million and leaves hardly a cycle: the collector's looks at them are a tenth of a test.
gc.set_threshold(50_000, 20, 50)

from jaxtyping import install_import_hook  # noqa: E402
from shape_checks import SHAPES_CHECKED  # noqa: E402

# Every call in the tests checks the shapes and dtypes that public functions state. It must precede the imports.
install_import_hook(SHAPES_CHECKED, "shape_checks.check_shapes")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from forked import ForkServer  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from stepjax.config import DecoderConfig, ImageConfig, ModelConfig, NumericsConfig, VisionConfig  # noqa: E402
from stepjax.interop.load import load_model, open_checkpoint  # noqa: E402
from stepjax.models.step_vl import abstract_model, init_model  # noqa: E402
from stepjax.processing.images import ImageViews, ViewPlan  # noqa: E402
from stepjax.processing.tokenizer import SpecialTokens  # noqa: E402
from stepjax.processing.tokens import TextSpan, assemble  # noqa: E402

DATA = Path(__file__).parent / "data"
FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
SPECIAL_TOKENS = SpecialTokens(
    end_of_text=55,
    turn_start=56,
    turn_end=57,
    image_patch=58,
    image_start=59,
    image_end=60,
    patch_start=61,
    patch_end=62,
    patch_newline=63,
)

# The files that take longest, the longest first: one that a process began last would keep the others waiting.
LONGEST = (
    "launch/test_processes.py",
    "training/test_loop.py",
    "inference/test_engine.py",
    "training/test_resume.py",
    "post_training/test_trainer.py",
    "post_training/test_rl_resume.py",
    "pallas_kernels/sampling/test_sampling_values.py",
    "pallas_kernels/shared_prefix_attention/test_shared_prefix_values.py",
    "test_sharding.py",
    "models/test_paged_cache.py",
    "training/test_step.py",
)


def pytest_collection_modifyitems(items):
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))  # stable: all else stays in its order


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """What one of the suite's processes has compiled, the others load, and the same process for another test."""
    top = tmp_path_factory.getbasetemp()
    path = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / "compilation_cache"
    path.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path


@pytest.fixture(scope="session")
def process_environment(compilation_cache):
    """The environment of processes that run `stepjax`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


@pytest.fixture(scope="session")
def forked(process_environment, tmp_path_factory):
    """Starts `stepjax` in processes that need not import it."""
    server = ForkServer(process_environment, tmp_path_factory.mktemp("forked"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. A developer's machine may lack it; where CI is set, its absence is a failure."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "Chromium is not installed (Debian: apt install chromium)"
        )
    from playwright.sync_api import sync_playwright

    offline = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", *offline])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def golden():
    """What the reference implementations compute from the tiny checkpoint (float32)."""
    return load_file(DATA / "tiny_vl_golden.safetensors")


@pytest.fixture(scope="session")
def tiny_dir():
    """The tiny checkpoint in the public layout."""
    return DATA / "tiny_vl"


@pytest.fixture(scope="session")
def tiny_vl(tiny_dir):
    """The tiny checkpoint as a float32 model, and its image configuration."""
    source = open_checkpoint(tiny_dir)
    return load_model(source, numerics=FLOAT32), source.spec.images


@pytest.fixture(scope="session")
def small_config():
    """A smaller model yet, whose every dimension divides over eight devices where the table spreads it."""
    return ModelConfig(
        vision=VisionConfig(width=32, num_layers=2, num_heads=2, mlp_dim=48, patch_size=4, position_grid=6),
        decoder=DecoderConfig(
            vocab_size=64,
            width=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_dim=48,
            max_positions=128,
        ),
    )


@pytest.fixture(scope="session")
def small_images():
    """The views of `small_config`: 4 features a global view, 1 a crop."""
    return ImageConfig(global_size=24, crop_size=16, patch_size=4)


@pytest.fixture(scope="session")
def randomized():
    """A function that fills an abstract model with normal values, one seed a model.

    Unlike initial values these exercise biases and norm scales, and unlike `init_model` it compiles nothing.
    """

    def fill(abstract, seed=0, spread=0.3):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: jax.numpy.asarray(spread * rng.standard_normal(leaf.shape), leaf.dtype), abstract
        )

    return fill


@pytest.fixture(scope="session")
def small_model(small_config, randomized):
    """A float32 model of `small_config`."""
    return randomized(abstract_model(small_config, FLOAT32))


@pytest.fixture(scope="session")
def initial_model(small_config):
    """`init_model` of `small_config` with seed 3, on one device."""
    return init_model(small_config, FLOAT32, seed=3)


@pytest.fixture(scope="session")
def make_example(small_images):
    """A function from parts to an example for `small_model`: n is that many text tokens, (columns, rows) an image."""

    def image(rng, columns, rows):
        side, crop_side = small_images.global_size, small_images.crop_size
        plan = ViewPlan((side, side), (side, side), (side, side), (side, side), crop_side, columns, rows)
        pixels = [rng.standard_normal(s) for s in ((side, side, 3), (columns * rows, crop_side, crop_side, 3))]
        return ImageViews(*(p.astype(np.float32) for p in pixels), plan)

    def make(*parts, seed=0):
        rng = np.random.default_rng([seed, len(parts)])
        spans = [
            TextSpan(rng.integers(0, 55, part).tolist(), 1.0) if isinstance(part, int) else image(rng, *part)
            for part in parts
        ]
        return assemble(f"example-{seed}", spans, small_images, SPECIAL_TOKENS)

    return make


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """That of the demo."""
    from stepjax.processing.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    load_tokenizer("demo").save(path)
    return str(path)
