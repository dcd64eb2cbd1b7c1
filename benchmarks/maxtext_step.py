"""Compile MaxText's train step ahead of time for a TPU topology; write the scheduled program and its memory.

plan_vs_maxtext.py runs this with the Python of an environment that has MaxText 0.2.5:

    python benchmarks/maxtext_step.py OUT.hlo OUT.json OPTIONS.json KEY=VALUE ...

KEY=VALUE override settings in MaxText's base.yml; OPTIONS.json has the compiler's options. The script calls the same
functions as `python -m maxtext.trainers.pre_train.train_compile`, so it compiles the same step. OUT.json has the memory
of a device in bytes and the chips' coordinates in mesh order, or the compiler's refusal.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["LIBTPU_INIT_ARGS"] = (
    f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_tpu_spmd_rng_bit_generator_unsafe=true"
)
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from flax.core.spmd import logical_axis_rules

from pallas_kernels.chips import compile_only_environment


def main(text_path: str, json_path: str, options_path: str, settings: list[str]) -> None:
    compile_only_environment()
    jax.config.update("jax_platforms", "cpu")
    # train_compile starts with this.
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_tpu_spmd_rng_bit_generator_unsafe=true"
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    import maxtext  # type: ignore[import-not-found]
    from maxtext.configs import pyconfig  # type: ignore[import-not-found]
    from maxtext.trainers.pre_train import train, train_compile  # type: ignore[import-not-found]
    from maxtext.utils import maxtext_utils, sharding  # type: ignore[import-not-found]

    base = Path(str(maxtext.__file__)).parent / "configs" / "base.yml"
    config = pyconfig.initialize(["train_compile", str(base), *settings])
    train_compile.validate_config(config)
    began = time.monotonic()
    mesh = train_compile.get_topology_mesh(config)
    arguments, keywords, state_shardings, _, model = train_compile.get_shaped_inputs(mesh, config)
    parameter_shardings, state_shardings = sharding.maybe_update_params_sharding_with_opt(config, state_shardings)
    inputs = sharding.build_zero1_input_state_mesh_shardings(config, state_shardings, parameter_shardings)
    data = sharding.get_input_data_sharding(config, mesh)
    step, in_shardings, out_shardings, static, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step, data, inputs, model, config, parameter_shardings
    )
    found: dict[str, Any] = {
        "places": [[getattr(d, "slice_index", 0) or 0, *d.coords] for d in mesh.devices.flat],
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "global_batch": config.global_batch_size_to_train_on,
        "parameters": sum(x.size for x in jax.tree.leaves(arguments[0].model) if getattr(x, "ndim", 0)),
    }
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        jitted = jax.jit(
            step,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            static_argnums=static,
            donate_argnums=donated,
        )
        lowered = jitted.lower(*arguments, **keywords)
    try:
        compiled = lowered.compile(compiler_options=json.loads(Path(options_path).read_text()))
    except jax.errors.JaxRuntimeError as error:
        found |= {"refused": str(error), "compile_seconds": time.monotonic() - began}
    else:
        memory: Any = compiled.memory_analysis()
        names = ("argument_size", "output_size", "alias_size", "temp_size", "peak_memory", "host_temp_size")
        found |= {name: getattr(memory, f"{name}_in_bytes", 0) for name in names}
        found["compile_seconds"] = time.monotonic() - began
        Path(text_path).write_text(compiled.as_text() or "")
    Path(json_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
