"""Our native matmuls of a float activation and a weight that stays packed in 8 or 4 bits until it is needed.

``out = cast(sum_j a_scale[m, j] * b_scale[n, j] * sum_{k in j} a[m, k] * (code[n, k] - zero_point[n, j]) + bias[n])``
over the groups ``j`` along k; beside a float activation with an offset instead of the zero point, which is added to the
scaled codes. Codes are decoded in registers, next to the products; see ``kernels/cpu/source/panel.h``.
"""

from __future__ import annotations

import ctypes
import functools
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fx_quant.kernels.cpu.native import (
    AVX512,
    BFLOAT16,
    FLOAT32,
    INT8_AMX,
    INT8_VNNI,
    PLAN,
    TILE,
    Dot,
    for_target,
    load,
    source,
)
from fx_quant.kernels.cpu.plans import FIXED, PlanTable, table
from fx_quant.ops import dequantize
from fx_quant.scheme import FLOAT8_DTYPES

# Bytes become bfloat16 by a table of 128 bytes.
_DECODED_BFLOAT16 = replace(
    BFLOAT16,
    source=for_target(f"{AVX512},avx512bf16,avx512vbmi", "avx512.h", "bf16.h", *TILE),
    features=BFLOAT16.features | {"avx512_vbmi"},
)
_DOTS = {torch.bfloat16: _DECODED_BFLOAT16, torch.float32: FLOAT32}
AMX_BFLOAT16 = replace(
    _DECODED_BFLOAT16,
    source="#define FXQ_AMX\n"
    + for_target(f"{AVX512},avx512bf16,avx512vbmi,amx-tile,amx-bf16", "avx512.h", "bf16.h", *TILE, "amx.h"),
    features=_DECODED_BFLOAT16.features | {"amx"},
)
# Rows from which on a panel is decoded once for all. Registers decode it anew for every six, which takes up to a fifth
# of the time, and writing it down takes as long as 48 rows do. Tiles of AMX read memory alone. Where a row must come
# out the same for any number of rows neither is done.
_MANY_ROWS, _MANY_ROWS_OF_TILES = 48, 8
AMX_GROUPS = replace(
    INT8_VNNI,
    source="#define FXQ_AMX\n"
    + for_target(f"{AVX512},avx512vnni,amx-tile,amx-int8", "avx512.h", "int8_vnni.h", *TILE, "amx.h"),
    features=INT8_VNNI.features | INT8_AMX.features,
)
_GROUP_CODES = {False: "FxqPackedBytes", True: "FxqPackedNibbles"}
_BYTES = {torch.int8: "FxqSigned", torch.uint8: "FxqUnsigned", **dict.fromkeys(FLOAT8_DTYPES, "FxqFloat8")}
# Scales of 16 bits that are read where they are, by the type that native code has for them.
_SCALES = {torch.bfloat16: "FxqBfloat16", torch.float16: "FxqFloat16"}
_KINDS = {
    "FxqSigned": "decoded_int8",
    "FxqUnsigned": "decoded_int8",
    "FxqFloat8": "decoded_float8",
    "FxqNibbles": "decoded_int4",
    "FxqPackedBytes": "groups",
    "FxqPackedNibbles": "int4_groups",
}
_FACTOR_KINDS = {
    torch.float32: 1,
    torch.int8: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bfloat16: 6,
    torch.float16: 7,
    torch.int16: 8,
}
# The last dim of layout `int4_words`, eight k of a column; that of `pairs` and `columns` is less.
INT4_BYTES = 4
_OUT_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Decode:
    """How packed codes of one dtype meet an activation of one dtype.

    Args:
        dot: what multiplies the decoded codes.
        codes: the C++ struct of the codes.
        source: the native code.
        step: groups along k must be multiples of it.
        fixed: each row is summed in one order, however many rows there are.
    """

    dot: Dot
    codes: str
    source: str
    step: int
    fixed: bool = False

    @property
    def scales_itself(self) -> bool:
        """Whether its eager call has an epilogue; else it returns the sums, and PyTorch does the rest."""
        return self.dot.vector_bits == 512

    @property
    def kind(self) -> str:
        """What its plans are called in ``plans.py``; signed and unsigned bytes share them."""
        return f"{self.dot.kind}_{_KINDS[self.codes]}"

    def plans(self) -> PlanTable:
        """The plans in force; where the order is fixed one that no measurement changes."""
        return FIXED if self.fixed else table(self.kind)

    def takes(self, block: Sequence[int] | None) -> bool:
        """Whether this machine has the instructions, and a panel can be decoded group by group."""
        return self.dot.exists_here() and (block is None or block[1] % self.step == 0)


