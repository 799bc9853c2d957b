"""What each ATen op that arranges, chooses or makes values does to rows: rules of the proof."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from fx_quant.piecewise.row_rulebook import rule
from fx_quant.piecewise.rows import Call, Rows, State, has, rows_by_shape

# --- the same values otherwise arranged ---------------------------------------------------------------------------


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "view_as_complex", "view_as_real")
@rule("_conj", "_neg_view", "resolve_conj", "resolve_neg", "contiguous")
def _same(call: Call) -> State:
    rows = call.only("self")
    if rows.dim == call.rank("self") - 1 and "complex" in str(call.node.target):
        raise call.fail("joins neighbours of the dim in which the rows are")
    return rows


@rule("view", "reshape", "_unsafe_view", "_reshape_copy", "view_copy", sizes=("size", "shape"))
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


@rule("permute", "transpose", "t", "numpy_T", "permute_copy", "transpose_copy", "t_copy")
def _permute(call: Call) -> State:
    rows, rank = call.only("self"), call.rank("self")
    if "dims" in call.given:
        return rows.at(call.dims("dims", rank).index(rows.dim))
    first, second = (call.given["dim0"] % rank, call.given["dim1"] % rank) if "dim0" in call.given else (0, rank - 1)
    return rows.at({first: second, second: first}.get(rows.dim, rows.dim))


@rule("unsqueeze", "unsqueeze_copy")
def _unsqueeze(call: Call) -> State:
    rows = call.only("self")
    return rows.at(rows.dim + (call.given["dim"] % (call.rank("self") + 1) <= rows.dim))


@rule("squeeze", "squeeze_copy")
def _squeeze(call: Call) -> State:
    rows, before = call.only("self"), call.sizes(call.given["self"])
    asked = call.dims("dim", len(before)) if "dim" in call.given else range(len(before))
    return rows.at(rows.dim - sum(before[dim] == 1 for dim in asked if dim < rows.dim))


@rule("expand", "expand_copy", sizes=("size",), makes=True)
def _expand(call: Call) -> State:
    rows = call.state(call.given["self"])
    if rows is None:
        return _uniform(call)
    return rows.at(rows.dim + len(call.sizes(call.node)) - call.rank("self"))


@rule("select", "slice", "narrow", "select_copy", "slice_copy")
def _part(call: Call) -> State:
    rows = call.only("self")
    dim = call.given["dim"] % call.rank("self")
    if dim == rows.dim:
        raise call.fail(f"takes some of dim {dim}, in which the rows are")
    gone = "index" in call.given and dim < rows.dim
    return rows.at(rows.dim - gone)


@rule("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "chunk", "unbind", "unbind_copy")
def _split(call: Call) -> State:
    rows = call.only("self")
    dim = call.given["dim"] % call.rank("self")
    if dim == rows.dim:
        raise call.fail(f"takes dim {dim} apart, in which the rows are")
    return rows.at(rows.dim - ("unbind" in str(call.node.target) and dim < rows.dim))


@rule("slice_scatter", "select_scatter")
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


@rule("cat", "stack")
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


@rule("constant_pad_nd")
def _pad(call: Call) -> State:
    rows = call.only("self")
    pad, place = call.given["pad"], 2 * (call.rank("self") - 1 - rows.dim)
    if any(pad[place : place + 2]):
        raise call.fail(f"pads dim {rows.dim}, in which the rows are")
    return rows


@rule("repeat")
def _repeat(call: Call) -> State:
    rows, repeats = call.only("self"), call.given["repeats"]
    at = rows.dim + len(repeats) - call.rank("self")
    return replace(rows, dim=at, outer=rows.outer * repeats[at])


@rule("tril", "triu")
def _triangle(call: Call) -> State:
    return replace(call.only("self"), positional=True)


# --- what is read by an index -------------------------------------------------------------------------------------


@rule("embedding")
def _embedding(call: Call) -> State:
    return _safe_index(call, call.only("indices"))


@rule("index_select", "gather")
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


@rule("index")
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


@rule("full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty", sizes=("size",), makes=True)
@rule("empty_strided", "new_empty_strided", sizes=("size", "stride"), makes=True)
@rule("empty_permuted", sizes=("size",), makes=True)
def _uniform(call: Call) -> State:
    """The same in each row: only its shape says that it has rows."""
    try:
        return rows_by_shape(call.sizes(call.node), call.symbol)
    except ValueError as error:
        raise call.fail(str(error)) from error


@rule("full_like", "zeros_like", "ones_like", "empty_like")
def _like(call: Call) -> State:
    return replace(call.only("self"), positional=False)


@rule("arange", sizes=("end",), makes=True)
def _arange(call: Call) -> State:
    rows = _uniform(call)
    return None if rows is None else replace(rows, positional=True)
