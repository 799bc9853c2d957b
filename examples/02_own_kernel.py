"""A linear kernel of one's own: configuration, parameters and kernel, chosen before ours where it can run.

``python examples/02_own_kernel.py``. The kernel takes float8 weights with an extra scale that its layer brings along.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.linear_kernels import (
    FP8Params,
    MMLinearKernel,
    MMLinearLayerConfig,
    choose_scaled_mm_linear_kernel,
    replace_parameter,
)
from fx_quant.scheme import Granularity, OperandSpec


@dataclass(frozen=True)
class MyKernelConfig(MMLinearLayerConfig):
    """What the kernel must do."""

    static: bool
    output_dtype: torch.dtype


@dataclass
class MyKernelParams(FP8Params):
    """The tensors of a float8 layer, and one more: ``from_layer`` reads it from the attribute of that name."""

    custom_scale: Tensor

    CUSTOM_SCALE: ClassVar[str] = "custom_scale"


class MyKernel(MMLinearKernel[MyKernelConfig, MyKernelParams]):
    """``x @ (weight * weight_scale * custom_scale).T + bias`` in float32."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On every CPU, and on GPUs from sm90 on."""
        if compute_capability is not None and compute_capability < 90:
            return False, f"needs compute capability >= 90, got {compute_capability}"
        return True, None

    @classmethod
    def can_implement(cls, config: MyKernelConfig) -> tuple[bool, str | None]:
        """Static schemes."""
        return (True, None) if config.static else (False, "needs a static scheme")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Decode the weight once, to ``[k, n]``."""
        params = self._get_layer_params(layer)
        decoded = params.weight.float() * params.weight_scale * params.custom_scale
        replace_parameter(layer, params.WEIGHT, decoded.t().contiguous())

    def _get_layer_params(self, layer: nn.Module, **kwargs: object) -> MyKernelParams:
        return MyKernelParams.from_layer(layer)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: object) -> Tensor:
        """``[..., k] -> [..., n]``."""
        out = x.float() @ self._get_layer_params(layer).weight
        return (out if bias is None else out + bias).to(self.config.output_dtype)


def my_layer(linear: nn.Linear) -> nn.Module:
    """A module with ``linear``'s weight in float8 and half of its scale in ``custom_scale``."""
    found = quantize_weight(linear.weight, OperandSpec(torch.float8_e4m3fn, Granularity.PER_CHANNEL))
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(found.codes, requires_grad=False))
    layer.register_buffer("weight_scale", found.scale / 2)
    layer.register_buffer("custom_scale", torch.tensor(2.0))
    return layer


@torch.no_grad()
def main() -> int:
    """Run the whole lifecycle; returns the exit status."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(2, 5, 64)
    config = MyKernelConfig(static=True, output_dtype=torch.float32)
    # 1. Selection. Classes by platform, best first; the error holds every reason when none can run.
    platforms = {"cpu": [MyKernel], "cuda": [MyKernel]}
    chosen = choose_scaled_mm_linear_kernel(config, platforms)
    # 2. Initialization.  3. Weights.  4. Inference.
    kernel, layer = chosen(config), my_layer(linear)
    kernel.process_weights_after_loading(layer)
    out = kernel.apply_weights(layer, x, linear.bias)
    error = ((out - linear(x)).norm() / linear(x).norm()).item()
    print(f"{chosen.__name__}: {list(x.shape)} -> {list(out.shape)}, {100 * error:.1f} % from the float linear")
    try:
        choose_scaled_mm_linear_kernel(config, platforms, compute_capability=80)
    except ValueError as refused:
        print(f"on an A100: {refused}")
    return int(not error < 0.05)


if __name__ == "__main__":
    sys.exit(main())
