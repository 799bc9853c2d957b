"""Fake quantization: codes that never leave floating point, so that no graph holds them."""

from __future__ import annotations

import operator

from torch.fx import Node

from fx_quant.passes.nodes import args_of, aten, constant, is_op
from fx_quant.passes.rules.steps import is_whole
from fx_quant.passes.values import Environment, Rule, Unknown, Value

_OPS = frozenset(
    getattr(aten, name).default
    for name in (
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_channel_affine",
        "fake_quantize_per_tensor_affine_cachemask",
        "fake_quantize_per_channel_affine_cachemask",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    )
)
_RULE = "fake quantization keeps its codes in floating point, so there are none to multiply: convert the model first"


def _fake_quantized(env: Environment, node: Node) -> Value | None:
    return Unknown(node, _RULE)


def _first_result(env: Environment, node: Node) -> Value | None:
    return Unknown(node, _RULE) if args_of(node)[1] == 0 and is_op(args_of(node)[0], *_OPS) else None


def _clamped(env: Environment, node: Node) -> Value | None:
    """``clamp(round(x / scale) [+ zero_point], lo, hi)`` in floating point, to no more integers than a byte has."""
    given = (*args_of(node)[1:3], node.kwargs.get("min"), node.kwargs.get("max"))
    bounds = [bound for bound in map(constant, given) if bound is not None]
    inner = args_of(node)[0]
    if is_op(inner, aten.clamp_min.default):
        bounds += [bound for bound in [constant(args_of(inner)[1])] if bound is not None]
        inner = args_of(inner)[0]
    if len(bounds) != 2 or not all(map(is_whole, bounds)) or not 0 < abs(bounds[0] - bounds[1]) < 256:
        return None
    while is_op(inner, aten.add.Tensor):
        inner = next((n for n in inner.all_input_nodes if is_op(n, aten.round.default, aten.add.Tensor)), None)
    return Unknown(node, _RULE) if is_op(inner, aten.round.default) else None


STARTS = frozenset({*_OPS, aten.round.default})
RULES: dict[object, Rule] = {
    **dict.fromkeys(_OPS, _fake_quantized),
    operator.getitem: _first_result,
    **dict.fromkeys((aten.clamp_max.default, aten.clamp.default), _clamped),
}