def is_int4(b: Tensor) -> bool:
    """Whether packed ``b`` holds two codes to a byte."""
    return b.shape[-1] == INT4_BYTES


def scales_in_place(dtype: torch.dtype, dims: int) -> torch.dtype:
    """What native code is made for, where scales have ``dtype``: 16 bits in panels, which are of three dims, stay.

    Any others are float32, which native code made for that reads of any kind.
    """
    return dtype if dtype in _SCALES and dims == 3 else torch.float32


def decode_of(
    a_dtype: torch.dtype,
    code_dtype: torch.dtype,
    int4: bool,
    fixed: bool = False,
    scales: torch.dtype = torch.float32,
) -> Decode:
    """How codes of ``code_dtype`` (``int4``: two to a byte) meet an activation of ``a_dtype``, bfloat16 or float32.

    Args:
        fixed: sum each row in one order, however many rows there are.
        scales: what ``scales_in_place`` gives.
    """
    in_tiles = a_dtype is torch.bfloat16 and not fixed and AMX_BFLOAT16.exists_here()
    return _decode_of(AMX_BFLOAT16 if in_tiles else _DOTS[a_dtype], code_dtype, int4, fixed, scales)


@functools.cache
def _decode_of(dot: Dot, code_dtype: torch.dtype, int4: bool, fixed: bool, scales: torch.dtype) -> Decode:
    is_bf16, in_tiles = dot.kind == BFLOAT16.kind, dot is AMX_BFLOAT16
    codes = "FxqNibbles" if int4 else _BYTES[code_dtype]
    decoder = "decode_bf16.h" if is_bf16 else "decode_float32.h"
    files = ("codes.h", decoder, "values.h", "factor.h", "factors.h", "factor_kinds.h", "rows.h", "panel.h")
    many = "INT64_MAX" if fixed else _MANY_ROWS_OF_TILES if in_tiles else _MANY_ROWS
    native = f"#define FXQ_SETS {1 if fixed else 2}\n#define FXQ_MANY {many}\n{dot.source}\n{source(*files)}"
    step = 8 if int4 else 2 if is_bf16 else 1
    return Decode(dot, codes, f"{_table(code_dtype)}{_of_scales(scales)}{native}", step, fixed)


def groups_of(dot: Dot, int4: bool, scales: torch.dtype = torch.float32) -> Decode:
    """How packed int8 codes (``int4``: two codes to a byte) meet int8 codes of an activation, by ``dot``.

    Neither a plan nor the tiles of AMX, which take over for many rows from ``vpdpbusd``, change what is computed.

    Args:
        scales: what ``scales_in_place`` gives.
    """
    in_tiles = dot is INT8_VNNI and AMX_GROUPS.exists_here()
    return _groups_of(AMX_GROUPS if in_tiles else dot, int4, scales)


@functools.cache
def _groups_of(dot: Dot, int4: bool, scales: torch.dtype) -> Decode:
    read = "factors.h" if dot.vector_bits == 512 else "factors_plain.h"
    files = ("values.h", "factor.h", read, "factor_kinds.h", "rows.h", "groups.h")
    step = 8 if int4 else 4
    return Decode(dot, _GROUP_CODES[int4], f"{_of_scales(scales)}{dot.source}\n{source(*files)}", step)


def _of_scales(scales: torch.dtype) -> str:
    """What ``factor_kinds.h`` must know of scales that are not float32."""
    return f"#define FXQ_SCALE {_SCALES[scales]}\n" if scales in _SCALES else ""


def _table(dtype: torch.dtype) -> str:
    """What ``codes.h`` must know of a float8 dtype; nothing for others."""
    if dtype not in FLOAT8_DTYPES:
        return ""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    bits = (every.float().to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF).tolist()
    return f"#define FXQ_TABLE {', '.join(map(str, bits[:128]))}\n#define FXQ_MINUS_ZERO {bits[128]}\n"


