"""Digests of a tensor's bytes, by which a write is seen that PyTorch does not count.

``p.data.copy_``, a NumPy array or a file over the same memory, a collective, an inference tensor: none of them raises
a version. So of each tensor that something was computed of a few lines of 64 bytes are looked at in every call: the
same two of them, far apart, and in turn one line of every row in ``CALLS`` calls, then the next line of every row. A
tensor that was replaced is seen at once, a row that was rewritten within ``CALLS`` calls, and any byte within ``CALLS``
times the lines of a row. Dense tensors of up to ``WHOLE`` bytes are looked at whole.

On other devices than a CPU nothing is looked at, as that would wait for the device.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

CALLS = 2048
WHOLE = 1024
_FIXED = 2
_LINE = 64
# Rows that are looked at together are mostly in one page, and a digest is kept for each such share.
_LEAST_SHARE = 8
# Between two shares of one tensor: few rows need no more, but where they are long all of their bytes do.
_MOST_CALLS = 8
_GOLDEN = (5**0.5 - 1) / 2  # of all lines: far from both ends, and in another row and column than the first

Geometry = tuple[int, int, int, int]


class _Watch(ctypes.Structure):
    """``FxqWatch`` of ``fingerprint.h``."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "row_bytes", "pitch", "size")),
        *((name, ctypes.c_int64) for name in ("share", "shares", "every", "wait", "turn")),
        ("expected", ctypes.c_uint64),
        ("digests", ctypes.POINTER(ctypes.c_uint64)),
        ("fixed", ctypes.c_void_p * _FIXED),
        ("fixed_digest", ctypes.c_uint64),
        ("line", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The digests of all bytes of one tensor. Two of equal geometry are equal where the bytes are.

    Args:
        geometry: rows, bytes of a row, bytes from one row to the next, and bytes from the first to the last.
        digests: one for each share of the lines, and that of the fixed lines.
    """

    geometry: Geometry
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
    _digest()(watch, digests)
    return Fingerprint(geometry, digests)


class Watches:
    """Tensors that are looked at in each call.

    Args:
        looked_at: the address of each, with its fingerprint.

    ``changed()`` says whether a write was seen: in the fixed lines of each, or in the share whose turn it is.
    """

    __slots__ = ("_fingerprints", "_watches", "changed")

    def __init__(self, looked_at: Sequence[tuple[int, Fingerprint]]) -> None:
        # Memory that the native code is given addresses of.
        self._fingerprints = [fingerprint for _, fingerprint in looked_at]
        self._watches = (_Watch * len(looked_at))()
        for i, (address, known) in enumerate(looked_at):
            watch = _watch(address, known.geometry)
            watch.digests = known.digests
            watch.expected, watch.fixed_digest = known.digests[0], known.digests[watch.shares]
            watch.wait = i % watch.every  # not all in the same call
            self._watches[i] = watch
        self.changed: Callable[[], bool] = _changed()(self._watches, len(looked_at)) if looked_at else bool


def _geometry(tensor: Tensor) -> Geometry | None:
    """Rows of bytes that hold ``tensor``, which may hold more where there is no such rectangle without gaps."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return None
    item = tensor.element_size()
    sides = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    run, row = 1, 1
    while sides and sides[0][0] == run:
        row, size = sides.pop(0)
        run *= size
    if not sides and row * item >= _LINE and run * item > WHOLE:
        return run // row, row * item, row * item, run * item  # dense: rows are those of the outermost dim
    if len(sides) == 1 and run * item >= _LINE and sides[0][0] > run:
        pitch, rows = sides[0][0] * item, sides[0][1]
        return rows, run * item, pitch, (rows - 1) * pitch + run * item
    size = (run + sum((size - 1) * stride for stride, size in sides)) * item
    return -(-size // _LINE), min(size, _LINE), _LINE, size


def _watch(address: int, geometry: Geometry) -> _Watch:
    rows, row_bytes, pitch, size = geometry
    every, share = 1, rows
    if size > WHOLE:
        every = min(_MOST_CALLS, max(1, CALLS * _LEAST_SHARE // rows))
        share = max(_LEAST_SHARE, -(-rows // (CALLS // every)))
    watch = _Watch(
        memory=address,
        rows=rows,
        row_bytes=row_bytes,
        pitch=pitch,
        size=size,
        share=share,
        shares=-(-rows // share) * -(-row_bytes // _LINE),
        every=every,
        line=min(row_bytes, _LINE),
    )
    lines = rows * -(-row_bytes // _LINE)
    watch.fixed[:] = [_address(watch, number % rows, number // rows) for number in (0, int(lines * _GOLDEN))]
    return watch


def prepare() -> None:
    """Compile the native code now, which is otherwise done when a weight is first looked at."""
    _library()


@functools.cache
def _library() -> Any | None:
    """The native code; None where it cannot be compiled: then Python looks at the bytes, more slowly."""
    from fx_quant.compat import cpp_compiler, load_cpp

    if cpp_compiler() is None:
        return None
    try:
        return load_cpp((resources.files("fx_quant.ops") / "fingerprint.h").read_text(encoding="utf-8"))
    except Exception:  # noqa: BLE001  (a compiler may fail in any way, and nothing is lost but time)
        return None


@functools.cache
def _digest() -> Callable[[_Watch, ctypes.Array], None]:
    library = _library()
    if library is None:
        return _digest_in_python
    library.fxq_digest.argtypes = [ctypes.POINTER(_Watch), ctypes.POINTER(ctypes.c_uint64)]
    library.fxq_digest.restype = None
    return library.fxq_digest


@functools.cache
def _changed() -> Callable[[ctypes.Array, int], Callable[[], bool]]:
    library = _library()
    if library is None:
        return lambda watches, _: lambda: any(map(_has_changed, watches))
    # Makes a Python object, so unlike other functions of the library it holds Python's lock.
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.POINTER(_Watch), ctypes.c_int64)
    return prototype(("fxq_changed", library))


def _address(watch: _Watch, row: int, column: int) -> int:
    """Of a line."""
    offset = row * watch.pitch + min(column * _LINE, watch.row_bytes - watch.line)
    return watch.memory + min(offset, watch.size - watch.line)


def _lines_digest(watch: _Watch, addresses: Iterable[int]) -> int:
    digest = 0
    for address in addresses:
        digest = zlib.crc32(ctypes.string_at(address, watch.line), digest)
    return digest


def _share_digest(watch: _Watch, number: int) -> int:
    column, part = divmod(number, -(-watch.rows // watch.share))
    rows = range(part * watch.share, min(watch.rows, (part + 1) * watch.share))
    return _lines_digest(watch, (_address(watch, row, column) for row in rows))


def _digest_in_python(watch: _Watch, digests: ctypes.Array) -> None:
    for share in range(watch.shares):
        digests[share] = _share_digest(watch, share)
    digests[watch.shares] = _lines_digest(watch, watch.fixed)


def _has_changed(watch: _Watch) -> bool:
    if _lines_digest(watch, watch.fixed) != watch.fixed_digest:
        return True
    if watch.wait:
        watch.wait -= 1
        return False
    if _share_digest(watch, watch.turn) != watch.expected:
        return True
    watch.wait = watch.every - 1
    watch.turn = (watch.turn + 1) % watch.shares
    watch.expected = watch.digests[watch.turn]
    return False
