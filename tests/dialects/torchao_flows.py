"""torchao: ``quantize_`` on a linear, one flow for each configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.dialects.capture import inductor_config_restored
from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.weights import K, N, SameInput

NEEDS = ("torchao",)
_BF16_ONLY = (torch.bfloat16,)


@contextlib.contextmanager
def any_hardware() -> Iterator[None]:
    """torchao asks for a GPU when it makes float8 and fp4 weights; the arithmetic of most runs on a CPU too."""
    import torchao.float8.inference
    import torchao.prototype.mx_formats.inference_workflow as mx
    import torchao.prototype.quantization.quant_api as prototype
    from torchao.quantization import quant_api

    with contextlib.ExitStack() as stack:
        for module in (torchao.float8.inference, quant_api, prototype):
            if hasattr(module, "_check_hardware_support"):
                stack.enter_context(mock.patch.object(module, "_check_hardware_support", return_value=None))
        if hasattr(mx, "is_sm_at_least_100"):
            stack.enter_context(mock.patch.object(mx, "is_sm_at_least_100", return_value=True))
        yield


def quantized(model: nn.Module, config: Any, filter_fn: Callable[..., bool] | None = None) -> nn.Module:
    """``model`` quantized in place, with Inductor's options left as they were."""
    from torchao.quantization import quantize_

    with inductor_config_restored(), any_hardware():
        quantize_(model, config, filter_fn)
    return model


def linear(dtype: torch.dtype, bias: bool) -> nn.Linear:
    """A float linear ``[256 -> 384]``, always the same."""
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias).to(dtype)


