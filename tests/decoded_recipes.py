"""Recipes of matmuls whose operands are dequantized in every way that the algebra knows, and in many that it does not.

Sizes are small and often square, so that a factor along the wrong axis, or a grid that was transposed, fits all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from hypothesis import strategies as st
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8, UINT8, INT32, INT64, E4M3 = torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn
pt2e = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Factor:
    """A scale or a zero point: along what it varies, how that is written, and how it may be wrong.

    Args:
        along: none | number | tensor | rows | group | block | along_k.
        spelled: view | unflatten | interleave | expand | tiled | strided; the last two are other groups.
        twist: none | flip | transposed.
    """

    along: str
    spelled: str
    twist: str


@dataclass(frozen=True)
class Operand:
    """How one operand is dequantized: ``(codes - zero point) * scale``, or nearly.

    Args:
        codes: dtype of the codes, or ``nibbles``.
        transposed: stored and dequantized as ``[k, rows]``.
        point_as: dtype that the zero point is stored in.
        point_in: dtype that the codes are subtracted in.
        point_twist: none | added | after_scale | halved.
        to: dtype that it is scaled in.
        twist: what is done to the dequantized operand: none | cast | sliced | permuted | view_back.
        through: aten | pt2e: a dequantize op instead, with tensors or Python numbers.
    """

    codes: Any
    transposed: bool
    group: int
    point: Factor
    point_as: torch.dtype
    point_in: torch.dtype
    point_twist: str
    scale: Factor
    to: torch.dtype
    twist: str
    through: str


@dataclass(frozen=True)
class Correction:
    """What is taken off an int32 sum: a zero point times column sums of the weight, or nearly.

    Args:
        point: number | tensor | rows.
        sums: of what: k | stored | keepdim | other_weight | over_n | shifted.
        form: sub | add_negative | sub_reversed | transposed | doubled.
    """

    point: str
    wide: bool
    sums: str
    form: str


@dataclass(frozen=True)
class Decoded:
    """One graph of dequantized operands.

    Args:
        a: None for a float activation.
        matmul: mm | addmm | bmm | int32 | int_mm.
        runtime: the weight's codes are computed from an input.
        shared: the dequantized weight is used by a second matmul.
    """

    m: int
    k: int
    n: int
    lead: int | None
    dynamic: bool
    seed: int
    a: Operand | None
    b: Operand
    matmul: str
    correction: Correction | None
    steps: tuple[str, ...]
    runtime: bool
    shared: bool
    numerics: str


def _mostly(usual: Any, *others: Any, times: int = 5) -> st.SearchStrategy:
    return st.sampled_from([usual] * times + list(others))


SPELLED = st.sampled_from(
    ["view"] * 3 + ["unflatten", "interleave", "interleave", "expand", "expand", "tiled", "strided"]
)
TWISTS = _mostly("none", "flip", "transposed", times=8)
POINT_TWISTS = _mostly("none", "added", "after_scale", "halved", times=15)
STEPS = ("column", "column", "bf16", "f32", "bias", "row", "number", "half_column", "relu", "flip", "column_1n", "3d")


def operands(codes: list, points: list, scales: list, twists: list) -> st.SearchStrategy[Operand]:
    return st.builds(
        Operand,
        codes=st.sampled_from(codes),
        transposed=st.sampled_from([False, False, True]),
        group=st.sampled_from([2, 2, 4]),
        point=st.builds(Factor, st.sampled_from(points), SPELLED, TWISTS),
        point_as=st.sampled_from([INT32, INT32, INT32, INT8, INT8, INT64, torch.int16, F32]),
        point_in=st.sampled_from([F32, F32, F32, INT32, INT32, INT32, BF16, BF16, INT8]),
        point_twist=POINT_TWISTS,
        scale=st.builds(Factor, st.sampled_from(scales), SPELLED, TWISTS),
        to=st.sampled_from([F32, F32, BF16, F16]),
        twist=st.sampled_from(twists),
        through=st.sampled_from(["aten", "aten", "aten", "pt2e"]),
    )


ACTIVATIONS = operands(
    [INT8, INT8, UINT8, E4M3],
    ["none", "none", "number", "tensor", "rows", "rows", "group"],
    ["rows", "rows", "rows", "tensor", "number", "group", "group", "none", "along_k"],
    ["none"] * 6 + ["cast", "permuted", "expanded"],
)
WEIGHTS = operands(
    [INT8, INT8, INT8, UINT8, E4M3, "nibbles", "nibbles"],
    ["none", "none", "none", "number", "rows", "group"],
    ["rows", "rows", "rows", "group", "group", "group", "block", "block", "tensor", "none", "along_k"],
    ["none"] * 6 + ["cast", "sliced", "permuted", "view_back"],
)
CORRECTIONS = st.builds(
    Correction,
    point=st.sampled_from(["rows", "rows", "tensor", "number"]),
    wide=st.booleans(),
    sums=_mostly("k", "stored", "keepdim", "other_weight", "over_n", "shifted", times=6),
    form=_mostly("sub", "add_negative", "sub_reversed", "transposed", "doubled", times=5),
)


@st.composite
def decoded_recipes(draw: st.DrawFn) -> Decoded:
    size = draw(st.sampled_from([4, 4, 8]))
    square = draw(st.booleans())
    matmul = draw(st.sampled_from(["mm", "mm", "mm", "addmm", "bmm", "int32", "int_mm"]))
    whole = matmul in ("int32", "int_mm")
    a = draw(ACTIVATIONS) if whole or draw(st.integers(0, 2)) else None
    b = draw(WEIGHTS)
    if a is not None and draw(st.booleans()):
        b = replace(b, codes=E4M3 if a.codes is E4M3 else INT8, group=a.group, to=a.to)
    return Decoded(
        m=size if square else draw(st.sampled_from([1, 2, 4, 6])),
        # torch._int_mm returns garbage on CPUs for k = 1.
        k=size if square else draw(st.sampled_from([4, 8, 16])),
        n=size if square else draw(st.sampled_from([1, 2, 4, 6, 8])),
        lead=draw(st.sampled_from([None, None, 1, 2])) if matmul != "bmm" else draw(st.sampled_from([1, 2, 3])),
        dynamic=draw(st.sampled_from([False, False, False, True])),
        seed=draw(st.integers(0, 3)),
        a=a,
        b=b,
        matmul=matmul,
        correction=draw(CORRECTIONS) if whole and draw(st.booleans()) else None,
        steps=tuple(draw(st.lists(st.sampled_from(STEPS), max_size=3))),
        runtime=draw(st.sampled_from([False] * 5 + [True])),
        shared=draw(st.sampled_from([False] * 4 + [True])),
        numerics=draw(_mostly("reassociated", "approximate", "same_accum", "exact", times=6)),
    )


# --- recipes as functions ---------------------------------------------------------------------------------------


def tensors_of(recipe: Decoded) -> tuple[Tensor, ...]:
    """``x`` and the parameters by position: see ``function_of``."""
    generator = torch.Generator().manual_seed(recipe.seed)
    b, (m, k, n) = recipe.b, (recipe.m, recipe.k, recipe.n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(m, k) if recipe.lead is None else normal(recipe.lead, m, k)
    weights = [_codes(b.codes, normal(n, k) * 50) for _ in range(2)]
    shapes = _shapes(b, n, k)
    scale, point = normal(*shapes[b.scale.along]).abs() * 0.05 + 0.01, normal(*shapes[b.point.along]) * 10
    return x, *weights, scale, point.round().to(b.point_as), normal(n), normal(n).abs() * 0.05 + 0.01, normal(n, k)


def _codes(kind: Any, x: Tensor) -> Tensor:
    if kind == "nibbles":
        return ((x.abs() * 2).to(INT32) % 256).to(UINT8)[:, : x.shape[1] // 2]
    return x.abs().clamp(0, 255).to(UINT8) if kind is UINT8 else x.clamp(-128, 127).to(kind)


def _shapes(operand: Operand, rows: int, k: int) -> dict[str, tuple[int, ...]]:
    groups = max(k // operand.group, 1)
    return {
        "none": (),
        "number": (),
        "tensor": (),
        "rows": (rows, 1),
        "group": (rows, groups),
        "block": (max(rows // 2, 1), groups),
        "along_k": (k,),
    }


def applied(x: Tensor, factor: Tensor | float, how: Factor, group: int, op: Callable[..., Tensor]) -> Tensor:
    """``op(x [..., rows, k], factor)``, the factor repeated as ``how`` says."""
    if not isinstance(factor, Tensor) or how.along in ("number", "tensor", "along_k"):
        return op(x, factor)
    factor = factor.flip(-1) if how.twist == "flip" else factor
    factor = factor.transpose(-1, -2) if how.twist == "transposed" else factor
    if how.along == "rows":
        return op(x, factor)
    shape, k = x.shape, x.shape[-1]
    if how.along == "block":
        if how.spelled == "interleave":
            return op(x, factor.repeat_interleave(2, 0).repeat_interleave(group, 1))
        blocks = x.view(shape[0] // 2, 2, k // group, group)
        if how.spelled == "strided":
            return op(blocks, factor[None, :, None, :]).view(shape)
        return op(blocks, factor[:, None, :, None]).reshape(shape)
    if how.spelled == "view":
        return op(x.view(*shape[:-1], k // group, group), factor[..., None]).view(shape)
    if how.spelled == "unflatten":
        return op(x.unflatten(-1, (k // group, group)), factor.unsqueeze(-1)).flatten(-2)
    if how.spelled == "interleave":
        return op(x, factor.repeat_interleave(group, -1))
    if how.spelled == "expand":
        return op(x, factor.unsqueeze(-1).expand(*factor.shape, group).reshape(shape))
    if how.spelled == "tiled":
        return op(x, factor.repeat(*[1] * (len(shape) - 1), group))
    return op(x.view(*shape[:-1], group, k // group), factor[..., None, :]).view(shape)


def applied_transposed(x: Tensor, factor: Any, how: Factor, group: int, op: Callable[..., Tensor]) -> Tensor:
    """As ``applied``, of ``x [k, rows]`` and a factor that is stored ``[k / group, rows]``."""
    if not isinstance(factor, Tensor) or how.along in ("number", "tensor"):
        return op(x, factor)
    if how.along == "along_k":
        return op(x, factor[:, None])
    factor = factor if how.twist == "transposed" else factor.t().contiguous()
    factor = factor.flip(0) if how.twist == "flip" else factor
    if how.along == "rows":
        return op(x, factor)
    if how.along == "block":
        return op(x, factor.repeat_interleave(group, 0).repeat_interleave(2, 1))
    if how.spelled in ("view", "unflatten"):
        return op(x.view(-1, group, x.shape[1]), factor[:, None]).view(x.shape)
    if how.spelled == "tiled":
        return op(x, factor.repeat(group, 1))
    if how.spelled == "expand":
        return op(x, factor[:, None].expand(-1, group, -1).reshape(x.shape))
    return op(x, factor.repeat_interleave(group, 0))


def dequantized(of: Operand, codes: Tensor, scale: Any, point: Any, *, transposed: bool = False) -> Tensor:
    """``codes`` as a float matrix, step by step."""
    if of.through == "pt2e" and not transposed and codes.dtype in (INT8, UINT8):
        found = _through_op(of, codes, scale, point)
        if found is not None:
            return _twisted(of, found)
    apply = applied_transposed if transposed else applied
    y = subtracted(of, codes, point, apply) if of.point_twist != "after_scale" else codes
    y = y.to(of.to)
    if scale is not None:
        scale = scale.to(of.to) if isinstance(scale, Tensor) else scale
        y = apply(y, scale, of.scale, of.group, torch.mul)
    if of.point_twist == "after_scale" and point is not None:
        y = apply(y, point, of.point, of.group, torch.sub)
    return _twisted(of, y)


def subtracted(of: Operand, codes: Tensor, point: Any, apply: Callable[..., Tensor] = applied) -> Tensor:
    if point is None:
        return codes
    in_codes = of.point_in is INT8 and codes.dtype is not E4M3
    y = codes if in_codes else codes.to(F32 if of.point_in is INT8 else of.point_in)
    point = point * 0.5 if of.point_twist == "halved" else point
    return apply(y, point, of.point, of.group, torch.add if of.point_twist == "added" else torch.sub)


def _through_op(of: Operand, codes: Tensor, scale: Any, point: Any) -> Tensor | None:
    """PT2E's dequantize ops, which take one scale and zero point, or one a channel or token."""
    low, high = (0, 255) if codes.dtype is UINT8 else (-128, 127)
    if scale is None or of.point.along not in ("none", of.scale.along) or codes.dim() != 2:
        return None
    if of.scale.along == "number":
        return pt2e.dequantize_per_tensor(codes, scale, int(point or 0), low, high, codes.dtype)
    if of.scale.along == "tensor":
        zero = torch.zeros((), dtype=INT32) if point is None else point.to(INT32)
        return pt2e.dequantize_per_tensor(codes, scale, zero, low, high, codes.dtype)
    if of.scale.along != "rows":
        return None
    zeros = torch.zeros_like(scale, dtype=INT32) if point is None else point.to(INT32)
    if of.scale.spelled in ("view", "unflatten"):
        return pt2e.dequantize_per_token(codes, scale, zeros, low, high, codes.dtype, F32)
    axis = 1 if of.scale.twist == "transposed" else 0
    return pt2e.dequantize_per_channel(codes, scale.view(-1), zeros.view(-1), axis, low, high, codes.dtype)


