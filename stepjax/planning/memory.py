"""What a device has to hold, by kind: read from the compiled program, and by arithmetic before anything is compiled.

The arithmetic serves to leave out what cannot fit and to say what would help. It knows what a layer keeps under each
rematerialisation policy and the few buffers that are larger than all others; what the compiler makes of the rest it
does not, so that it is no substitute for the compiler's figure.
"""

import dataclasses
import functools
import math

from stepjax.config import ModelConfig, PretrainConfig, RematPolicy
from stepjax.models.step_vl import abstract_model, num_parameters
from stepjax.planning.compile import GIB, CompiledStep
from stepjax.planning.hlo import Operation, Program, arrays

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Memory:
    """GiB of one device."""

    parameters: float
    optimizer: float
    batch: float
    activations: float  # kept by the forward pass for the backward pass
    gradients: float
    temporaries: float  # everything else

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def of_program(step: CompiledStep, program: Program) -> Memory:
    """Of a compiled step. What the compiler gives beyond the parts that are recognised is `temporaries`."""
    kept, gradients = _stacks(program)
    # Padding of small dimensions makes the arguments larger than their shapes say.
    padded = step.argument_bytes - step.parameter_bytes - step.optimizer_bytes - step.batch_bytes
    rest = step.total_bytes - step.argument_bytes - kept - gradients + max(padded, 0)
    if rest < 0:  # stacks whose lives do not overlap share their room
        kept, gradients, rest = kept + rest, gradients, 0
    return Memory(
        *(x / GIB for x in (step.parameter_bytes, step.optimizer_bytes, step.batch_bytes, kept, gradients, rest))
    )


def of_arguments(step: CompiledStep) -> Memory:
    """What is certain of a step that does not fit: what it is called with."""
    return Memory(step.parameter_bytes / GIB, step.optimizer_bytes / GIB, step.batch_bytes / GIB, 0.0, 0.0, 0.0)


def _stacks(program: Program) -> tuple[int, int]:
    """Bytes that loops fill, an entry a layer: activations in forward loops, gradients in backward loops."""
    kept = gradients = 0
    for computation, operations in program.computations.items():
        for operation in operations:
            if operation.opcode != "while" or not operation.operands:
                continue
            trips = program.trips(operation)
            initial = program.operation(computation, operation.operands[0])
            if initial is None or initial.opcode != "tuple" or trips is None:
                continue
            fresh = [program.operation(computation, name) for name in initial.operands]
            size = sum(
                array.bytes
                for source, array in zip(fresh, arrays(operation.shape), strict=True)
                if source is not None and _is_fresh(source) and array.dims[:1] == (trips,) and len(array.dims) > 1
            )
            if "transpose(" in operation.op_name:
                gradients += size
            else:
                kept += size
    return kept, gradients


def _is_fresh(operation: Operation) -> bool:
    return operation.custom_call_target == "AllocateBuffer" or operation.opcode == "broadcast"


# Before anything is compiled ------------------------------------------------------------------------------------------


@functools.cache
def parameter_count(config: ModelConfig) -> int:
    return num_parameters(abstract_model(config))


def predict(config: PretrainConfig, num_devices: int) -> Memory:
    """What a device would hold, by arithmetic. Temporaries are the few large ones, with their copies."""
    model, numerics, batch, images = config.model, config.numerics, config.batch, config.images
    slices, data, fsdp, context, tensor = config.mesh.shape(num_devices)
    rows = batch.rows / batch.accumulation / (slices * data * fsdp)  # of a micro-batch, on a device
    width = _BYTES[numerics.compute_dtype]
    parameters = parameter_count(model) * _BYTES[numerics.param_dtype] / (fsdp * tensor)
    pixels = batch.global_views * images.global_size**2 + batch.crops * images.crop_size**2
    in_batch = batch.rows / (slices * data * fsdp) * (3 * width * pixels + 6 * 4 * batch.tokens)

    tokens = rows * batch.tokens / context
    patches = rows * (batch.global_views * images.global_grid**2 + batch.crops * images.crop_grid**2) / context
    decoder, vision = model.decoder, model.vision
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    of_token = _kept(
        numerics.remat,
        decoder.width,
        heads + 2 * kv_heads,
        heads,
        decoder.num_heads,
        2 * decoder.mlp_dim,
        tensor,
        width,
    )
    of_patch = _kept(
        numerics.policy_of_encoder,
        vision.width,
        3 * vision.width,
        vision.width,
        vision.num_heads,
        vision.mlp_dim,
        tensor,
        width,
    )
    activations = tokens * decoder.num_layers * of_token + patches * vision.num_layers * of_patch

    # The widest arrays of a layer in its backward pass, and the output projection whole with its gradient.
    largest_patches = (
        rows * max(batch.global_views * images.global_grid**2, batch.crops * images.crop_grid**2) / context
    )
    layer = 3 * width * max(tokens * 2 * decoder.mlp_dim, largest_patches * vision.mlp_dim) / tensor
    head = decoder.width * decoder.vocab_size / tensor * (4 + width)
    logits = 2 * 4 * min(numerics.loss_chunk, tokens) * decoder.vocab_size / tensor
    scores = 0.0
    if numerics.attention == "xla":  # made whole, in float32, with their exponentials
        of_decoder, of_crops, of_globals = (
            2 * 4 * rows * seen / (context * tensor)
            for seen in (
                batch.tokens**2 * decoder.num_heads,
                batch.crops * images.crop_grid**4 * vision.num_heads,
                batch.global_views * images.global_grid**4 * vision.num_heads,
            )
        )
        scores = max(of_decoder, of_crops, of_globals)
        activations += of_decoder * decoder.num_layers * (numerics.remat == "none")
        activations += (of_crops + of_globals) * vision.num_layers * (numerics.policy_of_encoder == "none")
    gradients = parameters * (2 if batch.accumulation > 1 else 1)
    parts = (parameters, 2 * parameters, in_batch, activations, gradients, layer + head + logits + scores)
    return Memory(*(part / GIB for part in parts))


