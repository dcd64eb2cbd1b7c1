"""Copies of transposed views, in pieces: what PyTorch stores [out, in] lies [in, out] here."""

from collections.abc import Iterator

import numpy as np

PIECE_BYTES = 128 << 20  # the largest matrix of a layer of the 10B model has 101 million
_RUN_BYTES = 16  # copied of a row at a time


def packed(view: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """A contiguous array of the values, cast if asked; the view itself where it is that already.

    A transposed view is copied a few columns at a time: NumPy alone misses the cache at every value, and takes four
    times as long for the matrices of the 10B model.
    """
    dtype = dtype or view.dtype
    if not view.flags.c_contiguous:
        # Extension types such as bfloat16 are copied slowly; their bits as integers are not.
        bits = view.view(f"u{view.itemsize}") if view.dtype.kind == "V" else view
        source = _merged(bits)
        copy = np.empty(source.shape, bits.dtype)
        step = max(1, _RUN_BYTES // view.itemsize)
        for column in range(0, source.shape[-1], step):
            copy[..., column : column + step] = source[..., column : column + step]
        view = copy.reshape(view.shape).view(view.dtype)
    return view if view.dtype == dtype else view.astype(dtype)


def pieces(view: np.ndarray) -> Iterator[np.ndarray]:
    """The array cut along its first dimension into parts of about 128 MiB, in order."""
    if view.ndim == 0:
        yield view
        return
    rows = max(1, PIECE_BYTES // max(1, view[:1].nbytes))
    for first in range(0, view.shape[0], rows):
        yield view[first : first + rows]


def _merged(view: np.ndarray) -> np.ndarray:
    """The same values in the same order, with dimensions joined that lie in one stride."""
    shape, strides = [view.shape[0]], [view.strides[0]]
    for size, stride in zip(view.shape[1:], view.strides[1:], strict=True):
        if strides[-1] == size * stride:
            shape[-1], strides[-1] = shape[-1] * size, stride
        else:
            shape, strides = [*shape, size], [*strides, stride]
    return np.lib.stride_tricks.as_strided(view, shape, strides, writeable=False)