def _twisted(of: Operand, y: Tensor) -> Tensor:
    if of.twist == "cast":
        return y.to(BF16).to(F32)
    if of.twist == "sliced":
        return torch.cat((y[:, 1:], y[:, :1]), 1)
    if of.twist == "permuted":
        return y.reshape(2, -1, y.shape[-1]).transpose(0, 1).reshape(y.shape)
    if of.twist == "view_back":
        return y.reshape(-1, 2).t().contiguous().t().reshape(y.shape)
    if of.twist == "expanded":
        return y[..., :1, :].expand(y.shape)
    return y


def _unpacked(of: Operand, codes: Tensor) -> Tensor:
    if of.codes != "nibbles":
        return codes
    low, high = codes & 15, codes >> 4
    return torch.stack((low, high), -1).flatten(1) if of.group == 2 else torch.cat((low, high), 1)


def _activation(of: Operand, x: Tensor) -> tuple[Tensor, Any, Any]:
    """Codes, scale and zero point of ``x``, the latter two computed from it where they vary."""
    scaled = (x * 30).round()
    codes = (
        (scaled.abs() if of.codes is UINT8 else scaled).clamp(-128 if of.codes is not UINT8 else 0, 127).to(of.codes)
    )
    grouped = x.abs().unflatten(-1, (-1, of.group)).amax(-1)
    rows = x.abs().amax(-1, keepdim=True)
    number = {"number": 0.5, "tensor": rows.amax(), "rows": rows, "group": grouped, "along_k": x[..., :1, :].abs() + 1}
    scale = number.get(of.scale.along)
    point = {"number": 3, "tensor": rows.amax(), "rows": rows, "group": grouped}.get(of.point.along)
    point = (point * 5).round().to(of.point_as) if isinstance(point, Tensor) else point
    return codes, scale, point


