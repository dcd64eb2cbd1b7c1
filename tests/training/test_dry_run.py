"""What `--dry-run` says of a run, against sums made by hand, and that it says it at no cost."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import config as tiny

from stepjax.errors import ConfigError
from stepjax.training.dry_run import describe

ROOT = Path(__file__).parent.parent.parent
PARAMETERS = 10_171_750_144


@pytest.fixture(scope="module")
def page_and_memory():
    """The page of the 10B recipe from the command line, on one device, and the most memory that took, in bytes."""
    # Not getrusage: after a fork it remembers what the parent took.
    code = (
        "import re, sys; from stepjax.cli import main; status = main(sys.argv[1:]); "
        "print('MAXRSS', re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    arguments = ["pretrain", "configs/step3_vl_10b/pretrain.py", "--dry-run", "--tokenizer.path", "demo"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    page, _, kib = result.stdout.partition("MAXRSS")
    return page, int(kib) * 1024


def number(page: str, pattern: str) -> float:
    match = re.search(pattern, page)
    assert match, page
    value, suffix = re.fullmatch(r"([\d.,]+)([kMBT]?)", match[1]).groups()
    return float(value.replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[suffix]


def test_the_10b_takes_no_memory(page_and_memory):
    _, memory = page_and_memory
    assert memory < 2**30


def test_parameters_of_the_10b(page_and_memory):
    page, _ = page_and_memory
    assert f"parameters  {PARAMETERS:,}, of which {PARAMETERS:,} trained" in page
    parts = [number(page, rf"  {part} +([\d,]+)\n") for part in ("vision", "projector", "decoder")]
    assert sum(parts) == PARAMETERS


def test_memory_of_the_10b(page_and_memory):
    page, _ = page_and_memory
    GiB = 2**30
    assert number(page, r"parameters +([\d.]+) GiB") == pytest.approx(4 * PARAMETERS / GiB, abs=0.006)
    assert number(page, r"gradients +([\d.]+) GiB") == pytest.approx(4 * PARAMETERS / GiB, abs=0.006)
    assert number(page, r"optimizer +([\d.]+) GiB") == pytest.approx(8 * PARAMETERS / GiB, abs=0.006)
    # 4,096 rows of 8 views of 728 x 728 and 36 crops of 504 x 504 in bfloat16, and six arrays of 8,192 tokens.
    batch = 4096 * ((8 * 728**2 + 36 * 504**2) * 6 + 8192 * 24)
    assert number(page, r"batch +([\d.]+) GiB") == pytest.approx(batch / GiB, abs=0.006)
    # bfloat16, one of 64 micro-batches: 36 layers of 8,192 tokens, and 47 layers of the patches.
    residuals = 4096 // 64 * (36 * 8192 * 4096 + 47 * (8 * 52**2 + 36 * 36**2) * 1536) * 2
    assert number(page, r"layer inputs +([\d.]+) GiB") == pytest.approx(residuals / GiB, abs=0.006)
    total = (16 * PARAMETERS + batch + residuals) / GiB
    assert number(page, r"memory +([\d.]+) GiB in all") == pytest.approx(total, abs=0.03)


def test_steps_and_flops_of_the_10b(page_and_memory):
    page, _ = page_and_memory
    tokens = 8192 * 4096
    assert number(page, r"steps +([\d,]+) of") == -(-1_200_000_000_000 // tokens)
    # Six FLOPs a parameter and token, and attention over half of 4,096^2 pairs an example; the embedding is a look-up.
    matrices = number(page, r"decoder +([\d,]+)\n") - 151_936 * 4096
    decoder = 6 * matrices * tokens + 3 * 36 * 4 * 4096 * tokens * 4097 / 2
    # Patches of the encoder likewise; each sees all patches of its view.
    patches = 8 * 52**2 + 36 * 36**2
    pairs = 8 * 52**4 + 36 * 36**4
    blocks = 47 * (4 * 1536**2 + 2 * 1536 * 8960)
    encoder = 4096 * (6 * blocks * patches + 3 * 47 * 4 * 1536 * pairs)
    flops = number(page, r"FLOPs +([\d.]+T?) per step")
    # What is left is small: the patch embedding, the two convolutions and the projector.
    assert decoder + encoder < flops < 1.05 * (decoder + encoder)


def test_the_page_holds_the_configuration_and_what_was_overridden(page_and_memory):
    page, _ = page_and_memory
    assert "  optimizer.beta2 = 0.95\n" in page
    assert "  tokenizer.path = 'demo'\n" in page
    assert "  tokenizer.path: 'data/tokenizer.json' -> 'demo'\n" in page
    assert "the run would live in runs/step3_vl_10b" in page


def test_frozen_parameters_are_not_counted_as_trained_and_need_no_moments():
    frozen = dataclasses.replace(tiny, optimizer=dataclasses.replace(tiny.optimizer, freeze=("vision", "projector")))
    page = describe(frozen, tiny)
    decoder = number(page, r"decoder +([\d,]+)\n")
    assert f"of which {int(decoder):,} trained" in page
    assert "optimizer.freeze: () -> ('vision', 'projector')" in page


def test_nothing_is_written_and_the_recipe_itself_has_no_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = describe(tiny, tiny)
    assert "overrides of the recipe\n  none\n" in page
    assert "steps       16 of 256 tokens, 6 global views (56 px, 1 tokens) and 48 crops (28 px, 1 tokens)" in page
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(optimizer=dataclasses.replace(tiny.optimizer, freeze=("nothing",))), "'nothing' matches no parameter"),
        (
            dict(model=dataclasses.replace(tiny.model, decoder=dataclasses.replace(tiny.model.decoder, vocab_size=99))),
            "model.decoder.vocab_size=99: the tokenizer has",
        ),
    ],
)
def test_what_the_run_would_refuse_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        describe(dataclasses.replace(tiny, **changes), tiny)
