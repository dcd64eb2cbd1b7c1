"""The settings that plan_vs_maxtext.py tries: ours, and MaxText's.

MaxText's are its own recipes for the chip, without the flags that libtpu 0.0.52 refuses on these chips, and settings
that we found to be better for it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from packed_attention_rates import Kernel

TOKENS = 4096
Side = Literal["stepjax", "maxtext"]
SIDES: tuple[Side, ...] = ("stepjax", "maxtext")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run the step: overrides of the side's common settings."""

    label: str
    values: dict[str, Any]
    flags: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # None removes a flag
    attention: Kernel = "ours"
    is_recipe: bool = False  # close to what MaxText publishes for the chip


def splash(forward: int, q_dkv: int, kv_dkv: int, kv_dkv_compute: int) -> dict[str, int]:
    """Block sizes by MaxText's names; the forward pass uses square blocks."""
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = (forward, forward, forward, q_dkv, kv_dkv, kv_dkv_compute)
    return {f"sa_{name}": size for name, size in zip(names, sizes, strict=True)}


# From MaxText's benchmarks/xla_flags_library.py: HOST_OFFLOAD_FLAGS, LAYOUT_FOR_ALL_REDUCE_SCATTER.
HOST_OFFLOAD = {
    "xla_tpu_enable_all_experimental_scheduler_features": "true",
    "xla_tpu_enable_scheduler_memory_pressure_tracking": "true",
    "xla_tpu_host_transfer_overlap_limit": "24",
    "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
    "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_should_allow_loop_variant_parameter_in_chain": "ENABLED",
    "xla_should_add_loop_invariant_op_in_chain": "ENABLED",
    "xla_max_concurrent_host_send_recv": "100",
    "xla_tpu_scheduler_percent_shared_memory_limit": "100",
    "xla_latency_hiding_scheduler_rerun": "2",
}
ALL_REDUCE_SCATTER = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}
OFFLOADED = ("decoder_layer_input", "out_proj", "query_proj", "key_proj", "value_proj")
OFFLOAD = {"remat_policy": "custom"} | dict.fromkeys(OFFLOADED, "offload")
# Of 64 MiB per core. Matrix products get larger tiles: on v5p both sides' steps take a fifth less time with it.
VMEM = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
OWN_VMEM = {"xla_tpu_scoped_vmem_limit_kib": None}  # MaxText's recipe leaves it to the compiler
ONE_BLOCK = splash(512, 1024, 4096, 1024)  # backward with all keys in one block: no partial query gradients to sum

ROWS = {"v5p-128": 4, "v6e-256": 8}  # per chip and step
SETTINGS: dict[tuple[str, Side], tuple[Setting, ...]] = {
    ("v5p-128", "stepjax"): (Setting("remat dots", {"remat": "dots"}, VMEM),),
    ("v6e-256", "stepjax"): (Setting("remat qkv, 2 x 4 rows", {"remat": "qkv", "accumulation": 2}),),
    ("v5p-128", "maxtext"): (
        Setting("remat minimal", {"remat_policy": "minimal"} | splash(*(4 * [1024])), OWN_VMEM, "jax_splash", True),
        Setting(
            "remat minimal_with_context, tokamax",
            {"remat_policy": "minimal_with_context", "use_tokamax_splash": True} | splash(*(4 * [1024])),
            OWN_VMEM,
            "tokamax",
        ),
        Setting(
            "remat minimal_with_context, keys in one block",
            {"remat_policy": "minimal_with_context"} | ONE_BLOCK,
            VMEM,
            "jax_splash",
        ),
    ),
    ("v6e-256", "maxtext"): (
        Setting(
            "offload, tokamax",
            OFFLOAD | {"num_vocab_tiling": 8, "use_tokamax_splash": True} | splash(*(4 * [1024])),
            HOST_OFFLOAD | ALL_REDUCE_SCATTER,
            "tokamax",
            True,
        ),
        Setting(
            "offload, context on the device, keys in one block",
            OFFLOAD | {"context": "device", "num_vocab_tiling": 8} | ONE_BLOCK,
            HOST_OFFLOAD | ALL_REDUCE_SCATTER,
            "jax_splash",
        ),
    ),
}