def torchao_flow(name: str, **fields: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a linear quantized with the configuration that the decorated function makes."""

    def register(config: Callable[[], Any]) -> Callable[[], Any]:
        def build(dtype: torch.dtype, bias: bool) -> nn.Module:
            return quantized(nn.Sequential(linear(dtype, bias)).eval(), config())

        flow(f"torchao_{name}", **{"needs": NEEDS, "what": config.__doc__, **fields})(build)
        return config

    return register


@torchao_flow("i8da_i8w", group="developers")
def int8_dynamic():
    """Int8DynamicActivationInt8WeightConfig(), per-token x per-channel"""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


@torchao_flow("i8da_i8w_pt")
def int8_dynamic_per_tensor():
    """Int8DynamicActivationInt8WeightConfig(PerTensor)"""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerTensor

    return Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())


@torchao_flow("i8sa_i8w", only=lambda variant: variant.ndim == 3)
def int8_static():
    """Int8StaticActivationInt8WeightConfig, per-tensor x per-channel"""
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor

    return Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.full((1, 1, 1), 0.03), granularity=[PerTensor(), PerRow()]
    )


@torchao_flow("i8wo", group="developers", expected="recognised", why=NOT_FASTER)
def int8_weight_only():
    """Int8WeightOnlyConfig(), per-channel"""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


@torchao_flow("i8wo_pt", expected="recognised", why=NOT_FASTER)
def int8_weight_only_per_tensor():
    """Int8WeightOnlyConfig(PerTensor)"""
    from torchao.quantization import Int8WeightOnlyConfig, PerTensor

    return Int8WeightOnlyConfig(granularity=PerTensor())


@torchao_flow("f8wo", group="developers", expected="recognised", why=NOT_FASTER)
def float8_weight_only():
    """Float8WeightOnlyConfig(), per-channel"""
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


@torchao_flow("f8wo_pt", expected="recognised", why=NOT_FASTER)
def float8_weight_only_per_tensor():
    """Float8WeightOnlyConfig(PerTensor)"""
    from torchao.quantization import Float8WeightOnlyConfig, PerTensor

    return Float8WeightOnlyConfig(granularity=PerTensor())


@torchao_flow("f8da_f8w_pt")
def float8_dynamic_per_tensor():
    """Float8DynamicActivationFloat8WeightConfig(PerTensor)"""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())


@torchao_flow("f8da_row", group="developers", dtypes=_BF16_ONLY)
def float8_dynamic_per_row():
    """Float8DynamicActivationFloat8WeightConfig(PerRow), bfloat16 only"""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


@torchao_flow(
    "f8da_f8w_blk",
    gpu_only=True,
    expected="unsupported",
    why="ao::blockwise_fp8_gemm is a Triton kernel behind an op, which fx_quant cannot see through",
)
def float8_dynamic_per_block():
    """Float8DynamicActivationFloat8WeightConfig(1x128, 128x128)"""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig
    from torchao.quantization.granularity import PerBlock

    blocks = (PerBlock([1, 128]), PerBlock([128, 128]))
    return Float8DynamicActivationFloat8WeightConfig(granularity=blocks)


@torchao_flow("f8sa_f8w", only=lambda variant: variant.ndim == 3)
def float8_static():
    """prototype Float8StaticActivationFloat8WeightConfig, per-tensor"""
    from torchao.prototype.quantization.quant_api import Float8StaticActivationFloat8WeightConfig
    from torchao.quantization import PerTensor

    return Float8StaticActivationFloat8WeightConfig(
        act_quant_scale=torch.full((1, 1, 1), 0.01), granularity=PerTensor()
    )


@torchao_flow("i8da_intx4", group="developers")
def int8_dynamic_int4_groups():
    """Int8DynamicActivationIntxWeightConfig, int4 groups of 32 held as int8"""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))


@torchao_flow("intxwo4", group="developers", expected="recognised", why=NOT_FASTER)
def int4_weight_only():
    """IntxWeightOnlyConfig, int4 groups of 32 held as int8"""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


@torchao_flow(
    "i4wo",
    needs=("torchao", "mslk"),
    gpu_only=True,
    expected="unsupported",
    why="the weight is packed by a CUDA kernel",
)
def int4_plain():
    """Int4WeightOnlyConfig, groups of 128, plain packing (an op of mslk or fbgemm)"""
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=128)


@torchao_flow("i4wo_tile", gpu_only=True, expected="unsupported", why="the weight is packed by a CUDA kernel")
def int4_tiles():
    """Int4WeightOnlyConfig, tile-packed for tinygemm"""
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    return Int4WeightOnlyConfig(group_size=128, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)


@torchao_flow("i4wo_cpu", expected="recognised", why=NOT_FASTER)
def int4_opaque_cpu():
    """PrototypeInt4WeightOnlyConfig, groups of 32: _weight_int4pack_mm_for_cpu"""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32)


@torchao_flow(
    "i8da_i4w_cpu",
    expected="unsupported",
    why="da8w4_linear_cpu is an op of torchao's C++ extension, which its wheels do not have",
)
def int8_dynamic_int4_cpu():
    """prototype Int8DynamicActivationInt4WeightConfig: da8w4_linear_cpu"""
    from torchao.prototype.quantization.int4.inference_workflow import Int8DynamicActivationInt4WeightConfig

    return Int8DynamicActivationInt4WeightConfig(group_size=32)


def _mx(dtype: torch.dtype) -> Any:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization.quantize_.common import KernelPreference

    return MXDynamicActivationMXWeightConfig(
        activation_dtype=dtype, weight_dtype=dtype, kernel_preference=KernelPreference.EMULATED
    )


_EMULATED = "blocks of 32 or 16 with their own scales are decoded and multiplied in floating point"


@torchao_flow("mxfp8_emul", dtypes=_BF16_ONLY, expected="unsupported", why=_EMULATED)
def mxfp8_emulated():
    """MXDynamicActivationMXWeightConfig, mxfp8, emulated"""
    return _mx(torch.float8_e4m3fn)


@torchao_flow("mxfp4_emul", dtypes=_BF16_ONLY, expected="unsupported", why=_EMULATED)
def mxfp4_emulated():
    """MXDynamicActivationMXWeightConfig, mxfp4, emulated"""
    return _mx(torch.float4_e2m1fn_x2)


@torchao_flow("nvfp4_wo", expected="unsupported", why=_EMULATED)
def nvfp4_weight_only():
    """NVFP4WeightOnlyConfig"""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


@torchao_flow("nvfp4_da", gpu_only=True, expected="unsupported", why="fp4 codes multiply on sm100 only")
def nvfp4_dynamic():
    """NVFP4DynamicActivationNVFP4WeightConfig: _scaled_mm on float4 codes"""
    from torchao.prototype.mx_formats.inference_workflow import NVFP4DynamicActivationNVFP4WeightConfig

    return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)


@flow("torchao_nf4", needs=NEEDS, expected="unsupported", why="codes index a table of sixteen values")
def nf4(dtype: torch.dtype, bias: bool) -> nn.Module:
    """NF4Tensor of QLoRA"""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    layer = linear(dtype, bias)
    layer.weight = nn.Parameter(to_nf4(layer.weight.data, 64, 2), requires_grad=False)
    return nn.Sequential(layer).eval()


@flow("torchao_i8da_i8w_recommended_cfg", needs=NEEDS)
def with_recommended_config(dtype: torch.dtype, bias: bool) -> nn.Module:
    """torchao_i8da_i8w compiled with the Inductor options that torchao sets for the whole process"""
    from torchao.quantization.utils import recommended_inductor_config_setter

    model = quantized(nn.Sequential(linear(dtype, bias)).eval(), int8_dynamic())
    recommended_inductor_config_setter()
    return model


def qkv(config: Callable[[], Any], dtype: torch.dtype, bias: bool) -> nn.Module:
    """Three linears on one input, quantized with ``config``."""
    torch.manual_seed(0)
    layers = [nn.Linear(K, N, bias=bias).to(dtype) for _ in range(3)]
    return quantized(SameInput(*layers).eval(), config())


flow("qkv3_torchao_i8da_i8w", needs=NEEDS, matmuls=3, what="three torchao_i8da_i8w on one input")(
    partial(qkv, int8_dynamic)
)
flow("qkv3_torchao_f8da_row", needs=NEEDS, matmuls=3, dtypes=_BF16_ONLY, what="three torchao_f8da_row on one input")(
    partial(qkv, float8_dynamic_per_row)
)
