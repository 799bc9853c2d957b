"""NNCF: weight compression and post-training quantization through torch-function hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.variants import Activation, Variant
from tests.dialects.weights import K, N

NEEDS = ("nncf",)


class Net(nn.Module):
    """A float linear, always the same. Not a Sequential, which would call the hooks that NNCF adds as a child."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(K, N, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]``."""
        return self.linear(x)


def net(dtype: torch.dtype, bias: bool) -> nn.Module:
    """``Net`` in eval mode, without gradients."""
    return Net(bias).to(dtype).eval().requires_grad_(False)


def example(dtype: torch.dtype, bias: bool) -> Tensor:
    """An activation ``[4, 8, k]`` to trace and calibrate with."""
    ((x,), _) = Activation()(Variant(dtype, 3, dynamic=False, bias=bias))
    return x


@flow("nncf_w_int8_sym", needs=NEEDS, expected="recognised", why=NOT_FASTER)
def compressed(dtype: torch.dtype, bias: bool) -> nn.Module:
    """nncf.compress_weights, INT8_SYM"""
    import nncf

    return nncf.compress_weights(
        net(dtype, bias), mode=nncf.CompressWeightsMode.INT8_SYM, dataset=nncf.Dataset([example(dtype, bias)])
    )


@flow(
    "nncf_quantize_int8",
    needs=NEEDS,
    expected="unsupported",
    why="fake quantization inside torch-function hooks, which torch.compile does not trace",
)
def quantized(dtype: torch.dtype, bias: bool) -> nn.Module:
    """nncf.quantize, post-training int8"""
    import nncf

    dataset = nncf.Dataset([example(dtype, bias)])
    return nncf.quantize(net(dtype, bias), dataset, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
