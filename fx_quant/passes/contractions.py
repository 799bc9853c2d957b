"""Which nodes are contractions: sums over products of their operands, under whatever name.

The list is open. PyTorch's flop counter knows most of ATen's, the shape of a name tells the others, of ATen or of a
library, and only a contraction whose operand is quantized ends in a report.
"""

from __future__ import annotations

import functools
import re

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils.flop_counter import flop_registry

from fx_quant.passes.nodes import ADDING_MATMULS, aten, dtype, is_op, shape, summed_size

_COUNTED = frozenset(flop_registry)
_CONTRACTION = re.compile(
    r"(?<!upsample_)(?<![a-z0-9])(?:[a-z0-9]*(?:mm|mv|linear|matmul|gemm|gemv|conv|convolution|attention|einsum|lstm|gru|rnn)"
    r"|dot|vdot|trilinear|cdist|tensordot|moe)(?:v?\d*d?)(?![a-z0-9])"
)
# What only prepares a weight for one.
_PREPARES = re.compile(r"prepack(?!ed)|unpack|reorder|flatten|pack_quantized|pack_gemm|_search")
_QUANTIZATION = re.compile(r"quant(?!ile|um)")
_QUANTIZED_CONTRACTION = re.compile(
    r"quant|int8|int4|fp8|float8|fp4|[48]bit|_i8|w8a8|w4a8|w4a16|awq|gptq|marlin|scaled_mm|scaled_grouped|int_mm|qlinear|qconv|qbytes"
)
# Ops that add their first argument to what they sum.
_ADDS_FIRST = frozenset({"addmm", "addmv", "baddbmm", "addbmm", "sspaddmm", "_addmm_activation"})
_BESIDE = re.compile(r"bias|mask|scale|zero|offs|seed|qparam")
# Namespaces whose ops the rules see through, or are meant to.
_OPEN = frozenset(
    {"aten", "prims", "fx_quant", "higher_order", "inductor_prims", "quantized_decomposed", "rngprims", ""}
)


def op_name(target: object) -> str:
    """``aten::addmm`` -> ``addmm``; the name of a higher-order op; ``""`` for a Python function."""
    if isinstance(target, OpOverload):
        return target._schema.name.split("::")[-1]
    return target.name() if isinstance(target, HigherOrderOperator) else ""


def called(node: Node) -> object:
    """The op that ``node`` calls; of one that is made functional around its mutation, the op itself."""
    if isinstance(node.target, HigherOrderOperator) and node.target.name().startswith("auto_functionalized"):
        return node.args[0]
    return node.target


@functools.cache
def _counts(target: object) -> bool:
    if getattr(target, "overloadpacket", target) in _COUNTED:
        return True
    name = op_name(target).lower()
    return bool(_CONTRACTION.search(name)) and not _PREPARES.search(name)


def is_contraction(node: Node) -> bool:
    """Whether ``node`` sums over products of its operands, as far as its name tells."""
    return node.op == "call_function" and _counts(called(node))


@functools.cache
def _is_quantized_contraction(target: object) -> bool:
    return _counts(target) and bool(_QUANTIZED_CONTRACTION.search(op_name(target).lower()))


def is_quantized_contraction(node: Node) -> bool:
    """Whether ``node`` is a contraction of quantized operands by its name alone."""
    return node.op == "call_function" and _is_quantized_contraction(called(node))


@functools.cache
def _quantizes(target: object) -> bool:
    return bool(_QUANTIZATION.search(op_name(target).lower())) and not _counts(target)


def is_quantization(node: Node) -> bool:
    """Whether ``node`` quantizes, dequantizes or does one after the other, by its name."""
    return node.op == "call_function" and _quantizes(called(node))


@functools.cache
def _is_opaque(target: object) -> bool:
    if isinstance(target, OpOverload):
        return target.namespace not in _OPEN
    return isinstance(target, HigherOrderOperator) and target.name().startswith("triton_kernel_wrapper")


def is_opaque(node: Node) -> bool:
    """Whether ``node`` calls an op of a library or of the user, or a Triton kernel: what it computes is not known."""
    return node.op == "call_function" and _is_opaque(called(node))


def added_operand(node: Node) -> object:
    """What ``addmm`` and its kin add to the sum; None of other contractions."""
    return node.args[0] if node.args and op_name(node.target) in _ADDS_FIRST else None


def operands_of_contraction(node: Node) -> list[Node]:
    """What ``node`` multiplies: its tensors without a bias, a mask, scales or what is added."""
    target = called(node)
    name = op_name(target)
    if not isinstance(target, OpOverload) or target is not node.target:
        given = [value for key, value in node.kwargs.items() if not _BESIDE.search(key)]
        operands = [n for value in (*node.args[:3], *given) for n in _nodes(value)]
    else:
        names = [argument.name for argument in target._schema.arguments]
        args = dict(zip(names, node.args, strict=False)) | node.kwargs
        kept = [key for key in args if not _BESIDE.search(key)]
        kept = kept[1:] if name in _ADDS_FIRST else kept[:3] if "attention" in name else kept
        operands = [n for key in kept for n in _nodes(args[key])]
    vectors = name.endswith(("mv", "dot"))
    return [n for n in dict.fromkeys(operands) if len(shape(n)) > (0 if vectors else 1)]


def _nodes(value: object) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in _nodes(item)]
    return [n for item in value.values() for n in _nodes(item)] if isinstance(value, dict) else []


SUMS = frozenset({aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default})


def subgraphs_of(node: Node) -> list[Graph]:
    """The graphs that the higher-order op ``node`` runs: a region, branches, the body of a loop."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return []
    owner, graphs = node.graph.owning_module, []
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and owner is not None:
            module = getattr(owner, str(argument.target), None)
            if isinstance(module, GraphModule):
                graphs.append(module.graph)
    return list(dict.fromkeys(graphs))


def outer_product(node: Node) -> bool:
    """Whether a matmul has nothing to sum over, as the outer product of two vectors."""
    if not is_op(node, aten.mm.default, aten.bmm.default, aten.mv.default, *ADDING_MATMULS):
        return False
    return summed_size(node) == 1


# Dtypes narrower than 16 bits: whatever holds such is codes, or bytes of them.
LOW_BIT_DTYPES: frozenset[torch.dtype] = frozenset(
    getattr(torch, name)
    for name in (
        *("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    )
    if hasattr(torch, name)
)


def may_store_codes(node: Node) -> bool:
    """Whether ``node`` is of a low-bit dtype, or an input that may hold codes in wider integers."""
    kind = dtype(node)
    if kind in LOW_BIT_DTYPES:
        return True
    wide = kind in (torch.int16, torch.int32) and node.op in ("placeholder", "get_attr")
    return wide and len(shape(node)) > 1
