"""Arrays in awkward memory: every layout a caller can have, and guard pages around the data."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

Array = np.ndarray

# Layouts of the same values. All but the first two have NaN between or beside their elements.
LAYOUTS = [
    "nchw",
    "channels_last",
    "sliced",
    "channel_slice",
    "reversed",
    "reversed_channels_last",
    "transposed",
    "offset",
    "unaligned",
]


def channels_last(a: Array) -> Array:
    """Logical N,C,H,W in N,H,W,C memory."""
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def is_channels_last(a: Array) -> bool:
    return a.transpose(0, 2, 3, 1).flags.c_contiguous


def as_layout(a: Array, layout: str) -> Array:
    """The values of `a` seen through other strides."""
    if layout == "nchw":
        return np.ascontiguousarray(a)
    if layout == "channels_last":
        return channels_last(a)
    if layout == "sliced":
        return _within(a, tuple(slice(1, 2 * n + 1, 2) for n in a.shape))
    if layout == "channel_slice":
        return _within(a.transpose(0, 2, 3, 1), (..., slice(3, 3 + a.shape[1]))).transpose(
            0, 3, 1, 2
        )
    if layout == "reversed":
        return np.flip(np.flip(a).copy())
    if layout == "reversed_channels_last":
        return np.flip(channels_last(np.flip(a)))
    if layout == "transposed":
        return np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "offset":
        return _at_byte(a, a.itemsize)
    if layout == "unaligned":
        return _at_byte(a, 1)
    raise ValueError(layout)


def _within(a: Array, index: tuple) -> Array:
    """`a` copied into a larger buffer of NaN."""
    shape = tuple(2 * n + 7 for n in a.shape)
    view = np.full(shape, np.nan, a.dtype)[index]
    view = view[tuple(slice(0, n) for n in a.shape)]
    view[...] = a
    return view


def _at_byte(a: Array, offset: int) -> Array:
    """`a` with its first element `offset` bytes after a 64-byte boundary."""
    raw = np.full(a.nbytes + 256, 255, np.uint8)  # all bits set: NaN
    start = -raw.ctypes.data % 64 + offset
    view = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def guarded(a: Array, side: str) -> Array:
    """A copy of `a`, in the same order of memory, that touches an inaccessible page.

    side "end": the page follows the last element; "start": it precedes the first. Both pages are
    there in either case. Reading or writing one is a segmentation fault.
    """
    order = np.argsort([-s for s in a.strides], kind="stable")
    dense = np.ascontiguousarray(a.transpose(order))
    page = mmap.PAGESIZE
    body = -(-max(dense.nbytes, 1) // page) * page
    region = mmap.mmap(-1, body + 2 * page)
    start = page if side == "start" else page + body - dense.nbytes
    view = np.frombuffer(region, a.dtype, dense.size, start).reshape(dense.shape)
    view[...] = dense
    base = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    for address in (base, base + page + body):
        protect_none = 0
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), protect_none):
            raise OSError(ctypes.get_errno(), "mprotect")
    return view.transpose(np.argsort(order))
