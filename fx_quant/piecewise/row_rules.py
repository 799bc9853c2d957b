"""What each ATen op does to rows: the rules of the proof, by the name of the op's schema."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fx_quant.piecewise.rows import Call, Rows, State, has, rows_by_shape

Rule = Callable[[Call], Any]


@dataclass(frozen=True)
class Known:
    """A rule, and how it is asked.

    Args:
        rule: the state of the result, or a tuple of those of several; raises ``MixesRowsError``. It is asked of a call
            whose operands have rows.
        sizes: arguments that may depend on the number of rows, as only the shape of the result follows from them, and
            that is checked.
        makes: it is asked of every call, as the op makes a tensor of any size.
    """

    rule: Rule
    sizes: tuple[str, ...] = ()
    makes: bool = False


RULES: dict[str, Known] = {}


def _rule(*names: str, sizes: tuple[str, ...] = (), makes: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ops by name, those of ATen without their namespace."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = Known(rule, sizes, makes)
        return rule

    return register


_DIVIDES = ("div", "remainder", "fmod", "floor_divide", "divide")


@_rule("copy", "fill", "zero", "floor_divide", "hardswish", "__and__", "__or__", "fx_quant::quantize")
@_rule("quantized_decomposed::quantize_per_tensor", "quantized_decomposed::dequantize_per_tensor")
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


@_rule("sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "var", "std", "var_mean")
@_rule("std_mean", "logsumexp", "norm", "linalg_vector_norm", "median", "nanmedian", "kthvalue", "mode", "nansum")
@_rule("count_nonzero", "aminmax")
def _reduces(call: Call) -> State:
    name = "self" if "self" in call.given else "input"
    rows, rank = call.only(name), call.rank(name)
    dims = call.dims("dim", rank)
    if not dims:
        raise call.fail("reduces all dims, the rows with them")
    if rows.dim in dims:
        raise call.fail(f"reduces dim {rows.dim}, in which the rows are")
    return rows if call.given.get("keepdim") else rows.at(rows.dim - sum(dim < rows.dim for dim in dims))


@_rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort")
@_rule("argsort", "topk", "flip", "roll", "glu")
def _along(call: Call) -> State:
    """Ops that keep all dims and bring together what stands along some."""
    rows, rank = call.only("self"), call.rank("self")
    dims = call.dims("dims" if "dims" in call.given else "dim", rank)
    if not dims and "dims" in call.given:
        raise call.fail("moves values from row to row")
    if rows.dim in dims:
        raise call.fail(f"works along dim {rows.dim}, in which the rows are")
    return rows


@_rule("native_layer_norm", "_fused_rms_norm")
def _norm(call: Call) -> State:
    rows = call.only("input")
    if rows.dim >= call.rank("input") - len(call.given["normalized_shape"]):
        raise call.fail(f"normalizes dim {rows.dim}, in which the rows are")
    return rows


@_rule("native_group_norm", sizes=("N",))
@_rule("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "fx_quant::weight_only_mm")
def _rows_first(call: Call) -> State:
    rows = call.only("input", "self", "x")
    if rows.dim != 0:
        raise call.fail(f"works along dim {rows.dim}, in which the rows are")
    return rows


@_rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(call: Call) -> Any:
    rows = call.only("input")
    if call.given.get("training") or call.given.get("running_mean") is None:
        raise call.fail("takes mean and variance of all rows")
    if rows.dim == 1:
        raise call.fail("works along dim 1, in which the rows are")
    return (rows, *[None] * (len(call.node.meta["val"]) - 1))


@_rule("quantized_decomposed::choose_qparams_per_token", "quantized_decomposed::choose_qparams_per_token_asymmetric")
def _per_token(call: Call) -> State:
    rows = call.only("input")
    if rows.dim == call.rank("input") - 1:
        raise call.fail(f"works along dim {rows.dim}, in which the rows are")
    return rows


# --- products -----------------------------------------------------------------------------------------------------


@_rule("mm", "_int_mm")
def _mm(call: Call) -> State:
    return _product(call, "self", "mat2")


@_rule("bmm")
def _bmm(call: Call) -> State:
    return _product(call, "self", "mat2")


@_rule("addmm", "baddbmm")
def _addmm(call: Call) -> State:
    left, right = ("mat1", "mat2") if "mat1" in call.given else ("batch1", "batch2")
    return _with(call, "self", _product(call, left, right))


@_rule("linear")
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


@_rule("_scaled_mm", "fx_quant::scaled_mm")
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


# --- the same values otherwise arranged ---------------------------------------------------------------------------


@_rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "view_as_complex", "view_as_real")
@_rule("_conj", "_neg_view", "resolve_conj", "resolve_neg", "contiguous")
def _same(call: Call) -> State:
    rows = call.only("self")
    if rows.dim == call.rank("self") - 1 and "complex" in str(call.node.target):
        raise call.fail("joins neighbours of the dim in which the rows are")
    return rows


@_rule("view", "reshape", "_unsafe_view", "_reshape_copy", "view_copy", sizes=("size", "shape"))
def _view(call: Call) -> State:
    rows = call.only("self")
    before, after = call.sizes(call.given["self"]), call.sizes(call.node)
    if "dtype" in call.given:
        if before != after:
            raise call.fail("reads values as others of another width")
        return rows
    dims = [dim for dim, size in enumerate(after) if has(size, call.symbol)]
    if len(dims) == 1:
        (dim,) = dims
        # In memory order, row i is all that has i at one place: so many indices before it, so many after it.
        outer, inner = math.prod(before[: rows.dim]) * rows.outer, rows.inner * math.prod(before[rows.dim + 1 :])
        left, right = math.prod(after[:dim]), math.prod(after[dim + 1 :])
        known = all(isinstance(size, int) and size > 0 for size in (outer, inner, left, right))
        if known and outer % left == 0 and inner % right == 0:
            return Rows(dim, outer // left, inner // right, rows.positional)
    raise call.fail(f"takes {list(before)} for {list(after)}, which cuts rows or joins them")


@_rule("permute", "transpose", "t", "numpy_T", "permute_copy", "transpose_copy", "t_copy")
def _permute(call: Call) -> State:
    rows, rank = call.only("self"), call.rank("self")
    if "dims" in call.given:
        return rows.at(call.dims("dims", rank).index(rows.dim))
    first, second = (call.given["dim0"] % rank, call.given["dim1"] % rank) if "dim0" in call.given else (0, rank - 1)
    return rows.at({first: second, second: first}.get(rows.dim, rows.dim))


@_rule("unsqueeze", "unsqueeze_copy")
def _unsqueeze(call: Call) -> State:
    rows = call.only("self")
    return rows.at(rows.dim + (call.given["dim"] % (call.rank("self") + 1) <= rows.dim))


@_rule("squeeze", "squeeze_copy")
def _squeeze(call: Call) -> State:
    rows, before = call.only("self"), call.sizes(call.given["self"])
    asked = call.dims("dim", len(before)) if "dim" in call.given else range(len(before))
    return rows.at(rows.dim - sum(before[dim] == 1 for dim in asked if dim < rows.dim))


@_rule("expand", "expand_copy", sizes=("size",), makes=True)
def _expand(call: Call) -> State:
    rows = call.state(call.given["self"])
    if rows is None:
        return _uniform(call)
    return rows.at(rows.dim + len(call.sizes(call.node)) - call.rank("self"))


@_rule("select", "slice", "narrow", "select_copy", "slice_copy")
def _part(call: Call) -> State:
    rows = call.only("self")
    dim = call.given["dim"] % call.rank("self")
    if dim == rows.dim:
        raise call.fail(f"takes some of dim {dim}, in which the rows are")
    gone = "index" in call.given and dim < rows.dim
    return rows.at(rows.dim - gone)


@_rule("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "chunk", "unbind", "unbind_copy")
def _split(call: Call) -> State:
    rows = call.only("self")
    dim = call.given["dim"] % call.rank("self")
    if dim == rows.dim:
        raise call.fail(f"takes dim {dim} apart, in which the rows are")
    return rows.at(rows.dim - ("unbind" in str(call.node.target) and dim < rows.dim))


@_rule("slice_scatter", "select_scatter")
def _write_part(call: Call) -> State:
    rows, written = call.state(call.given["self"]), call.state(call.given["src"])
    dim = call.given["dim"] % call.rank("self")
    if rows is None or written is None or dim == rows.dim:
        raise call.fail(f"writes to some of dim {dim}, beside rows or along them")
    if "index" in call.given and dim <= written.dim:
        written = written.at(written.dim + 1)
    if rows.dim != written.dim or not rows.is_like(written):
        raise call.fail("brings different rows together")
    return replace(rows, positional=rows.positional or written.positional)


@_rule("cat", "stack")
def _join(call: Call) -> State:
    parts = call.given["tensors"]
    rank = len(call.sizes(call.node))
    dim, states = call.given["dim"] % rank, [call.state(part) for part in parts]
    first = states[0]
    if first is None or any(state is None for state in states):
        raise call.fail("joins rows with what has none")
    if any(each.dim != first.dim or not each.is_like(first) for each in states if each is not None):
        raise call.fail("brings different rows together")
    if "cat" in str(call.node.target):
        if dim == first.dim:
            raise call.fail(f"joins tensors along dim {dim}, in which the rows are")
    elif dim <= first.dim:
        first = first.at(first.dim + 1)
    return replace(first, positional=any(each.positional for each in states if each is not None))


@_rule("constant_pad_nd")
def _pad(call: Call) -> State:
    rows = call.only("self")
    pad, place = call.given["pad"], 2 * (call.rank("self") - 1 - rows.dim)
    if any(pad[place : place + 2]):
        raise call.fail(f"pads dim {rows.dim}, in which the rows are")
    return rows


@_rule("repeat")
def _repeat(call: Call) -> State:
    rows, repeats = call.only("self"), call.given["repeats"]
    at = rows.dim + len(repeats) - call.rank("self")
    return replace(rows, dim=at, outer=rows.outer * repeats[at])


@_rule("tril", "triu")
def _triangle(call: Call) -> State:
    return replace(call.only("self"), positional=True)


# --- what is read by an index -------------------------------------------------------------------------------------


@_rule("embedding")
def _embedding(call: Call) -> State:
    return _safe_index(call, call.only("indices"))


@_rule("index_select", "gather")
def _chosen(call: Call) -> State:
    rows, index, rank = call.state(call.given["self"]), call.state(call.given["index"]), call.rank("self")
    dim = call.given["dim"] % rank
    by_element = "gather" in str(call.node.target)
    if index is not None:
        _safe_index(call, index)
    if rows is not None and rows.dim == dim:
        raise call.fail(f"chooses along dim {dim}, in which the rows are")
    if rows is None and index is not None and (not by_element or index.dim == dim):
        return index.at(dim)
    if rows is not None and not by_element and index is None:
        return rows
    if rows is not None and index is not None and by_element and rows.dim == index.dim and rows.is_like(index):
        return rows
    raise call.fail("chooses among rows")


@_rule("index")
def _index(call: Call) -> State:
    indices, rows = call.given["indices"], call.state(call.given["self"])
    places = [place for place, each in enumerate(indices) if each is not None]
    first, last = places[0], places[-1]
    values = [indices[place].meta["val"] for place in places]
    if last - first + 1 != len(places) or any(not isinstance(v, Tensor) or v.dtype.itemsize < 4 for v in values):
        raise call.fail("chooses by a mask, or by indices of several dims apart")
    having = [(call.state(indices[place]), value) for place, value in zip(places, values, strict=True)]
    width = max(value.dim() for value in values)
    if rows is None:
        found = None
        for state, value in having:
            if state is None:
                continue
            here = _safe_index(call, state).at(state.dim + width - value.dim() + first)
            if found is not None and (found.dim != here.dim or not found.is_like(here)):
                raise call.fail("brings different rows together")
            found = here
        return found
    if first <= rows.dim <= last or any(state is not None for state, _ in having):
        raise call.fail("chooses among rows")
    return rows if rows.dim < first else rows.at(rows.dim - len(places) + width)


def _safe_index(call: Call, index: Rows) -> Rows:
    """``index``, of which a row that repeats another cannot be out of range where that one is not."""
    if index.positional:
        raise call.fail("reads at the number of a row, which padding may put out of range")
    return index


# --- tensors that are made ----------------------------------------------------------------------------------------


@_rule("full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty", sizes=("size",), makes=True)
@_rule("empty_strided", "new_empty_strided", sizes=("size", "stride"), makes=True)
@_rule("empty_permuted", sizes=("size",), makes=True)
def _uniform(call: Call) -> State:
    """The same in each row: only its shape says that it has rows."""
    try:
        return rows_by_shape(call.sizes(call.node), call.symbol)
    except ValueError as error:
        raise call.fail(str(error)) from error


@_rule("full_like", "zeros_like", "ones_like", "empty_like")
def _like(call: Call) -> State:
    return replace(call.only("self"), positional=False)


@_rule("arange", sizes=("end",), makes=True)
def _arange(call: Call) -> State:
    rows = _uniform(call)
    return None if rows is None else replace(rows, positional=True)
