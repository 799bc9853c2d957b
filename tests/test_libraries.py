"""Models that other libraries' real packages quantized: their matmuls are rewritten, or left with the reason.

``make libraries`` installs the packages and fails where a test does not run; elsewhere those are skipped.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_quant
from fx_quant.loading.library_notes import library_notes
from fx_quant.scheme import Numerics
from tests.tolerances import assert_within

K, N = 128, 96  # ATen's int8 matmul, which quanto calls eagerly, reads beyond sizes of k that are no multiples of 32
BF16, F32 = torch.bfloat16, torch.float32


class Net(nn.Module):
    """Two linears, one with a bias; the name of each is an attribute."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def inputs(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 5, K, dtype=dtype)


def library(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{package} is not installed: {error}")


def quanto(dtype: torch.dtype, weights: str) -> nn.Module:
    oq, model = library("optimum.quanto", "optimum-quanto"), Net(dtype)
    oq.quantize(model, weights=getattr(oq, weights))
    oq.freeze(model)
    return model


def bitsandbytes(dtype: torch.dtype, threshold: float) -> nn.Module:
    bnb, model = library("bitsandbytes", "bitsandbytes"), Net(dtype)
    for name, linear in list(model.named_children()):
        sizes = (linear.in_features, linear.out_features)
        quantized = bnb.nn.Linear8bitLt(
            *sizes, bias=linear.bias is not None, has_fp16_weights=False, threshold=threshold
        )
        quantized.load_state_dict(linear.state_dict())
        setattr(model, name, quantized)
    return model.to("cpu").eval()


def nncf(dtype: torch.dtype, mode: str) -> nn.Module:
    library_, model = library("nncf", "nncf"), Net(dtype)
    dataset = library_.Dataset([inputs(dtype)])
    return library_.compress_weights(model, mode=getattr(library_.CompressWeightsMode, mode), dataset=dataset)


def modelopt(dtype: torch.dtype, config: str) -> nn.Module:
    mtq, model = library("modelopt.torch.quantization", "nvidia-modelopt"), Net(dtype)
    model = mtq.quantize(model, getattr(mtq, config), lambda each: each(inputs(dtype)))
    mtq.compress(model)
    return model


REWRITTEN = [
    (quanto, "qint8", BF16, "bfloat16 x int8 per_channel"),
    (quanto, "qint8", F32, "float32 x int8 per_channel"),
    (quanto, "qfloat8", BF16, "bfloat16 x float8_e4m3fn per_channel"),
    (bitsandbytes, 0.0, F32, "int8 per_token (dynamic) x int8 per_channel"),
    (bitsandbytes, 0.0, BF16, "int8 per_token (dynamic) x int8 per_channel"),
    (nncf, "INT8_SYM", BF16, "bfloat16 x int8 per_channel"),
    (nncf, "INT8_ASYM", BF16, "bfloat16 x uint8 per_channel asymmetric"),
    (modelopt, "INT8_WEIGHT_ONLY_CFG", BF16, "bfloat16 x int8 per_channel"),
]


@pytest.mark.parametrize(("build", "how", "dtype", "scheme"), REWRITTEN)
def test_every_linear_is_rewritten_with_no_call_of_prepare(build, how, dtype, scheme):
    with torch.no_grad():
        model, x = build(dtype, how), inputs(dtype)
        model(x)  # some libraries arrange their weights in the first call
        report = fx_quant.explain(model, x)
    assert [site.scheme for site in report.sites] == [scheme] * 2, str(report)
    assert not report.misses and not report.unseen and not report.graph_breaks, str(report)


@pytest.mark.parametrize(
    ("build", "how", "dtype"), [(quanto, "qint8", F32), (bitsandbytes, 0.0, F32), (nncf, "INT8_SYM", BF16)]
)
def test_a_compiled_model_computes_what_the_library_does(build, how, dtype):
    with torch.no_grad():
        model, x = build(dtype, how), inputs(dtype)
        model.down = nn.Identity()  # whose codes would jump with a rounding of the first
        before = model(x)
        assert_within(torch.compile(model, backend="fx_quant")(x), before, Numerics.REASSOCIATED)


def test_bitsandbytes_with_a_threshold_is_left_and_the_note_says_what_to_load():
    model = bitsandbytes(BF16, 6.0)
    (note,) = library_notes(model)
    assert note.startswith("2 modules of bitsandbytes int8 with a threshold multiply some columns")
    assert "llm_int8_threshold=0.0" in note and library_notes(bitsandbytes(BF16, 0.0)) == []
    with torch.no_grad():
        report = fx_quant.explain(model, inputs(BF16))
    assert not report.sites and len(report.unseen) == 2


def test_float32_weights_that_nncf_decodes_in_float16_are_missed_as_approximate():
    with torch.no_grad():
        report = fx_quant.explain(nncf(F32, "INT8_SYM"), inputs(F32))
    assert [miss.reason for miss in report.misses] == [
        "the rewrite is of class approximate, and numerics=reassociated does not allow that"
    ] * 2
