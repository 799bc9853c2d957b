"""One linear of a checkpoint: which tensors it has, and the ``QuantizedLinear`` that they make."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.layers.linear_operands import weight_scale_dtype
from fx_quant.loading.checkpoint_values import must
from fx_quant.ops import unpack_nibbles
from fx_quant.scheme import OperandSpec, Scheme, dtype_name
from fx_quant.weights import pack_int4

# Names in a checkpoint by what they are to a QuantizedLinear; of several, the first that is there.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "weight": ("weight_packed", "weight"),
    # Not an inverse, whatever it is called: the weight is codes * weight_scale_inv.
    "weight_scale": ("weight_scale", "weight_scale_inv"),
    "weight_zero_point": ("weight_zero_point",),
    "weight_shape": ("weight_shape",),
    "weight_g_idx": ("weight_g_idx",),
    "bias": ("bias",),
}
_STATIC_ALIASES: Mapping[str, tuple[str, ...]] = {
    "input_scale": ("input_scale", "activation_scale"),
    "input_zero_point": ("input_zero_point",),
}


def tensors_of(scheme: Scheme, prefix: str, files: Container[str], bias: bool) -> dict[str, str]:
    """The tensors of a linear that ``decode_linear`` wants, by what they are: their names in the checkpoint.

    Args:
        prefix: the linear's name and a dot.
        files: every name in the checkpoint.
        bias: whether the linear has one.
    """
    static = not scheme.weight_only and not scheme.activation.dynamic
    keys: dict[str, str] = {}
    for what, names in {**_ALIASES, **(_STATIC_ALIASES if static else {})}.items():
        key = next((prefix + name for name in names if prefix + name in files), None)
        if key is not None and (bias or what != "bias"):
            keys[what] = key
    return keys


def decode_linear(linear: nn.Linear, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The linear that holds the codes and scales of ``tensors`` as they are: nothing is quantized again.

    Args:
        linear: the float linear that it stands for; its weight ``[n, k]`` may be on the meta device.
        scheme: of the weight and the activation.
        tensors: by what they are, as ``tensors_of`` calls them. ``weight``: codes ``[n, k]``, or int32 words of codes
            packed along k. ``weight_zero_point``: like the scale, or int32 words packed along n.

    Raises:
        ValueError: tensors that do not fit the linear or the scheme.
    """
    n, k = linear.weight.shape
    _check_order(scheme, tensors, k)
    shape = tensors.get("weight_shape")
    must(
        shape is None or shape.tolist() == [n, k],
        f"weight_shape must be [n, k] = {[n, k]} as in the model, got {None if shape is None else shape.tolist()}; "
        "build the model from the checkpoint's config.json",
    )
    scale = tensors["weight_scale"]
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    for what in ("weight_scale", "input_scale", "bias"):
        x = scale if what == "weight_scale" else tensors.get(what)
        must(
            x is None or x.is_floating_point(),
            f"{what} must be float, got {dtype_name(torch.int8 if x is None else x.dtype)}; save the model again",
        )
    scale = scale.to(weight_scale_dtype(scale, scheme.weight))
    zero_point = _zero_point(scheme.weight, tensors.get("weight_zero_point"), n)
    bias, input_scale = tensors.get("bias"), tensors.get("input_scale")
    return QuantizedLinear(
        scheme,
        _weight_codes(scheme.weight, tensors["weight"], n, k),
        scale,
        weight_zero_point=zero_point,
        bias=None if bias is None else bias.to(linear.weight.dtype),
        input_scale=None if input_scale is None else input_scale.float(),
        input_zero_point=_input_zero_point(scheme.activation, tensors.get("input_zero_point")),
    )


