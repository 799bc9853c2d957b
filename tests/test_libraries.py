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


def hqq(dtype: torch.dtype, axis: int, bits: int = 4) -> nn.Module:
    quantize, model = library("hqq.core.quantize", "hqq"), Net(dtype)
    for name, linear in list(model.named_children()):
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
        setattr(model, name, quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu"))
    return model


def auto_round(dtype: torch.dtype, bits: int) -> nn.Module:
    kernels, model = library("auto_round_extension.torch.qlinear_torch", "auto-round"), Net(dtype)
    for name, linear in list(model.named_children()):
        groups = linear.weight.float().unflatten(1, (-1, 32))
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / (2**bits - 1)
        quantized = kernels.QuantLinear(bits, 32, linear.in_features, linear.out_features, linear.bias is not None)
        quantized.device = "cpu"
        quantized.pack(linear, scale, (-low / scale).round(), device="cpu")
        setattr(model, name, quantized)
    return model


def blocks_of(linear: nn.Linear, kind: str) -> tuple[Tensor, object]:
    """The weight in GGUF's records of bytes, and the number of their kind."""
    gguf = library("gguf", "gguf")
    number = getattr(gguf.GGMLQuantizationType, kind)
    return torch.from_numpy(gguf.quants.quantize(linear.weight.float().numpy(), number)), number


def gguf_of_diffusers(dtype: torch.dtype, kind: str) -> nn.Module:
    loaded, model = library("diffusers.quantizers.gguf.utils", "diffusers"), Net(dtype)
    for name, linear in list(model.named_children()):
        blocks, number = blocks_of(linear, kind)
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        quantized = loaded.GGUFLinear(*sizes, compute_dtype=dtype)
        quantized.weight, quantized.bias = loaded.GGUFParameter(blocks, quant_type=number), linear.bias
        setattr(model, name, quantized)
    return model.requires_grad_(False)


def gguf_of_transformers(dtype: torch.dtype, kind: str) -> nn.Module:
    """More than 8 rows, which it decodes by torch; fewer go to a kernel of the Hugging Face hub."""
    loaded, model = library("transformers.integrations.gguf.utils", "transformers"), Net(dtype)
    library("transformers.integrations.gguf.kernels", "transformers")._gguf_kernel = False  # there is no network
    for name, linear in list(model.named_children()):
        blocks, number = blocks_of(linear, kind)
        quantized = loaded.GgufLinear(linear.in_features, linear.out_features, int(number), linear.bias is not None)
        quantized.weight.data, quantized.bias = blocks, linear.bias
        setattr(model, name, quantized)
    return model


def modelopt_simulating(dtype: torch.dtype, config: str) -> nn.Module:
    mtq, model = library("modelopt.torch.quantization", "nvidia-modelopt"), Net(dtype)
    return mtq.quantize(model, getattr(mtq, config), lambda each: each(inputs(dtype)))


class Brevitas(nn.Module):
    """As ``Net``, by the library's own layers."""

    def __init__(self, dtype: torch.dtype, activation: bool) -> None:
        super().__init__()
        layers, quant = library("brevitas.nn", "brevitas"), library("brevitas.quant", "brevitas")
        how = {"weight_bit_width": 8, "input_quant": quant.Int8ActPerTensorFloat if activation else None}
        torch.manual_seed(0)
        self.up, self.down = layers.QuantLinear(K, N, True, **how), layers.QuantLinear(N, K, False, **how)
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def neural_compressor(dtype: torch.dtype, bits: int, symmetric: bool = False) -> nn.Module:
    inc = library("neural_compressor.torch.quantization", "neural-compressor")
    return inc.convert(inc.prepare(Net(dtype), inc.RTNConfig(bits=bits, group_size=32, use_sym=symmetric)))


REWRITTEN = [
    (quanto, "qint8", BF16, "bfloat16 x int8 per_channel"),
    (quanto, "qint8", F32, "float32 x int8 per_channel"),
    (quanto, "qfloat8", BF16, "bfloat16 x float8_e4m3fn per_channel"),
    (bitsandbytes, 0.0, F32, "int8 per_token (dynamic) x int8 per_channel"),
    (bitsandbytes, 0.0, BF16, "int8 per_token (dynamic) x int8 per_channel"),
    (nncf, "INT8_SYM", BF16, "bfloat16 x int8 per_channel"),
    (nncf, "INT8_ASYM", BF16, "bfloat16 x uint8 per_channel asymmetric"),
    (modelopt, "INT8_WEIGHT_ONLY_CFG", BF16, "bfloat16 x int8 per_channel"),
    (hqq, 1, BF16, "bfloat16 x int4 per_group(32) with offset"),
    (auto_round, 4, BF16, "bfloat16 x int4 per_group(32) asymmetric"),
    (auto_round, 2, BF16, "bfloat16 x int4 per_group(32) asymmetric"),
    (gguf_of_diffusers, "Q8_0", BF16, "bfloat16 x int8 per_group(32)"),
    (gguf_of_diffusers, "Q4_0", BF16, "bfloat16 x int4 per_group(32)"),
    (gguf_of_transformers, "Q8_0", BF16, "bfloat16 x int8 per_group(32)"),
    (gguf_of_transformers, "Q4_1", F32, "float32 x int4 per_group(32) with offset"),
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
    ("build", "how", "dtype"),
    [
        (quanto, "qint8", F32),
        (bitsandbytes, 0.0, F32),
        (nncf, "INT8_SYM", BF16),
        (hqq, 1, F32),
        (auto_round, 4, BF16),
        (gguf_of_diffusers, "Q8_0", BF16),
        (gguf_of_transformers, "Q4_0", F32),
    ],
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


@pytest.mark.parametrize(("build", "how"), [(modelopt_simulating, "INT8_DEFAULT_CFG"), (Brevitas, True)])
def test_every_linear_that_a_library_simulates_has_a_row_with_the_reason(build, how):
    with torch.no_grad():
        model, x = build(F32, how), inputs(F32)
        model(x)
        report = fx_quant.explain(model, x)
    assert {row.module for row in (*report.misses, *report.unseen)} == {"up", "down"}, str(report)
    assert not report.floats and not report.sites
    for row in report.unseen:
        assert row.reason.startswith("the graph breaks at "), row.reason
        assert "round in float and multiply in float" in row.reason and "fx_quant.quantize_" in row.reason
    for miss in report.misses:
        assert "rounded in floating point" in miss.reason


def test_linears_that_modelopt_leaves_in_float_are_no_quantized_modules():
    with torch.no_grad():
        model = modelopt_simulating(F32, "INT8_DEFAULT_CFG")
        for quantizer in (model.down.weight_quantizer, model.down.input_quantizer):
            quantizer.disable()
        assert [row.module for row in fx_quant.explain(model, inputs(F32)).unseen] == ["up"]


def test_groups_of_hqq_across_rows_are_missed_with_the_axis():
    with torch.no_grad():
        report = fx_quant.explain(hqq(F32, 0), inputs(F32))
    assert [miss.reason for miss in report.misses] == ["the scale of b varies along k, so it cannot leave the sum"] * 2


@pytest.mark.parametrize(("build", "how"), [(auto_round, 8), (gguf_of_diffusers, "Q8_0")])
def test_float32_weights_that_a_library_decodes_in_float16_are_missed_as_approximate(build, how):
    with torch.no_grad():
        report = fx_quant.explain(build(F32, how), inputs(F32))
    assert len(report.misses) == 2 and all("of class approximate" in miss.reason for miss in report.misses)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_neural_compressor_is_prepared_before_its_first_call_and_after(bits, symmetric):
    with torch.no_grad():
        model, x = neural_compressor(F32, bits, symmetric), inputs(F32)
        before = model(x)  # from here on the module holds the decoded weight
        fresh = neural_compressor(F32, bits, symmetric)
        assert {row.module for row in fx_quant.explain(fresh, x).unseen} == {"up", "down"}
        for each in (model, fresh):
            report = fx_quant.prepare_(each)
            assert len(report.swapped) == 2 and {row.numerics for row in report.swapped} == {"approximate"}
            assert "float16" in report.swapped[0].note
            assert (each(x) - before).abs().max() <= 2**-10 * before.abs().max()
        assert len(fx_quant.explain(model, x).sites) == 2


def test_what_neural_compressor_holds_that_its_codes_do_not_give_is_left():
    with torch.no_grad():
        model = neural_compressor(F32, 4)
        model(inputs(F32))
        model.up.weight[0, 0] += 1
        model.down.g_idx = model.down.g_idx.flip(0)
        reasons = [row.reason for row in fx_quant.prepare_(model).left]
    assert reasons[0].startswith("its weight must be its codes times their scale, but 1 of")
    assert reasons[1].startswith("its g_idx must be in order")
