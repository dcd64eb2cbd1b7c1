"""Compiler flags for each chip, with the reason for each. `python -m stepjax.xla_flags v5p` prints them.

    export LIBTPU_INIT_ARGS="$(python -m stepjax.xla_flags v5p)"     # TPUs
    export XLA_FLAGS="$(python -m stepjax.xla_flags h100)"           # GPUs

`stepjax plan` compiles with the same flags, so that what is planned is what runs.
"""

import dataclasses
import sys
from collections.abc import Sequence

from stepjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    value: str
    reason: str


# The compiler refuses these for every chip but v5e, which has no sparse cores.
_FUSED_COLLECTIVES = (
    Flag("xla_tpu_enable_async_collective_fusion", "true", "weights are gathered while the layer before computes"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "the same, for the gathers of FSDP"),
    Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "a gather may span several fusions"),
    Flag("xla_tpu_overlap_compute_collective_tc", "true", "collectives run beside the matrix unit, not between"),
    Flag("xla_enable_async_all_gather", "true", "every gather may be asynchronous, not the fused ones only"),
)
_SPARSE_CORES = (
    Flag("xla_tpu_enable_sparse_core_collective_offload_all_gather", "true", "the sparse cores gather meanwhile"),
    Flag("xla_tpu_enable_sparse_core_collective_offload_3d_all_gather", "true", "the same over three axes of a torus"),
    Flag("xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", "true", "the same over two"),
    Flag(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        "true",
        "without it, gradients are reduced whole",
    ),
    Flag("xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter", "true", "the same over several axes"),
    Flag("xla_tpu_enable_sparse_core_collective_offload_all_reduce", "true", "for parameters that are not divided"),
)
_DOTS = Flag(
    "xla_tpu_dot_dot_fusion", "false", "two products of an MLP in one fusion took twice the time of two fusions"
)
_MULTI_SLICE = (
    Flag("xla_tpu_enable_data_parallel_all_reduce_opt", "true", "gradients cross slices while layers still compute"),
    Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true", "the same, for matrices of several sizes"),
)


def _vmem(kib: int, reason: str) -> Flag:
    return Flag("xla_tpu_scoped_vmem_limit_kib", str(kib), reason)


FLAGS: dict[str, tuple[Flag, ...]] = {
    "v5e": (
        _DOTS,
        *_FUSED_COLLECTIVES,
        *_MULTI_SLICE,
        _vmem(98304, "of 128 MiB: larger tiles for fused matrix products"),
    ),
    "v5p": (_DOTS, *_SPARSE_CORES, *_MULTI_SLICE, _vmem(49152, "of 64 MiB: fused matrix products a tenth faster")),
    "v6e": (_DOTS, *_SPARSE_CORES, *_MULTI_SLICE, _vmem(98304, "of 128 MiB: larger tiles for fused matrix products")),
    "tpu7x": (_DOTS, *_SPARSE_CORES, *_MULTI_SLICE, _vmem(49152, "of 64 MiB: as v5p")),
    "h100": (
        Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "gathers of the next layer overlap this one"),
        Flag("xla_gpu_enable_pipelined_all_gather", "true", "the gather of a scan's next step starts in this one"),
        Flag("xla_gpu_enable_pipelined_reduce_scatter", "true", "the same for gradients"),
    ),
}


def flags(chip: str) -> tuple[Flag, ...]:
    """The flags of a chip.

    Raises:
        ConfigError: there are none for it.
    """
    if chip not in FLAGS:
        raise ConfigError(f"no compiler flags for chip {chip!r}; there are {', '.join(FLAGS)}")
    return FLAGS[chip]


def as_arguments(chip: str) -> str:
    """The flags as the environment variables take them."""
    return " ".join(f"--{flag.name}={flag.value}" for flag in flags(chip))


def compiler_options(chip: str) -> dict[str, str]:
    """The flags as `jax.stages.Lowered.compile` takes them."""
    return {flag.name: flag.value for flag in flags(chip)}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m stepjax.xla_flags {{{','.join(FLAGS)}}}")
        return 0 if "-h" in arguments or "--help" in arguments else 2
    try:
        print(as_arguments(arguments[0]))
    except ConfigError as error:
        print(f"stepjax.xla_flags: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
