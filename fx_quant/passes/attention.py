"""Attention of one query, as a token decodes, beside quantized matmuls on a CPU: by a kernel that reads a cache once.

PyTorch's op has a BLAS multiply each head by one row, which reads a cache slowly on some CPUs, and widens bfloat16
first: beside weights of 4 bits that is a large part of a token.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

import fx_quant.ops.attention  # noqa: F401  (the op)
from fx_quant.kernels.select import CPU_ATTENTION, disabled_kernels
from fx_quant.passes.emit import Emitter
from fx_quant.passes.memory import Memory
from fx_quant.passes.nodes import RESHAPES, arguments, aten, dtype, is_one, is_op, same_shape, same_size, shape
from fx_quant.passes.rewriting import Rewriting
from fx_quant.scheme import Numerics

fxq = torch.ops.fx_quant
_CALL = aten._scaled_dot_product_flash_attention_for_cpu.default


def attend_single_queries(state: Rewriting) -> None:
    """Attention of one query, of which nothing but the result is read, is one op of ours."""
    disabled = {*state.options.disabled_kernels, *disabled_kernels()}
    if (
        state.target.platform != "cpu"
        or state.context.deterministic  # rows beside it are summed in another order
        or state.options.numerics < Numerics.REASSOCIATED
        or disabled & {CPU_ATTENTION, "cpu"}
    ):
        return
    calls = [node for node in state.graph.find_nodes(op="call_function", target=_CALL) if _is_single(node)]
    if not calls:
        return
    emitter, memory = Emitter(state.graph), Memory(state.graph)
    for call in calls:
        given = arguments(call)
        keys, values = given["key"], given["value"]
        before = [_before_repeat(x) for x in (keys, values)]
        if all(x is not None and not memory.is_written_before(x, call) for x in before):
            keys, values = before
        with state.graph.inserting_before(call):
            operands = given["query"], keys, values, given["attn_mask"]
            ours = emitter.call(fxq.single_query_attention.default, *operands, scale=given["scale"], like=call)
        for result in list(call.users):
            emitter.replace(result, ours)
    state.attended = len(calls)
    state.graph.eliminate_dead_code()


def _is_single(call: Node) -> bool:
    """Whether ``call`` has one query, of which all keys may be read, and whether only its result is used."""
    given = arguments(call)
    q, mask = given["query"], given["attn_mask"]
    sizes = shape(q)
    return (
        all(is_op(user, operator.getitem) and user.args[1] == 0 for user in call.users)
        and len(sizes) == 4
        and is_one(sizes[2])
        and same_shape(shape(given["key"]), shape(given["value"]))
        and same_size(shape(given["key"])[3], sizes[3])
        and not given["dropout_p"]
        and not given["is_causal"]
        and (mask is None or (isinstance(mask, Node) and len(shape(mask)) in (2, 4)))
        and dtype(q) == dtype(given["key"]) == dtype(given["value"])
    )


def _before_repeat(x: Node) -> Node | None:
    """``[b, h', l, d]`` of which ``x [b, h, l, d]`` is each head, repeated for h / h' heads beside one another."""
    if not is_op(x, *RESHAPES):
        return None
    repeated = x.args[0]
    if is_op(repeated, aten.clone.default):
        repeated = repeated.args[0]
    if not is_op(repeated, aten.expand.default):
        return None
    one = repeated.args[0]
    if not is_op(one, aten.unsqueeze.default) or one.args[1] != 2:
        return None
    heads, sizes, all_sizes = one.args[0], shape(repeated), shape(x)
    if not isinstance(heads, Node) or len(shape(heads)) != 4 or len(sizes) != 5 or len(all_sizes) != 4:
        return None
    (b, shared, length, head), (batch, _, many, last) = shape(heads), all_sizes
    same = all(map(same_size, (b, length, head, sizes[1]), (batch, many, last, shared)))
    return heads if same else None
