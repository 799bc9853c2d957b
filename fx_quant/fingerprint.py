"""Digests of a tensor's bytes, by which a write is seen that PyTorch does not count.

``p.data.copy_``, a NumPy array or a file over the same memory, a collective, an inference tensor: none of them raises
a version. So of each tensor that something was computed of a few lines of 64 bytes are looked at in every call: the
same ``FIXED`` of them, spread over the tensor, and in turn one line of every row in ``CALLS`` calls, then the next line
of every row. A tensor that was replaced is seen at once, a row that was rewritten within ``CALLS`` calls, and any byte
within ``CALLS`` times the lines of a row. Tensors of up to ``WHOLE`` bytes are looked at whole.

On other devices than a CPU nothing is looked at, as that would wait for the device.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIXED = 2
CALLS = 512
WHOLE = 1024
_LINE = 64
_LEAST_SHARE = 4


class _Watch(ctypes.Structure):
    """``FxqWatch`` of ``kernels/native/fingerprint.h``."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "row_bytes", "pitch", "share", "shares", "fixed", "turn")),
        ("digests", ctypes.POINTER(ctypes.c_uint64)),
    )


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The digests of all bytes of one tensor. Two of equal geometry are equal where the bytes are.

    Args:
        geometry: rows, bytes of a row, and bytes from one row to the next.
        digests: one for each share of the lines, and that of the fixed lines.
    """

    geometry: tuple[int, int, int]
    digests: ctypes.Array

    def same_bytes(self, other: Fingerprint) -> bool:
        """Whether both were taken of the same bytes."""
        return self.geometry == other.geometry and bytes(self.digests) == bytes(other.digests)


def fingerprint(tensor: Tensor) -> Fingerprint | None:
    """The digests of ``tensor``; None where its bytes are not looked at: on other devices, or where there are none."""
    geometry = _geometry(tensor)
    if geometry is None:
        return None
    watch = _watch(tensor.data_ptr(), geometry)
    digests = (ctypes.c_uint64 * (watch.shares + 1))()
    watch.digests = digests
    _digest()(ctypes.byref(watch))
    return Fingerprint(geometry, digests)


class Watches:
    """Tensors that are looked at in each call.

    Args:
        looked_at: the address of each, with its fingerprint.
    """

    def __init__(self, looked_at: Sequence[tuple[int, Fingerprint]]) -> None:
        # The native code is given addresses of their digests, which live as long as they do.
        self._fingerprints = [fingerprint for _, fingerprint in looked_at]
        self._watches = (_Watch * len(looked_at))()
        for i, (address, found) in enumerate(looked_at):
            watch = _watch(address, found.geometry)
            watch.digests = found.digests
            self._watches[i] = watch
        self._arguments = ctypes.addressof(self._watches), len(looked_at)
        self._changed = _changed()

    def changed(self) -> bool:
        """Whether a write was seen: in the fixed lines of each, or in the share whose turn it is."""
        return self._changed(*self._arguments) >= 0


def _geometry(tensor: Tensor) -> tuple[int, int, int] | None:
    """Rows of bytes that hold ``tensor``, which may hold more where there is no such rectangle without gaps."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return None
    item = tensor.element_size()
    sides = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    run, row = 1, 1
    while sides and sides[0][0] == run:
        row, size = sides.pop(0)
        run *= size
    if not sides and row * item >= _LINE:
        return run // row, row * item, row * item  # dense: rows are those of the outermost dim
    if len(sides) == 1 and run * item >= _LINE and sides[0][0] > run:
        return sides[0][1], run * item, sides[0][0] * item
    span = (run + sum((size - 1) * stride for stride, size in sides)) * item
    return 1, span, span


def _watch(address: int, geometry: tuple[int, int, int]) -> _Watch:
    rows, row_bytes, pitch = geometry
    lines = rows * -(-row_bytes // _LINE)
    whole = lines * _LINE <= WHOLE
    # A tensor of one row has a share of its lines looked at instead.
    share = lines if whole else max(_LEAST_SHARE, -(-(rows if rows > 1 else lines) // CALLS))
    return _Watch(
        memory=address,
        rows=rows,
        row_bytes=row_bytes,
        pitch=pitch,
        share=share,
        shares=-(-lines // share),
        fixed=0 if whole else FIXED,
        turn=0,
    )


@functools.cache
def _library() -> Any | None:
    """The native code; None where it cannot be compiled: then Python looks at the bytes, more slowly."""
    from fx_quant.compat import cpp_compiler, load_cpp
    from fx_quant.native import source

    if cpp_compiler() is None:
        return None
    try:
        return load_cpp(source("fingerprint.h"))
    except Exception:  # noqa: BLE001  (a compiler may fail in any way, and nothing is lost but time)
        return None


@functools.cache
def _digest() -> Callable[[Any], None]:
    library = _library()
    if library is None:
        return lambda reference: _digest_in_python(reference._obj)
    library.fxq_digest.argtypes, library.fxq_digest.restype = [ctypes.POINTER(_Watch)], None
    return library.fxq_digest


@functools.cache
def _changed() -> Callable[[int, int], int]:
    library = _library()
    if library is None:
        return _changed_in_python
    library.fxq_changed.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.fxq_changed.restype = ctypes.c_int64
    return library.fxq_changed


def _lines_digest(watch: _Watch, numbers: Sequence[int]) -> int:
    digest = 0
    for number in numbers:
        offset = number // watch.rows * _LINE
        address = watch.memory + number % watch.rows * watch.pitch + offset
        digest = zlib.crc32(ctypes.string_at(address, min(_LINE, watch.row_bytes - offset)), digest)
    return digest


def _share(watch: _Watch, share: int) -> range:
    lines = watch.rows * -(-watch.row_bytes // _LINE)
    return range(share * watch.share, min(lines, (share + 1) * watch.share))


def _fixed(watch: _Watch) -> list[int]:
    lines = watch.rows * -(-watch.row_bytes // _LINE)
    return [(i * 0x9E3779B97F4A7C15 % 2**64) * lines >> 64 for i in range(watch.fixed)]


def _digest_in_python(watch: _Watch) -> None:
    for share in range(watch.shares):
        watch.digests[share] = _lines_digest(watch, _share(watch, share))
    watch.digests[watch.shares] = _lines_digest(watch, _fixed(watch))


def _changed_in_python(address: int, count: int) -> int:
    for i, watch in enumerate((_Watch * count).from_address(address)):
        turn = watch.turn
        watch.turn = (turn + 1) % watch.shares
        same = watch.digests[turn] == _lines_digest(watch, _share(watch, turn))
        if not same or watch.digests[watch.shares] != _lines_digest(watch, _fixed(watch)):
            return i
    return -1