def function_of_decoded(recipe: Decoded, stepped: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The recipe as a function of ``x`` and its parameters.

    Args:
        stepped: one step on the result: ``(step, y, x, scale, parameters)``.
    """

    def function(x: Tensor, weight: Tensor, other: Tensor, scale: Tensor, point: Tensor, *rest: Tensor):
        bias, column, float_weight = rest
        if recipe.runtime:
            weight = (float_weight * 20 + x.sum()).clamp(0, 100).to(weight.dtype)[:, : weight.shape[1]]
        codes = _unpacked(recipe.b, weight)
        if recipe.matmul in ("int32", "int_mm"):
            assert recipe.a is not None
            y = _integer_product(recipe, recipe.a, x, codes, _unpacked(recipe.b, other), point)
            w = codes.float().t()
        else:
            w = _weight(recipe, codes, scale, point)
            y = _float_product(recipe, x, w, bias)
        outputs = []
        for step in recipe.steps:
            y = stepped(step, y, x, None, (weight, other, column, None, column[0], bias))
        if recipe.shared:
            outputs.append((x.reshape(-1, recipe.k) * 2).to(w.dtype) @ w)
        return (y, *outputs)

    return function


def _weight(recipe: Decoded, codes: Tensor, scale: Any, point: Any) -> Tensor:
    """The dequantized weight ``[k, n]``."""
    of = recipe.b
    scale = {"none": None, "number": 0.25}.get(of.scale.along, scale)
    point = {"none": None, "number": 8}.get(of.point.along, point)
    if of.transposed and of.codes != "nibbles":
        return dequantized(of, codes.t().contiguous(), scale, point, transposed=True)
    return dequantized(of, codes, scale, point).t()


def _float_product(recipe: Decoded, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    a = x if recipe.a is None else dequantized(recipe.a, *_activation(recipe.a, x))
    a = a.to(w.dtype)
    if recipe.matmul == "bmm":
        return torch.bmm(a, w.expand(a.shape[0], *w.shape))
    if recipe.matmul == "addmm":
        return torch.addmm(bias.to(w.dtype), a.reshape(-1, recipe.k), w)
    return a @ w


def _integer_product(recipe: Decoded, of: Operand, x: Tensor, codes: Tensor, other: Tensor, point: Any) -> Tensor:
    """A sum of integers, with zero points subtracted before it or corrected after it, scaled by the activation."""
    a, scale, a_point = _activation(of, x)
    a = a.to(INT8) if a.dtype is E4M3 else a
    codes = codes if codes.dtype is INT8 or recipe.matmul == "int32" else codes.to(INT8)
    a, rows = a.reshape(-1, recipe.k), x.reshape(-1, recipe.k)[:, :1].abs()
    if recipe.matmul == "int_mm":
        y = torch._int_mm(a, codes.t())
    else:
        b_point = {"none": None, "number": 8}.get(recipe.b.point.along, point)
        left = a if of.point.along == "group" or recipe.correction else subtracted(of, a, _flat(a_point, a))
        right = subtracted(recipe.b, codes, b_point)
        y = left.to(INT32) @ right.to(INT32).t()
    if recipe.correction is not None:
        y = _corrected(recipe.correction, y, codes, other, rows)
    scale = _flat(scale, a)
    return y if scale is None or of.scale.along in ("group", "along_k") else y * scale


def _flat(factor: Any, a: Tensor) -> Any:
    return factor.reshape(a.shape[0], 1) if isinstance(factor, Tensor) and factor.dim() > 1 else factor


def _corrected(how: Correction, acc: Tensor, weight: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    wide = INT64 if how.wide else INT32
    point: Any = {"number": 3, "tensor": (rows.amax() * 9).to(wide), "rows": (rows * 9).to(wide)}[how.point]
    sums = {
        "k": lambda: weight.sum(1, dtype=wide),
        "stored": lambda: (weight.float() @ torch.ones_like(weight[0]).float()).to(wide),
        "keepdim": lambda: weight.sum(1, keepdim=True, dtype=wide),
        "other_weight": lambda: other.sum(1, dtype=wide),
        "over_n": lambda: weight.sum(0, dtype=wide),
        "shifted": lambda: (weight.to(INT32) + 1).sum(1, dtype=wide),
    }[how.sums]()
    correction = sums * point
    if how.form == "add_negative":
        return acc + sums * -point
    if how.form == "sub_reversed":
        return correction - acc
    if how.form == "transposed":
        return acc - correction.t()
    return acc - correction * (2 if how.form == "doubled" else 1)
