"""PT2E: ``quantized_decomposed`` quantizes and dequantizes around float matmuls, and torchao's float8 likewise.

``dequantize``: ``(float32(q) - zero_point) * scale``, cast to ``out_dtype`` (float32 when not given); float8 has no
zero point. The quantize ops return plain codes, which need no rule. Sources:
``torch/ao/quantization/fx/_decomposed.py``, ``torchao/quantization/quant_primitives.py``.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fx_quant.passes.nodes import args_of, constant, dtype, is_single
from fx_quant.passes.rules.steps import along_dim, is_integer, is_whole, rounded, scale_of
from fx_quant.passes.values import Affine, Codes, Decode, Environment, Rule, Unknown, Value


def _per_tensor(env: Environment, node: Node) -> Value | None:
    codes, scale, zero_point = args_of(node)[:3]
    return _affine(env, node, codes, lambda _: _single(scale), lambda _: _single(zero_point))


def _single(operand: Any) -> Decode | None:
    number = constant(operand)
    if number is not None:
        return Decode(float(number))
    return Decode(operand) if is_single(operand) else None


def _per_channel(env: Environment, node: Node) -> Value | None:
    codes, scales, zero_points, axis = args_of(node)[:4]
    return _affine(
        env,
        node,
        codes,
        lambda coded: along_dim(coded, axis, scales),
        None if zero_points is None else lambda coded: along_dim(coded, axis, zero_points),
    )


def _per_token(env: Environment, node: Node) -> Value | None:
    codes, scales, zero_points = args_of(node)[:3]
    return _affine(
        env, node, codes, lambda coded: scale_of(coded, node, scales), lambda coded: scale_of(coded, node, zero_points)
    )


def _float8(env: Environment, node: Node) -> Value | None:
    codes, scale = args_of(node)[:2]
    return _affine(env, node, codes, lambda coded: scale_of(coded, node, scale), None)


def _affine(env: Environment, node: Node, source: Node, scale, zero_point) -> Value | None:
    codes = env.value(source)
    if not isinstance(codes, Codes):
        return None
    symmetric = zero_point is None
    of_scale, of_zero_point = scale(codes), None if symmetric else zero_point(codes)
    if of_scale is None or (of_zero_point is None and not symmetric):
        return Unknown(node, "the scale or zero point does not follow the tensor, a row or a channel of the codes")
    points = _integers(of_zero_point)
    if points is None:
        return Unknown(node, "the zero point is no integer tensor")
    to = dtype(node)
    if to is None or not to.is_floating_point:
        return Unknown(node, f"a dequantize to {to} has no rule")
    return rounded(Affine(codes, (of_scale,), points), to)


def _integers(zero_point: Decode | None) -> tuple[Decode, ...] | None:
    """The zero point in a tuple, empty where it is 0; None where it may be no integer."""
    if zero_point is None or zero_point.source == 0.0:
        return ()
    if isinstance(zero_point.source, float):
        return (zero_point,) if is_whole(zero_point.source) else None
    return (zero_point,) if is_integer(dtype(zero_point.source)) else None


_NAMESPACE = "quantized_decomposed."
RULES: dict[str, Rule] = {
    f"{_NAMESPACE}dequantize_per_tensor.default": _per_tensor,
    f"{_NAMESPACE}dequantize_per_tensor.tensor": _per_tensor,
    f"{_NAMESPACE}dequantize_per_tensor.tensor2": _per_tensor,
    f"{_NAMESPACE}dequantize_per_channel.default": _per_channel,
    f"{_NAMESPACE}dequantize_per_token.default": _per_token,
    "torchao.dequantize_affine_float8_non_decomposed.default": _float8,
}