# What one thread does of a decoded matmul, in eager calls and in compiled graphs (``lowerings``).
# ``$sums`` declares ``acc``, ``$panel`` says where a panel starts, and ``$store`` takes ``acc``, which is the panel for
# rows ``m_start`` to ``m_end``, to where it belongs.
DECODED_LOOP = string.Template(r"""        $sums
        const FxqPasses passes(share.row_end - share.row_begin, weight.k * sizeof(Dot::A));
        for (int64_t pass = 0; pass < passes.count; pass++) {
            const int64_t m_start = share.row_begin + passes.start(pass);
            const int64_t m_end = share.row_begin + passes.start(pass + 1);
            const auto rows = fxq_rows<Dot, Decode>(a + m_start * lda, lda, m_start, m_end - m_start, weight);
            for (int64_t panel = share.panel_begin; panel < share.panel_end; panel++) {
$panel
                fxq_panel<Dot, Decode>(
                    plan, m_start, m_end - m_start, rows, weight, panel, acc);
$store
            }
        }
""")


# --- eager calls ------------------------------------------------------------------------------------------------

_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


class _Factor(ctypes.Structure):
    """``FxqFactor`` of ``kernels/cpu/source/factor.h``."""

    _fields_ = (
        ("kind", _SIZE),
        ("data", _ADDRESS),
        ("rows", _SIZE),
        ("row_stride", _SIZE),
        ("group_stride", _SIZE),
        ("panel_stride", _SIZE),
        ("added", _SIZE),
    )


class _Weight(ctypes.Structure):
    """``FxqWeight`` of ``kernels/cpu/source/rows.h``."""

    _fields_ = (
        ("codes", _ADDRESS),
        ("n", _SIZE),
        ("k", _SIZE),
        ("group", _SIZE),
        ("scale", _Factor),
        ("zero_point", _Factor),
        ("row_scale", _ADDRESS),
        ("row_scale_stride", _SIZE),
        ("row_scale_group_stride", _SIZE),
        ("row_zero_point", _ADDRESS),
        ("row_zero_point_stride", _SIZE),
        ("code_sum", _Factor),
    )


class _Epilogue(ctypes.Structure):
    """``FxqEpilogue`` of ``kernels/cpu/source/eager_decoded.h`` and ``eager_plain.h``."""

    _fields_ = (
        ("a_scale", _ADDRESS),
        ("b_scale", _ADDRESS),
        ("bias", _ADDRESS),
        ("a_scale_stride", _SIZE),
        ("b_scale_stride", _SIZE),
        ("kind", _SIZE),
        ("out", _ADDRESS),
    )


_EAGER = string.Template(r"""
#include <omp.h>
$plan
$source
extern "C" __attribute__((visibility("default")))
void fxq_decoded(
    const void* a_, int64_t lda, int64_t M, const FxqWeight* weight_, const FxqEpilogue* epilogue,
    const FxqPlan* plans, int64_t threads)
{
    using Dot = $dot;
    using Decode = FxqDecode<$codes>;
    const auto a = static_cast<const Dot::A*>(a_);
    const FxqWeight& weight = *weight_;
    const int64_t panels = (weight.n + FXQ_PANEL - 1) / FXQ_PANEL;
    const FxqPlan& plan = fxq_plan(plans, M);
    #pragma omp parallel num_threads(fxq_threads(plan, M, weight.n, weight.k, threads))
    {
        const FxqShare share = fxq_share(M, panels, omp_get_num_threads(), omp_get_thread_num(), Dot::ROWS);
$loop    }
}
""")
_EAGER_LOOP = DECODED_LOOP.substitute(
    sums="alignas(64) float acc[FXQ_CHUNK_ROWS * FXQ_PANEL];",
    panel="                const int64_t n_start = panel * FXQ_PANEL, width = std::min(FXQ_PANEL, weight.n - n_start);",
    store="                fxq_finish(*epilogue, acc, m_start, m_end - m_start, n_start, width, weight.n);",
)


@functools.cache
def _compiled(decode: Decode) -> Callable[..., None] | None:
    native = f"{decode.source}\n{source('eager_decoded.h' if decode.scales_itself else 'eager_plain.h')}"
    code = _EAGER.substitute(plan=PLAN, source=native, dot=decode.dot.struct, codes=decode.codes, loop=_EAGER_LOOP)
    library = load(decode.dot.name, code)
    if library is None:
        return None
    function = library.fxq_decoded
    function.argtypes = [_ADDRESS, _SIZE, _SIZE, ctypes.POINTER(_Weight), ctypes.POINTER(_Epilogue), _ADDRESS, _SIZE]
    function.restype = None
    return function


def factor_kind(dtype: torch.dtype) -> int | None:
    """The number of ``dtype`` in ``FxqKind``, or None where native code does not read it."""
    return _FACTOR_KINDS.get(dtype)


