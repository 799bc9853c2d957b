"""The layouts of packed weights, as kernels read them: their names, and how a weight is packed and unpacked.

Names are ``Layout.name``, or say what they are made with: a transposed or repacked weight, a padded one, sums.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.errors import FxQuantError, unknown_name
from fx_quant.kernels.huge_pages import empty_in_huge_pages, in_huge_pages
from fx_quant.kernels.panels import (
    PANEL,
    byte_panels,
    codes_from_panels,
    factor_panels,
    from_amx,
    from_int4_words,
    from_pairs,
    from_panels,
    from_vnni_int4,
    panel_shape,
    to_amx,
    to_int4_words,
    to_pairs,
    to_panels,
    to_vnni_int4,
)
from fx_quant.ops import unpack_nibbles
from fx_quant.scheme import CODE_DTYPES, FLOAT8_DTYPES, dtype_name

TRANSPOSED = ".t"
FACTOR_PANELS = "factor_panels"
CODES = "codes"
# Bytes of a weight that are packed at once.
_PART = 1 << 18
_PADDED = re.compile(r"padded_(\d+)x(\d+)")
_SUMS = re.compile(r"(nibble_)?sums_(\d+)")
_REPACKED = re.compile(r"(.+)_of_(\w+)_(\d+)x(\d+)")


@dataclass(frozen=True)
class Layout:
    """A packed form of a weight ``[n, k]``.

    Args:
        name: as kernels and the op spell it. A pickled layer holds it beside what it names, so a form that changes
            changes its name.
        weights: dtypes that it packs; empty for any.
        dtype: dtype of the packed tensor; None keeps the weight's.
        shape: ``(n, k)`` to the shape of the packed tensor.
        pack: weight of any strides to a new contiguous tensor of that shape and dtype; never an alias.
        unpack: the packed tensor, ``n`` and ``k`` to the weight ``[n, k]``, int8 or the packed dtype; None where the
            result does not hold the weight.
        align: both sizes of the weight must be multiples of it.
        dims: of the weight; more where it is given packed in another layout.
        panels: the dim of the weight of which each ``PANEL`` make one entry of the packed tensor's first dim, whatever
            else the weight holds; None where there is no such dim.
    """

    name: str
    weights: frozenset[torch.dtype]
    dtype: torch.dtype | None
    shape: Callable[[int, int], tuple[int, ...]]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor] | None
    align: int = 1
    dims: int = 2
    panels: int | None = None

    def holds(self, codes: torch.dtype) -> bool:
        """Whether the packed tensor stands for a weight of ``codes`` in as many bytes, but for the padding."""
        packed = self.dtype or codes
        return self.unpack is not None and codes in self.weights and packed.itemsize == codes.itemsize


@dataclass(frozen=True)
class Held:
    """What a packed tensor holds: a weight ``[n, k]`` in ``layout``; ``k`` counts bytes where they hold two codes."""

    layout: str
    n: int
    k: int


_LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Add ``layout`` to those that ``prepack`` knows.

    Raises:
        FxQuantError: another layout has the same name.
    """
    if _LAYOUTS.setdefault(layout.name, layout) is not layout:
        raise FxQuantError(f"layout name {layout.name!r} must be unique, it is registered already; choose another")
    return layout