def _kept(
    policy: RematPolicy, width: int, qkv: int, attended: int, heads: int, hidden: int, tensor: int, size: int
) -> float:
    """Bytes a token of a layer leaves for the backward pass."""
    attention = size * attended / tensor + 4 * heads / tensor  # output and log-sum-exp
    projections = size * ((qkv + hidden) / tensor + 2 * width)
    if policy == "full":
        return size * width
    if policy == "attention":
        return size * width + attention
    if policy == "qkv":
        return size * width + attention + size * qkv / tensor
    if policy == "dots":
        return size * width + projections + attention
    # Everything: norms and activation functions keep their inputs besides, some of them in float32.
    return size * 5 * width + attention + projections + size * (2 * qkv + hidden) / tensor


def advice(config: PretrainConfig, num_devices: int, limit_gib: float, needed_gib: float | None) -> list[str]:
    """Changes that would cut the memory of a device, each with what arithmetic says of it.

    The smallest that should suffice comes first; of those that should not, only the three that save most are named.
    """
    now = predict(config, num_devices)
    needed = max(needed_gib or 0.0, now.total)
    enough, short = [], []
    for label, other in _alternatives(config, num_devices):
        saved = now.total - predict(other, num_devices).total
        left = needed - saved
        if left < 0.9 * limit_gib:
            enough.append((saved, f"{label}: about {saved:.1f} GiB less, fits"))
        elif left <= limit_gib:
            short.append((left, f"{label}: about {saved:.1f} GiB less, barely fits"))
        elif saved > 0.01 * now.total:
            short.append((left, f"{label}: about {saved:.1f} GiB less, still {left - limit_gib:.1f} GiB too much"))
    return [line for _, line in sorted(enough) + sorted(short)[:3]]


def _alternatives(config: PretrainConfig, num_devices: int) -> list[tuple[str, PretrainConfig]]:
    batch, found = config.batch, []
    slices, data, fsdp, _, _ = config.mesh.shape(num_devices)
    groups = slices * data * fsdp
    for factor in (2, 4, 8, 16, 32, 64):
        accumulation = batch.accumulation * factor
        if batch.rows % (accumulation * groups) == 0:
            smaller = dataclasses.replace(batch, accumulation=accumulation)
            label = f"--batch.accumulation {accumulation} (the same step in {accumulation} parts)"
            found.append((label, dataclasses.replace(config, batch=smaller)))
    for factor in (2, 4, 8, 16):
        rows = batch.rows // factor
        if rows and rows % (batch.accumulation * groups) == 0:
            smaller = dataclasses.replace(batch, rows=rows)
            label = f"--batch.rows {rows} (a smaller global batch; the pixels shrink with it)"
            found.append((label, dataclasses.replace(config, batch=smaller)))
    for field in ("encoder_remat", "remat"):
        if getattr(config.numerics, field) not in ("full", None):
            numerics = dataclasses.replace(config.numerics, **{field: "full"})
            found.append((f"--numerics.{field} full", dataclasses.replace(config, numerics=numerics)))
    if config.numerics.attention == "xla":
        numerics = dataclasses.replace(config.numerics, attention="auto")
        label = "--numerics.attention auto (a kernel that does not hold the scores)"
        found.append((label, dataclasses.replace(config, numerics=numerics)))
    if data > 1:
        mesh = dataclasses.replace(config.mesh, data=1, fsdp=-1)
        label = "--mesh.data 1 --mesh.fsdp -1 (no copies of the parameters)"
        found.append((label, dataclasses.replace(config, mesh=mesh)))
    if batch.crops > 1:
        smaller = dataclasses.replace(batch, crops=math.ceil(batch.crops / 2))
        label = f"--batch.crops {smaller.crops} (half the crop slots of a row)"
        found.append((label, dataclasses.replace(config, batch=smaller)))
    return found