def _factor(x: Tensor | None, block: Sequence[int] | None) -> _Factor:
    if x is None:
        return _Factor()
    kind = factor_kind(x.dtype)
    if x.dim() == 3:
        return _Factor(kind, x.data_ptr(), 1, x.stride(2), x.stride(1), x.stride(0))
    if block is not None:
        return _Factor(kind, x.data_ptr(), block[0], x.stride(0), x.stride(1))
    return _Factor(kind, x.data_ptr(), 1, _column_stride(x), 0)


def _column_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 1 else x.stride(-1)


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 1 else x.stride(0)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def decoded_matmul(
    decode: Decode,
    a: Tensor,
    b: Tensor,
    n: int,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    b_zero_point: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    block: Sequence[int] | None,
    plans: PlanTable | None = None,
    *,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    b_offset: Tensor | None = None,
) -> Tensor | None:
    """The equation above of ``a [m, k]`` and packed ``b``; None where the native code cannot run.

    Args:
        decode: how the two meet.
        a: ``[m, k]``, bfloat16 or float32; or int8 codes.
        b: in a layout of ``kernels/layouts.py``: ``pairs``, ``columns`` or ``int4_words`` beside a float, ``vnni`` or
            ``vnni_int4`` beside codes.
        n: columns of the result.
        a_scale, b_scale, b_zero_point, bias, out_dtype, block: as in ``fx_quant::scaled_mm`` and ``weight_only_mm``;
            factors of groups may also be in panels, ``[ceil(n / 64), groups, 64]``.
        plans: those in force for the kernel unless given.
        a_zero_point: of codes ``a``, as in ``fx_quant::scaled_mm``, beside ``b_sum``.
        b_sum: the sums of the weight's codes over each group, in panels.
        b_offset: as in ``fx_quant::weight_only_mm``, without ``b_zero_point``; in panels like the other factors.
    """
    if a.device.type != "cpu" or not decode.takes(block):
        return None
    function = _compiled(decode)
    if function is None:
        return None
    a = a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()
    m, k = a.shape
    native_dtype = out_dtype if decode.scales_itself else torch.float32
    out = a.new_empty((m, n), dtype=native_dtype)
    if not (m and n):
        return out.to(out_dtype)
    # Kept alive until the call is over.
    a_scale, bias = (None if x is None else x.float() for x in (a_scale, bias))
    inside = block is not None or b_offset is not None  # where the scale of the weight is multiplied
    if b_scale is not None and (not inside or factor_kind(b_scale.dtype) is None):
        b_scale = b_scale.float()
    bias = None if bias is None else bias.contiguous()
    if b_zero_point is not None and factor_kind(b_zero_point.dtype) is None:
        b_zero_point = b_zero_point.to(torch.int32)
    if b_offset is not None and factor_kind(b_offset.dtype) is None:
        b_offset = b_offset.float()
    weight = _Weight(b.data_ptr(), n, k, max(k, 1))
    weight.zero_point = _factor(b_zero_point if b_offset is None else b_offset, block)
    weight.zero_point.added = b_offset is not None
    if inside:
        weight.scale = _factor(b_scale, block)
    if block is not None:
        weight.group = block[1]
    by_group = block is not None and not is_by_row(a_scale)
    if by_group and a_scale is not None:
        weight.row_scale = a_scale.data_ptr()
        weight.row_scale_stride, weight.row_scale_group_stride = a_scale.stride()
    if a_zero_point is not None and b_sum is not None:
        weight.row_zero_point, weight.row_zero_point_stride = a_zero_point.data_ptr(), _row_stride(a_zero_point)
        weight.code_sum = _factor(b_sum, block)
    rest = None if by_group else a_scale, None if inside else b_scale, bias
    epilogue = _Epilogue(kind=_OUT_KINDS[native_dtype], out=out.data_ptr())
    if decode.scales_itself:
        epilogue.a_scale, epilogue.b_scale, epilogue.bias = map(_address, rest)
        epilogue.a_scale_stride, epilogue.b_scale_stride = _row_stride(rest[0]), _column_stride(rest[1])
    plans = decode.plans() if plans is None else plans
    operands = (a.data_ptr(), a.stride(0), m, ctypes.byref(weight), ctypes.byref(epilogue))
    function(*operands, plans.array, torch.get_num_threads())
    return out if decode.scales_itself else dequantize(out, *rest, out_dtype)


def is_by_row(a_scale: Tensor | None) -> bool:
    """Whether ``a_scale`` is one element or one for each row: ``[m, 1]``."""
    return a_scale is not None and (a_scale.dim() < 2 or a_scale.shape[1] == 1)
