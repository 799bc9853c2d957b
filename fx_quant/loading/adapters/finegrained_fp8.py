"""transformers' ``FP8Linear``: float8 codes with a scale for each block, as DeepSeek and Qwen publish their models.

Its matmul is a Triton kernel of the Hugging Face hub, which runs on GPUs only and which a compiler can only call.

Source: https://github.com/huggingface/transformers (5.23), ``integrations/finegrained_fp8.py``
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_quant.loading.adapters.base import Adapter, Conversion, float_codes, is_of, must, register_adapter
from fx_quant.loading.checkpoint_linear import decode_linear
from fx_quant.loading.module_names import tensors_of
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme

_HOME = "transformers.integrations.finegrained_fp8"
_FLOAT8 = torch.float8_e4m3fn
_NOTE = (
    "activations are quantized by a kernel of the Hugging Face hub, whose formula fx_quant does not know; "
    "DeepSeek's is taken"
)


def _recognizes(module: nn.Module) -> bool:
    # One that was decoded as it was loaded is a linear of floats.
    return (
        is_of(module, _HOME)
        and not isinstance(module, nn.Embedding)
        and any(value.dim() > 1 and value.itemsize == 1 for _, value in tensors_of(module))
    )


def _describe(module: Any) -> str:
    try:
        return str(_scheme(module))
    except (AttributeError, ValueError):
        return "float8"


def _scheme(module: Any) -> Scheme:
    static = module.activation_scale is not None
    if module.block_size is None:
        tokens = Granularity.PER_TENSOR if static else Granularity.PER_TOKEN
        return Scheme(OperandSpec(_FLOAT8, tokens, dynamic=not static), OperandSpec(_FLOAT8, Granularity.PER_TENSOR))
    must(
        not static,
        "a weight in blocks must have activations that are quantized in each call, got activation_scheme='static'; "
        "quantize the model with 'dynamic'",
    )
    blocks = Granularity.per_block(*module.block_size)
    activation = OperandSpec(_FLOAT8, Granularity.per_group(blocks.columns), dynamic=True)
    return Scheme(activation, OperandSpec(_FLOAT8, blocks))


def _check(module: Any) -> None:
    kind = type(module).__name__
    must(kind == "FP8Linear", f"it must be an FP8Linear, got {kind}; only linears have quantized kernels")
    must("forward" not in vars(module), "its forward must be its class's, got another; remove what replaced it")
    dtype = module.weight.dtype
    must(
        dtype is _FLOAT8,
        f"its weight must be float8_e4m3fn codes, got {dtype}, which may be two 4-bit codes a byte; load the model "
        "with dequantize=True, and quantize that",
    )
    must(module.weight.device.type != "meta", "its weight must be loaded, got one on the meta device; load it first")
    _scheme(module)


@torch.no_grad()
def _convert(module: Any) -> Conversion:
    scheme = _scheme(module)
    names = {"weight": "weight", "weight_scale": "weight_scale_inv", "bias": "bias", "input_scale": "activation_scale"}
    held = {what: getattr(module, name) for what, name in names.items()}
    tensors = {what: x.detach() for what, x in held.items() if x is not None}
    # Codes have no dtype to compute in; these models are published in bfloat16.
    dtype = module.bias.dtype if module.bias is not None else torch.bfloat16
    like = nn.Linear(module.in_features, module.out_features, device="meta", dtype=dtype)
    linear = decode_linear(like, scheme, tensors)
    linear.quantizer = partial(quantize_activation, spec=scheme.activation)
    return Conversion(linear, _decoded(module).to(dtype), Numerics.APPROXIMATE, _NOTE)


def quantize_activation(
    x: Tensor, input_scale: Tensor | None, input_zero_point: None, *, spec: OperandSpec
) -> tuple[Tensor, Tensor, None]:
    """``(codes, scale, None)`` of ``x [..., k]`` by DeepSeek's formula, in float32.

    ``codes = cast(clamp(x / scale, -448, 448))`` and ``scale = amax / 448`` of a group of k, or of a row per_token; 1
    where that is 0. A given scale is taken as it is.

    Source: ``act_quant_kernel`` in DeepSeek-V3's ``inference/kernel.py``
    """
    if input_scale is not None:
        return float_codes(x.float(), input_scale, _FLOAT8), input_scale, None
    k = x.shape[-1]
    size = spec.group or k
    groups = -(-k // size) if k else 1
    rows = F.pad(x.float(), (0, groups * size - k)).unflatten(-1, (groups, size))
    scale = rows.abs().amax(-1, keepdim=True) / rows.new_full((), 448.0)  # CUDA multiplies by a number's reciprocal
    scale = scale.masked_fill(scale == 0, 1)
    return float_codes(rows, scale, _FLOAT8).flatten(-2)[..., :k], scale.squeeze(-1), None


def _decoded(module: Any) -> Tensor:
    weight, scale = module.weight.float(), module.weight_scale_inv.float()
    if module.block_size is not None:
        for dim, size in enumerate(module.block_size):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight * scale


register_adapter(
    Adapter(
        library="transformers",
        effect="multiply in a kernel of the Hugging Face hub",
        recognizes=_recognizes,
        describe=_describe,
        check=_check,
        convert=_convert,
    )
)
