"""Compiler flags for each chip, each with its reason. `python -m stepjax.xla_flags v5p` prints them.

    export LIBTPU_INIT_ARGS="$(python -m stepjax.xla_flags v5p)"     # TPUs
    export XLA_FLAGS="$(python -m stepjax.xla_flags h100)"           # GPUs

`stepjax plan` compiles with the same flags, so it plans what runs.
"""

import sys
from collections.abc import Sequence

from stepjax.errors import ConfigError

Flags = dict[str, str]  # "name=value": the reason

# The compiler refuses these for every chip but v5e, which has no sparse cores.
_FUSED_COLLECTIVES: Flags = {
    "xla_tpu_enable_async_collective_fusion=true": "weights are gathered while the previous layer computes",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": "the same, for FSDP's gathers",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true": "a gather may span several fusions",
    "xla_tpu_overlap_compute_collective_tc=true": "collectives run beside the matrix unit, not between its products",
    "xla_enable_async_all_gather=true": "every gather may be asynchronous, not only fused ones",
}
_SPARSE_CORES: Flags = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather=true": "the sparse cores gather during compute",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true": "the same over three axes of a torus",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true": "the same over two",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true": "otherwise whole gradients are reduced",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true": "the same over several axes",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce=true": "for parameters that are not sharded",
}
_DOTS: Flags = {"xla_tpu_dot_dot_fusion=false": "fusing two products of an MLP doubled their time"}
_MULTI_SLICE: Flags = {
    "xla_tpu_enable_data_parallel_all_reduce_opt=true": "gradients cross slices while layers still compute",
    "xla_tpu_data_parallel_opt_different_sized_ops=true": "the same, for matrices of several sizes",
}
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_OF_128_MIB: Flags = {f"{_VMEM}=98304": "96 of 128 MiB: larger tiles for fused matrix products"}

FLAGS: dict[str, Flags] = {
    "v5e": _DOTS | _FUSED_COLLECTIVES | _MULTI_SLICE | _OF_128_MIB,
    "v5p": _DOTS | _SPARSE_CORES | _MULTI_SLICE | {f"{_VMEM}=49152": "48 of 64 MiB: fused products a tenth faster"},
    "v6e": _DOTS | _SPARSE_CORES | _MULTI_SLICE | _OF_128_MIB,
    "tpu7x": _DOTS | _SPARSE_CORES | _MULTI_SLICE | {f"{_VMEM}=49152": "48 of 64 MiB, as on v5p"},
    "h100": {
        "xla_gpu_enable_latency_hiding_scheduler=true": "gathers of the next layer overlap this one",
        "xla_gpu_enable_pipelined_all_gather=true": "the gather for the next step of a scan starts in this one",
        "xla_gpu_enable_pipelined_reduce_scatter=true": "the same for gradients",
    },
}


def flags(chip: str) -> Flags:
    """The flags of a chip.

    Raises:
        ConfigError: the chip is unknown.
    """
    if chip not in FLAGS:
        raise ConfigError(f"no compiler flags for chip {chip!r}; choose from {', '.join(FLAGS)}")
    return FLAGS[chip]


def compiler_options(chip: str) -> dict[str, str]:
    """The flags in the form that `jax.stages.Lowered.compile` takes."""
    return dict(flag.split("=") for flag in flags(chip))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m stepjax.xla_flags {{{','.join(FLAGS)}}}")
        return 0 if "-h" in arguments or "--help" in arguments else 2
    try:
        print(" ".join(f"--{flag}" for flag in flags(arguments[0])))
    except ConfigError as error:
        print(f"stepjax.xla_flags: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