for _layout in (
    # vpdpbusd multiplies unsigned by signed bytes. The weight is made the unsigned one (weight + 128), so that
    # activation codes are read as they are; the kernel takes 128 * sum_k a[m, k] off again.
    Layout(
        name="vnni",
        weights=frozenset({torch.int8}),
        dtype=torch.uint8,
        shape=panel_shape(4),
        panels=0,
        pack=lambda weight: to_panels(weight, 4).view(torch.uint8).bitwise_xor_(0x80),
        unpack=lambda packed, n, k: from_panels(packed.bitwise_xor(0x80).view(torch.int8), n, k),
    ),
    # Tiles of AMX, which multiplies signed bytes.
    Layout(
        name="amx",
        weights=frozenset({torch.int8}),
        dtype=torch.int8,
        shape=lambda n, k: (-(-n // PANEL), -(-k // 64), 4, 16, 16, 4),
        panels=0,
        pack=to_amx,
        unpack=from_amx,
    ),
    # Every float8 value is exact in bfloat16; vdpbf16ps multiplies pairs along k.
    Layout(
        name="bf16_pairs",
        weights=FLOAT8_DTYPES,
        dtype=torch.bfloat16,
        shape=panel_shape(2),
        panels=0,
        pack=lambda weight: to_panels(weight.to(torch.bfloat16), 2),
        unpack=from_panels,
    ),
    # Codes that are decoded panel by panel: pairs along k where bfloat16 is multiplied, plain columns where float32 is.
    Layout(
        name="pairs",
        weights=CODE_DTYPES,
        dtype=None,
        shape=panel_shape(2),
        panels=0,
        pack=to_pairs,
        unpack=from_pairs,
    ),
    Layout(
        name="columns",
        weights=CODE_DTYPES,
        dtype=None,
        shape=panel_shape(1),
        panels=0,
        pack=partial(byte_panels, group=1),
        unpack=codes_from_panels,
    ),
    # Two codes to a byte, so k counts bytes here.
    Layout(
        name="int4_words",
        weights=frozenset({torch.uint8}),
        dtype=torch.uint8,
        shape=panel_shape(4),
        panels=0,
        pack=to_int4_words,
        unpack=from_int4_words,
    ),
    # The same for int8 products: a register of bytes is 8 k of 16 columns, the first four k in the low halves.
    Layout(
        name="vnni_int4",
        weights=frozenset({torch.uint8}),
        dtype=torch.uint8,
        shape=lambda n, k: (-(-n // PANEL), -(-k // 4), 4 * PANEL),
        panels=0,
        pack=to_vnni_int4,
        unpack=from_vnni_int4,
    ),
    # Scales and zero points ``[n, groups]`` as the kernels that walk panels read them.
    Layout(
        name=FACTOR_PANELS,
        weights=frozenset(),
        dtype=None,
        shape=lambda n, groups: (-(-n // PANEL), groups, PANEL),
        panels=0,
        pack=factor_panels,
        unpack=lambda packed, n, groups: packed.transpose(1, 2).reshape(-1, groups)[:n],
    ),
    Layout(
        name="float32",
        weights=FLOAT8_DTYPES,
        dtype=torch.float32,
        shape=lambda n, k: (k, n),
        pack=lambda weight: weight.float().t().contiguous(),
        unpack=lambda packed, n, k: packed.t(),
    ),
    # What a zero point of the activation brings into the sum: computed once, as it takes a pass over the weight.
    Layout(
        name="sums",
        weights=frozenset({torch.int8}),
        dtype=torch.int32,
        shape=lambda n, k: (n,),
        pack=lambda weight: weight.sum(1, dtype=torch.int32),
        unpack=None,
    ),
):
    register_layout(_layout)


def layouts() -> tuple[Layout, ...]:
    """Every registered layout."""
    return tuple(_LAYOUTS.values())


def packed_layout(name: str) -> Layout:
    """The layout called ``name``.

    Raises:
        UnknownNameError: no layout has that name.
    """
    if name not in _LAYOUTS and name.endswith(TRANSPOSED):
        return _transposed(packed_layout(name.removesuffix(TRANSPOSED)))
    held = _REPACKED.fullmatch(name)
    if held is not None:
        return _repacked(held[1], Held(held[2], int(held[3]), int(held[4])))
    sizes = _PADDED.fullmatch(name)
    if sizes is not None:
        return _padded(int(sizes[1]), int(sizes[2]))
    group = _SUMS.fullmatch(name)
    if group is not None:
        return _group_sums(int(group[2]), group[1] is not None)
    if name not in _LAYOUTS:
        raise unknown_name("layout", name, _LAYOUTS)
    return _LAYOUTS[name]


def padded(rows: int, columns: int) -> str:
    """The name of the layout of weights that are padded with zeros to ``[rows, columns]``, each once."""
    return f"padded_{rows}x{columns}"


@functools.cache
def _padded(rows: int, columns: int) -> Layout:
    return Layout(
        name=padded(rows, columns),
        weights=frozenset(),
        dtype=None,
        shape=lambda n, k: (rows, columns),
        pack=lambda weight: F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0])).contiguous(),
        unpack=lambda packed, n, k: packed[:n, :k],
    )


def repacked(layout: str, held: Held) -> str:
    """The name of the layout that takes what ``held`` says and gives that weight in ``layout``, or as ``CODES``."""
    return f"{layout}_of_{held.layout}_{held.n}x{held.k}"


@functools.cache
def _repacked(name: str, held: Held) -> Layout:
    source, into = packed_layout(held.layout), None if name == CODES else packed_layout(name)
    codes = None if source.dtype is None else code_dtype(held.layout, source.dtype)

    def pack(packed: Tensor) -> Tensor:
        weight = unpack_weight(packed, held.layout, held.n, held.k)
        return weight if into is None else into.pack(weight)

    return Layout(
        name=repacked(name, held),
        weights=frozenset(),
        dtype=codes if into is None else into.dtype or codes,
        shape=lambda *_: (held.n, held.k) if into is None else into.shape(held.n, held.k),
        pack=pack,
        unpack=None,
        dims=len(source.shape(held.n, held.k)),
    )


def group_sums(group: int, packed: bool) -> str:
    """The name of the layout of sums of codes of ``group`` neighbours along k, ``packed`` int4 or int8, in panels."""
    return f"{'nibble_' if packed else ''}sums_{group}"


@functools.cache
def _group_sums(group: int, packed: bool) -> Layout:
    def pack(weight: Tensor) -> Tensor:
        codes = unpack_nibbles(weight).to(torch.int8) - 8 if packed else weight
        whole = F.pad(codes, (0, -codes.shape[1] % group)).unflatten(1, (-1, group))
        return factor_panels(whole.sum(2, dtype=dtype))

    # Read for each group, so as small as they may be.
    dtype = torch.int16 if group * (8 if packed else 128) <= 2**15 else torch.int32
    bytes_of_group = group // 2 if packed else group
    return Layout(
        name=group_sums(group, packed),
        weights=frozenset({torch.uint8 if packed else torch.int8}),
        dtype=dtype,
        shape=lambda n, k: (-(-n // PANEL), -(-k // bytes_of_group), PANEL),
        panels=0,
        pack=pack,
        unpack=None,
    )


@functools.cache
def _transposed(layout: Layout) -> Layout:
    """``layout`` of a weight that is given as ``[k, n]``."""
    unpack = layout.unpack
    return replace(
        layout,
        name=f"{layout.name}{TRANSPOSED}",
        shape=lambda k, n: layout.shape(n, k),
        pack=lambda weight: layout.pack(weight.t()),
        unpack=None if unpack is None else lambda packed, k, n: unpack(packed, n, k).t(),
        panels=None if layout.panels is None else 1 - layout.panels,
    )


def check_weight(weight: Tensor, layout: Layout) -> None:
    """That ``layout`` packs ``weight``.

    Raises:
        RuntimeError: it does not, by its dims, dtype or sizes.
    """
    torch._check(
        weight.dim() == layout.dims,
        lambda: f"prepack: a weight must be {'[n, k]' if layout.dims == 2 else 'packed'}, got {list(weight.shape)}",
    )
    torch._check(
        not layout.weights or weight.dtype in layout.weights,
        lambda: (
            f"prepack: layout {layout.name!r} packs {' or '.join(sorted(map(dtype_name, layout.weights)))}, "
            f"got {dtype_name(weight.dtype)}"
        ),
    )
    torch._check(
        all(size % layout.align == 0 for size in weight.shape),
        lambda: f"prepack: layout {layout.name!r} packs sizes in multiples of {layout.align}, got {list(weight.shape)}",
    )


def pack_weight(weight: Tensor, layout: str) -> Tensor:
    """``weight [n, k]`` in ``layout``, as a new tensor; nothing is remembered."""
    packing = packed_layout(layout)
    check_weight(weight, packing)
    if weight.numel() == 0:
        return weight.new_zeros(packing.shape(*weight.shape), dtype=packing.dtype or weight.dtype)
    with torch.no_grad():
        parts = _pack_in_parts(weight.detach(), packing)
        return in_huge_pages(packing.pack(weight.detach())) if parts is None else parts


def _pack_in_parts(weight: Tensor, packing: Layout) -> Tensor | None:
    """``weight`` packed some panels at a time, as copies on the way are then small; None for a small one."""
    if packing.panels is None:
        return None
    rows, whole = weight.shape[packing.panels], packing.shape(*weight.shape)
    at_once = max(_PART * rows // weight.nbytes // PANEL, 1) * PANEL
    if at_once >= rows:
        return None
    packed = empty_in_huge_pages(whole, packing.dtype or weight.dtype, weight.device)
    for first in range(0, rows, at_once):
        part = packing.pack(weight.narrow(packing.panels, first, min(at_once, rows - first)))
        packed[first // PANEL :][: part.shape[0]] = part
    return packed


def unpack_weight(packed: Tensor, layout: str, n: int, k: int) -> Tensor:
    """The weight ``[n, k]`` that ``pack_weight`` gave ``packed``, as a new contiguous tensor."""
    unpack = check_packed(packed, layout, n, k).unpack
    assert unpack is not None
    with torch.no_grad():
        return unpack(packed.detach(), n, k).clone(memory_format=torch.contiguous_format)


def check_packed(packed: Tensor, layout: str, n: int, k: int) -> Layout:
    """The layout called ``layout``, in which ``packed`` is a weight ``[n, k]``.

    Raises:
        UnknownNameError: no layout has that name.
        RuntimeError: it holds no weight, or that of another size or dtype.
    """
    packing = packed_layout(layout)
    torch._check(packing.unpack is not None, lambda: f"unpack: layout {layout!r} does not hold the weight")
    shape = packing.shape(n, k)
    torch._check(
        packed.shape == shape and packing.dtype in (None, packed.dtype),
        lambda: (
            f"unpack: a weight {[n, k]} in layout {layout!r} must be {dtype_name(packing.dtype or packed.dtype)} "
            f"{list(shape)}, got {dtype_name(packed.dtype)} {list(packed.shape)}"
        ),
    )
    return packing


def code_dtype(layout: str, packed: torch.dtype) -> torch.dtype:
    """The dtype of the weight that a tensor of dtype ``packed`` holds in ``layout``."""
    return torch.int8 if packed_layout(layout).weights == {torch.int8} else packed
