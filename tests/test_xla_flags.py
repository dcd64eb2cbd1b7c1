"""Flags that the compiler knows, printed as the environment takes them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import chips
from stepjax import xla_flags
from stepjax.errors import ConfigError
from tests.pallas_kernels.aot import needs_libtpu


@needs_libtpu
@pytest.mark.parametrize("chip", tuple(chips.CHIPS))
def test_the_compiler_takes_every_flag(chip, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    mesh = chips.compile_only_mesh(chip)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda x: x @ x.T).lower(x)
    lowered.compile(compiler_options=xla_flags.compiler_options(chip))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_flag"):
        lowered.compile(compiler_options={"xla_no_such_flag": "true"})


def test_there_are_flags_for_every_chip_and_each_has_a_reason():
    assert set(chips.CHIPS) <= set(xla_flags.FLAGS)
    for chip, flags in xla_flags.FLAGS.items():
        assert len(xla_flags.compiler_options(chip)) == len(flags), "a flag is set twice"
        assert all(flags.values())


def test_command_prints_them_for_the_shell():
    command = [sys.executable, "-m", "stepjax.xla_flags"]
    printed = subprocess.run([*command, "v5p"], capture_output=True, text=True, env=os.environ, check=True).stdout
    assert printed.split() == [f"--{name}={value}" for name, value in xla_flags.compiler_options("v5p").items()]
    refused = subprocess.run([*command, "v1"], capture_output=True, text=True, env=os.environ, check=False)
    assert refused.returncode == 1 and "no compiler flags for chip 'v1'; choose from v5e" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_unknown_chip_is_refused():
    with pytest.raises(ConfigError, match="chip 'v1'"):
        xla_flags.flags("v1")