def _check_order(scheme: Scheme, tensors: Mapping[str, Tensor], k: int) -> None:
    order = tensors.get("weight_g_idx")
    # -1 is "never set", in checkpoints that reserve room for an order they do not have.
    if order is None or bool((order == -1).all()):
        return
    size = scheme.weight.group or k
    must(
        order.tolist() == [j // size for j in range(k)],
        "weight_g_idx must be in order (column // group_size), got activation ordering by group, which permutes k; "
        "quantize the model again with actorder 'weight' or none",
    )


def _weight_codes(spec: OperandSpec, weight: Tensor, n: int, k: int) -> Tensor:
    """Codes as a ``QuantizedLinear`` holds them, ``[n, k]``, or ``[n, k / 2]`` for 4 bits."""
    int4 = spec.packed
    must(not int4 or k % 2 == 0, f"a 4-bit weight must have an even k, got {k}; leave this layer in float (ignore)")
    if weight.dtype is torch.int32:
        words = -(-k * (4 if int4 else 8) // 32)
        must(
            list(weight.shape) == [n, words] and not spec.dtype.is_floating_point,
            f"weight_packed of a {[n, k]} linear of {dtype_name(spec.dtype)} must be {[n, words]}, got "
            f"{list(weight.shape)}; build the model from the checkpoint's config.json",
        )
        # Little-endian words hold codes + 8 or + 128 from the lowest bits up: for 4 bits, the layout of pack_int4.
        data = weight.contiguous().view(torch.uint8)
        return data[:, : k // 2].contiguous() if int4 else (data[:, :k] ^ 0x80).view(torch.int8)
    must(
        list(weight.shape) == [n, k],
        f"weight must be [n, k] = {[n, k]} as in the model, got {list(weight.shape)}; build the model from the "
        "checkpoint's config.json",
    )
    must(
        not int4 or weight.dtype is torch.int8,
        f"4-bit codes that are not packed must be int8, got {dtype_name(weight.dtype)}; save the model compressed",
    )
    # -8..7 to 0..15 either way: uint4 is int4 with another zero point.
    return pack_int4(weight) if int4 else weight


def _zero_point(spec: OperandSpec, stored: Tensor | None, n: int) -> Tensor | None:
    """Zero points in the range of the codes, int32; None for a symmetric weight."""
    must(spec.symmetric or stored is not None, "its weight_zero_point is missing, but its group says symmetric=false")
    if stored is None:
        return None
    signed = _unpack_rows(spec, stored, n) if stored.dtype is torch.int32 else _integers(stored, "weight_zero_point")
    if spec.symmetric:
        must(
            not bool(signed.any()),
            "weight_zero_point must be 0 for a symmetric weight; say symmetric=false in the config",
        )
        return None
    return signed + 8 if spec.packed else signed


def _unpack_rows(spec: OperandSpec, packed: Tensor, n: int) -> Tensor:
    """Signed ``[n, groups]`` from int32 words that hold neighbours along n, ``[ceil(n * bits / 32), groups]``."""
    bits = 4 if spec.packed else 8
    must(
        packed.dim() == 2 and packed.shape[0] == -(-n * bits // 32),
        f"weight_zero_point packed in int32 must be [{-(-n * bits // 32)}, groups], got {list(packed.shape)}",
    )
    data = packed.t().contiguous().view(torch.uint8)
    if bits == 4:
        data = unpack_nibbles(data)
    return data[:, :n].t().int() - (1 << (bits - 1))


def _input_zero_point(spec: OperandSpec, stored: Tensor | None) -> Tensor | None:
    if stored is None or not spec.symmetric:
        return None if stored is None else _integers(stored, "input_zero_point")
    must(
        not bool(_integers(stored, "input_zero_point").any()),
        "input_zero_point must be 0 for symmetric activations; say symmetric=false in the config",
    )
    return None


def _integers(stored: Tensor, what: str) -> Tensor:
    """``stored``, of any dtype, as int32, which must hold its values exactly."""
    values = stored.double() if not stored.is_complex() else stored.real.double() * torch.nan
    wrong = ~((values == values.trunc()) & (values.abs() <= 2**31 - 1))
    must(
        not bool(wrong.any()),
        f"{what} must be whole numbers that int32 holds, got {values[wrong][:1].tolist()}; quantize the model again",
    )
    return values.int()
