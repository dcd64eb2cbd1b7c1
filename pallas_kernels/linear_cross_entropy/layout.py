"""How the operation's arrays are spread over a mesh, and what the devices exchange for it."""

import dataclasses
import math

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.checks import check

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh axes that each dimension is spread over; () is none.

    Every device scores its own tokens against its part of the vocabulary. `width` is how the kernel lies between uses
    (fully sharded data parallelism): it is gathered once a pass and its gradient scattered once, so its axes must be
    among those of the tokens.
    """

    rows: Axes = ()
    length: Axes = ()
    width: Axes = ()
    vocab: Axes = ()

    @property
    def tokens(self) -> Axes:
        return self.rows + self.length

    @property
    def token_spec(self) -> PartitionSpec:
        return PartitionSpec(self.rows or None, self.length or None)

    @property
    def hidden_spec(self) -> PartitionSpec:
        return PartitionSpec(*self.token_spec, None)

    @property
    def kernel_spec(self) -> PartitionSpec:
        return PartitionSpec(self.width or None, self.vocab or None)

    def check(self, rows: int, length: int, width: int, vocab: int) -> None:
        """Refuse a layout that the mesh in scope cannot give to arrays of these sizes."""
        mesh = jax.sharding.get_abstract_mesh()
        dimensions = (("rows", rows), ("length", length), ("width", width), ("vocab", vocab))
        for name, size in dimensions:
            axes = getattr(self, name)
            missing = [axis for axis in axes if axis not in mesh.axis_names]
            check(
                not missing,
                f"layout.{name} is {axes}; the mesh in scope has axes {mesh.axis_names}: enter the mesh with "
                "jax.set_mesh, or leave the layout out",
            )
            parts = math.prod(mesh.shape[axis] for axis in axes)
            check(
                size % parts == 0,
                f"layout.{name} is {axes}, {parts} devices, and does not divide {size}; spread it over fewer",
            )
        check(
            set(self.width) <= set(self.tokens),
            f"layout.width is {self.width}; it must be among the axes of the tokens, {self.tokens}",
        )
        doubled = set(self.vocab) & set(self.tokens)
        check(not doubled, f"layout.vocab is {self.vocab}; {sorted(doubled)} spread the tokens already")


def gather_width(kernel_DV: jax.Array, layout: Layout) -> jax.Array:
    return jax.lax.all_gather(kernel_DV, layout.width, axis=0, tiled=True) if layout.width else kernel_DV


def sum_over_tokens(kernel_grad_DV: jax.Array, layout: Layout) -> jax.Array:
    """Add up the devices' gradients of the kernel and leave each with its rows of it."""
    if layout.width:
        kernel_grad_DV = jax.lax.psum_scatter(kernel_grad_DV, layout.width, scatter_dimension=0, tiled=True)
    others = tuple(axis for axis in layout.tokens if axis not in layout.width)
    return jax.lax.psum(kernel_grad_DV, others) if others else kernel_grad_DV


def sum_over_vocab(x: jax.Array, layout: Layout) -> jax.Array:
    return jax.lax.psum(x, layout.vocab) if layout.vocab else x


def max_over_vocab(x: jax.Array, layout: Layout) -> jax.Array:
    return jax.lax.pmax(x, layout.vocab) if layout.vocab else x


def first_token_id(vocab_here: int, layout: Layout) -> int | jax.Array:
    """The id of the first token of this device's part of the vocabulary."""
    return jax.lax.axis_index(layout.vocab) * vocab_here if layout.vocab else 0
