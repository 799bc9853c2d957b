"""What each ATen op that computes does to rows: rules of the proof, by the name of the op's schema."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fx_quant.piecewise.row_rulebook import rule
from fx_quant.piecewise.rows import Call, State

_DIVIDES = ("div", "remainder", "fmod", "floor_divide", "divide")


@rule("copy", "fill", "zero", "floor_divide", "hardswish", "__and__", "__or__", "fx_quant::quantize")
@rule("quantized_decomposed::quantize_per_tensor", "quantized_decomposed::dequantize_per_tensor")
def pointwise(call: Call) -> State:
    """Operands broadcast against each other: the rows must meet rows.

    Raises:
        MixesRowsError: they do not.
    """
    if call.node.target._overloadname == "dynamic":  # type: ignore[union-attr]
        return _quantize_dynamic(call)
    value = call.node.meta["val"]
    results = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(result, Tensor) for result in results):
        raise call.fail("makes one number of all rows")
    rank, found = results[0].dim(), None
    for _, operand in call.operands():
        rows = call.state(operand)
        if rows is None:
            continue
        here = rows.at(rows.dim + rank - len(call.sizes(operand)))
        if found is not None and (here.dim != found.dim or not here.is_like(found)):
            raise call.fail("brings different rows together")
        found = replace(here, positional=here.positional or (found is not None and found.positional))
    assert found is not None
    name = call.node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
    if found.positional and name in _DIVIDES and not results[0].dtype.is_floating_point:
        raise call.fail("divides integers by what tells rows apart by their number")
    return found


def _quantize_dynamic(call: Call) -> State:
    rows = call.only("x")
    if call.given["granularity"] != "per_token":
        raise call.fail("takes one scale of all rows")
    if rows.dim == call.rank("x") - 1:
        raise call.fail(f"takes the largest value along dim {rows.dim}, in which the rows are")
    return rows


# --- sums and their like ------------------------------------------------------------------------------------------


@rule("sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "var", "std", "var_mean")
@rule("std_mean", "logsumexp", "norm", "linalg_vector_norm", "median", "nanmedian", "kthvalue", "mode", "nansum")
@rule("count_nonzero", "aminmax")
def _reduces(call: Call) -> State:
    name = "self" if "self" in call.given else "input"
    rows, rank = call.only(name), call.rank(name)
    dims = call.dims("dim", rank)
    if not dims:
        raise call.fail("reduces all dims, the rows with them")
    if rows.dim in dims:
        raise call.fail(f"reduces dim {rows.dim}, in which the rows are")
    return rows if call.given.get("keepdim") else rows.at(rows.dim - sum(dim < rows.dim for dim in dims))


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort")
@rule("argsort", "topk", "flip", "roll", "glu")
def _along(call: Call) -> State:
    """Ops that keep all dims and bring together what stands along some."""
    rows, rank = call.only("self"), call.rank("self")
    dims = call.dims("dims" if "dims" in call.given else "dim", rank)
    if not dims and "dims" in call.given:
        raise call.fail("moves values from row to row")
    if rows.dim in dims:
        raise call.fail(f"works along dim {rows.dim}, in which the rows are")
    return rows


@rule("native_layer_norm", "_fused_rms_norm")
def _norm(call: Call) -> State:
    rows = call.only("input")
    if rows.dim >= call.rank("input") - len(call.given["normalized_shape"]):
        raise call.fail(f"normalizes dim {rows.dim}, in which the rows are")
    return rows


@rule("native_group_norm", sizes=("N",))
@rule("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "fx_quant::weight_only_mm")
def _rows_first(call: Call) -> State:
    rows = call.only("input", "self", "x")
    if rows.dim != 0:
        raise call.fail(f"works along dim {rows.dim}, in which the rows are")
    return rows


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(call: Call) -> Any:
    rows = call.only("input")
    if call.given.get("training") or call.given.get("running_mean") is None:
        raise call.fail("takes mean and variance of all rows")
    if rows.dim == 1:
        raise call.fail("works along dim 1, in which the rows are")
    return (rows, *[None] * (len(call.node.meta["val"]) - 1))


@rule("quantized_decomposed::choose_qparams_per_token", "quantized_decomposed::choose_qparams_per_token_asymmetric")
def _per_token(call: Call) -> State:
    rows = call.only("input")
    if rows.dim == call.rank("input") - 1:
        raise call.fail(f"works along dim {rows.dim}, in which the rows are")
    return rows


# --- products -----------------------------------------------------------------------------------------------------


@rule("mm", "_int_mm", "bmm")
def _mm(call: Call) -> State:
    return _product(call, "self", "mat2")


@rule("addmm", "baddbmm")
def _addmm(call: Call) -> State:
    left, right = ("mat1", "mat2") if "mat1" in call.given else ("batch1", "batch2")
    return _with(call, "self", _product(call, left, right))


@rule("linear")
def _linear(call: Call) -> State:
    rows = call.only("input")
    if rows.dim == call.rank("input") - 1:
        raise call.fail("sums over the rows")
    return rows


def _product(call: Call, left: str, right: str) -> State:
    """Of ``[..., m, k]`` and ``[..., k, n]``, of which the dims before the last two are the same."""
    a, b, rank = call.state(call.given[left]), call.state(call.given[right]), call.rank(left)
    if (a is not None and a.dim == rank - 1) or (b is not None and b.dim == rank - 2):
        raise call.fail("sums over the rows")
    if a is not None and b is not None:
        if a.dim != b.dim or not a.is_like(b):
            raise call.fail("multiplies each row with all rows")
        return replace(a, positional=a.positional or b.positional)
    return a or b


def _with(call: Call, name: str, rows: State) -> State:
    """``rows`` of a result to which the argument ``name`` is added, or by which it is multiplied."""
    added = call.state(call.given.get(name))
    if added is None:
        return rows
    here = added.at(added.dim + len(call.sizes(call.node)) - call.rank(name))
    if rows is not None and (here.dim != rows.dim or not here.is_like(rows)):
        raise call.fail("brings different rows together")
    return replace(here, positional=here.positional or (rows is not None and rows.positional))


@rule("_scaled_mm", "fx_quant::scaled_mm")
def _scaled_mm(call: Call) -> State:
    left, scale = ("self", "scale_a") if "scale_a" in call.given else ("a", "a_scale")
    of_rows = {left, scale, "a_zero_point"}
    wrong = [name for name, node in call.operands() if call.state(node) is not None and name not in of_rows]
    rows = call.state(call.given[left])
    if wrong or rows is None or rows.dim != 0:
        raise call.fail("has rows elsewhere than in those of its first operand")
    for name in (scale, "a_zero_point"):
        rows = _with(call, name, rows)
    return rows
