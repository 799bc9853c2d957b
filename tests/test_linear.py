"""``QuantizedLinear`` against float64 arithmetic on its codes, and as the module that it must be."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fx_quant
from fx_quant.errors import FxQuantError, NoKernelError, UnknownNameError
from fx_quant.layers.activation import quantize_activation
from fx_quant.layers.linear import QuantizedLinear, apply_linear
from fx_quant.layers.quantize_model import LeftWeight, quantize_
from fx_quant.scheme import (
    CODE_DTYPES,
    FLOAT_DTYPES,
    INT4_DTYPES,
    Granularity,
    Numerics,
    OperandSpec,
    Scheme,
)
from fx_quant.weights import INT4, unpack_int4
from tests.tolerances import TOLERANCES, assert_within

N, K = 40, 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn

INT8 = [
    f"int8 {a} (dynamic) x int8 {w}"
    for a in ("per_token", "per_tensor", "per_token asymmetric", "per_tensor asymmetric")
    for w in ("per_channel", "per_tensor")
] + ["int8 per_tensor (static) x int8 per_channel", "int8 per_tensor asymmetric (static) x int8 per_channel"]
FLOAT8 = [
    f"{dtype} {a} x {dtype} {w}"
    for dtype in ("float8_e4m3fn", "float8_e5m2")
    for a in ("per_token (dynamic)", "per_tensor (dynamic)", "per_tensor (static)")
    for w in ("per_channel", "per_tensor")
]
BLOCK = ["float8_e4m3fn per_group(16) (dynamic) x float8_e4m3fn per_block(32, 16)"]
WEIGHT_ONLY = [
    f"bfloat16 x {weight}"
    for weight in (
        "int8 per_channel",
        "int8 per_tensor",
        "int8 per_group(16)",
        "uint8 per_channel asymmetric",
        "int8 per_group(32) asymmetric",
        "float8_e4m3fn per_channel",
        "float8_e5m2 per_tensor",
        "float8_e4m3fn per_block(32, 16)",
        "int4 per_channel",
        "int4 per_group(16)",
        "int4 per_group(16) asymmetric",
        "uint4 per_group(32) asymmetric",
        "uint4 per_channel asymmetric",
    )
]
SCHEMES = INT8 + FLOAT8 + BLOCK + WEIGHT_ONLY


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def build(text: str, *, bias: bool = True, n: int = N, k: int = K, **kwargs) -> QuantizedLinear:
    scheme = Scheme.parse(text)
    if not scheme.weight_only and not scheme.activation.dynamic:
        kwargs["input_scale"] = torch.tensor(0.02)
        if not scheme.activation.symmetric:
            kwargs["input_zero_point"] = torch.tensor(-5)
    return QuantizedLinear.from_float(nn.Linear(k, n, bias=bias), scheme, **kwargs)


def spread(values: Tensor, block: tuple[int, int] | None, shape) -> Tensor:
    if block is None:
        return values
    return values.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def decoded_weight(layer: QuantizedLinear) -> Tensor:
    """The weight ``[n, k]`` in float64, from the buffers alone."""
    spec, block = layer.scheme.weight, layer.scheme.weight.block
    codes = unpack_int4(layer.weight, spec.dtype) if spec.dtype in INT4_DTYPES else layer.weight
    codes = codes.double()
    if layer.weight_zero_point is not None:
        codes = codes - spread(layer.weight_zero_point.double(), block, codes.shape)
    return codes * spread(layer.weight_scale.double(), block, codes.shape)


def decoded_input(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What the layer sees of ``x [m, k]``, in float64."""
    if layer.scheme.weight_only:
        return x.double()
    spec = layer.scheme.activation
    codes, scale, zero_point = quantize_activation(x, spec, layer.input_scale, layer.input_zero_point)
    centred = codes.double() - (0 if zero_point is None else zero_point)
    group = spec.group
    return centred * (scale.double().repeat_interleave(group, 1)[:, : x.shape[1]] if group else scale.double())


def assert_right(layer: QuantizedLinear, x: Tensor, out: Tensor) -> None:
    """``out`` is the float64 product of the decoded operands, up to float32 sums and one rounding to the result.

    A kernel may also round the decoded weight of a weight-only linear to the activation's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    a, b = decoded_input(layer, rows), decoded_weight(layer)
    exact = a @ b.t() + (0 if layer.bias is None else layer.bias.double())
    assert out.dtype is x.dtype
    assert out.shape == (*x.shape[:-1], layer.out_features)
    eps = torch.finfo(x.dtype).eps
    terms = a.abs() @ b.abs().t() + (0 if layer.bias is None else layer.bias.double().abs())
    bound = eps * exact.abs() + 2e-6 * terms + (2 * eps * terms if layer.scheme.weight_only else 0)
    error = (out.reshape(exact.shape).double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.3g} times the bound"


SHAPES = [(K,), (1, K), (5, K), (2, 3, K), (0, K), (2, 0, K)]


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("text", SCHEMES)
def test_every_scheme_is_the_float64_product_of_its_codes(text, bias, x_dtype):
    layer = build(text, bias=bias)
    for shape in SHAPES:
        x = torch.randn(shape).to(x_dtype)
        assert_right(layer, x, layer(x))


@pytest.mark.parametrize(
    "text", [*INT8[:5], FLOAT8[0], BLOCK[0], WEIGHT_ONLY[0], "float16 x uint8 per_channel asymmetric"]
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 48), (17, 31), (33, 50)])
def test_sizes_that_no_tile_divides(n, k, text):
    layer = build(text, n=n, k=k)
    for m in (1, 6):
        for dtype in FLOATS:
            x = torch.randn(m, k).to(dtype)
            assert_right(layer, x, layer(x))


@pytest.mark.parametrize("text", WEIGHT_ONLY)
def test_weight_only_sizes_that_packed_kernels_take(text):
    layer = build(text, n=64, k=128)
    for dtype in FLOATS:
        x = torch.randn(5, 128).to(dtype)
        assert_right(layer, x, layer(x))


@pytest.mark.parametrize("text", SCHEMES)
def test_it_is_near_the_float_linear(text):
    linear, x = nn.Linear(K, N), torch.randn(16, K)
    static = "(static)" in text
    scheme = Scheme.parse(text)
    given = (
        {"input_scale": x.abs().amax() / (127 if "int8" in text else torch.finfo(scheme.activation.dtype).max)}
        if static
        else {}
    )
    if static and not scheme.activation.symmetric:
        given = {
            "input_scale": (x.amax() - x.amin()) / 255,
            "input_zero_point": (-128 - x.amin() * 255 / (x.amax() - x.amin())).round().int(),
        }
    out = QuantizedLinear.from_float(linear, text, **given)(x)
    error = (out - linear(x)).norm() / linear(x).norm()
    # Half a step of the coarsest operand, as noise: 1/15 of the range with 4 bits, 2**-3 of a value with e5m2.
    coarse = "int4" in text or "e5m2" in text
    assert error < (0.15 if coarse else 0.05)


@pytest.mark.parametrize("text", [INT8[0], INT8[2], FLOAT8[0], BLOCK[0], WEIGHT_ONLY[0]])
def test_zero_rows_give_the_bias_and_nan_stays_in_its_row(text):
    layer, x = build(text), torch.randn(3, K)
    x[1] = 0
    per_token = "per_token" in text or "per_group(16)" in text or "bfloat16" in text
    assert torch.equal(layer(x)[1], layer.bias)
    x[2, 5] = float("nan")
    out = layer(x)
    assert out[2].isnan().all()
    assert out[:2].isfinite().all() == per_token


@pytest.mark.parametrize(
    "text", ["int8 per_token x int8 per_channel", FLOAT8[0], "int8 per_token asymmetric x int8 per_channel"]
)
def test_constant_rows(text):
    layer = build(text)
    x = torch.tensor([[4.0], [-2.0], [0.0]]).expand(3, K).contiguous()
    exact = x.double() @ decoded_weight(layer).t() + layer.bias.double()
    # A constant is the end of its range: its code is exact up to the rounding of the scale.
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_inputs_of_any_strides_and_inference_mode():
    layer = build(INT8[0])
    wide = torch.randn(3, 2 * K)
    for x in (wide[:, ::2], torch.randn(K, 3).t(), torch.randn(2, 3, K).transpose(0, 1)):
        assert torch.equal(layer(x), layer(x.contiguous()))
    with torch.inference_mode():
        assert torch.equal(layer(wide[:, ::2]), layer(wide[:, ::2].contiguous()))


def test_a_strided_weight_is_read_as_it_is():
    codes = torch.randint(-127, 128, (K, N), dtype=torch.int8).t()
    layer = QuantizedLinear(Scheme.parse(INT8[0]), codes, torch.rand(N) + 0.1)
    x = torch.randn(4, K)
    assert_right(layer, x, layer(x))


# --- a module among modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*INT8[:2], INT8[-1], FLOAT8[0], BLOCK[0], *WEIGHT_ONLY[::3]])
def test_a_state_dict_round_trip_into_other_values(text):
    first, second, x = build(text), build(text), torch.randn(4, K)
    assert not torch.equal(first(x), second(x))
    names = {"weight", "weight_scale", "bias", "input_scale", "input_zero_point", "weight_zero_point"}
    assert set(first.state_dict()) <= names
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    third = build(text)
    third.load_state_dict(first.state_dict(), assign=True)
    assert torch.equal(first(x), third(x))


def test_a_static_scheme_keeps_its_scales_in_the_state_dict():
    state = build("int8 per_tensor asymmetric (static) x int8 per_channel").state_dict()
    assert set(state) == {"weight", "weight_scale", "bias", "input_scale", "input_zero_point"}
    assert state["weight_scale"].shape == (N, 1)


def test_one_element_scales_of_any_shape_load():
    layer = build("int8 per_tensor (static) x int8 per_tensor")
    state = layer.state_dict()
    state["weight_scale"], state["input_scale"] = torch.tensor([0.5]), torch.tensor([0.25])
    layer.load_state_dict(state)
    assert layer.weight_scale == 0.5 and layer.input_scale == 0.25


def _through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, copy.copy, _through_torch_save]


@pytest.mark.parametrize(
    ("text", "duplicate"),
    # PyTorch itself cannot read back a pickled float8 tensor (torch 2.13), but for torch.save.
    [(text, each) for text in (INT8[2], WEIGHT_ONLY[-1]) for each in (*COPIES, _through_pickle)]
    + [(FLOAT8[0], each) for each in COPIES],
)
def test_copies_are_the_same_layer(text, duplicate):
    layer, x = build(text), torch.randn(4, K)
    expected = layer(x)
    assert torch.equal(duplicate(layer)(x), expected)


def coarse(x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """A formula of one's own: 16 steps of a scale for each index of the first dim."""
    scale = x.abs().amax(list(range(1, x.dim())), keepdim=True) / 8 + 0.01
    return (x / scale).round().to(torch.int8), scale, None


def quantized_by(quantizer: Any, text: str = INT8[0], **given: Any) -> QuantizedLinear:
    layer = build(text)
    return QuantizedLinear(
        layer.scheme, layer.weight, layer.weight_scale, bias=layer.bias, quantizer=quantizer, **given
    )


@pytest.mark.parametrize("rows", [(3, 5), (7,), (2, 3, 4), (1,)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_quantizer_replaces_the_formula_and_sees_every_dim(dtype, rows):
    layer, x = quantized_by(coarse), torch.randn(*rows, K).to(dtype)
    codes, scale, _ = coarse(x, None, None)
    weight = layer.weight.double() * layer.weight_scale.double()
    expected = (codes.double() * scale.double()) @ weight.t() + layer.bias.double()
    assert_within(layer(x), expected.to(dtype), Numerics.SAME_ACCUM)
    assert not torch.equal(layer(x), build(INT8[0])(x))


def test_a_quantizer_is_traced_as_it_is_and_the_matmul_is_rewritten():
    layer, x = quantized_by(coarse), torch.randn(3, 5, K)
    found = fx_quant.explain(layer, x)
    assert (len(found.sites), len(found.misses), found.graph_breaks) == (1, 0, 0)
    assert_within(torch.compile(layer, backend="fx_quant", fullgraph=True)(x), layer(x), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("duplicate", [*COPIES, _through_pickle])
def test_copies_keep_the_quantizer_and_the_state_dict_does_not_hold_it(duplicate):
    layer, x = quantized_by(coarse), torch.randn(4, K)
    assert duplicate(layer).quantizer is coarse and torch.equal(duplicate(layer)(x), layer(x))
    assert layer.state_dict().keys() == build(INT8[0]).state_dict().keys()
    assert build(INT8[0]).quantizer is None


def test_a_quantizer_is_given_the_scales_and_is_not_asked_without_rows():
    text = "int8 per_tensor asymmetric (static) x int8 per_channel"
    seen = []

    def recording(x, scale, zero_point):
        seen.append((scale.item(), zero_point.item()))
        return x.to(torch.int8), scale.reshape(1, 1), zero_point.long()

    layer = quantized_by(recording, text, input_scale=torch.tensor(0.5), input_zero_point=torch.tensor(3))
    assert layer(torch.empty(2, 0, K)).shape == (2, 0, N) and not seen
    layer(torch.ones(2, K))
    assert seen == [(0.5, 3)]


WRONG = {
    "no tuple": (INT8[0], lambda x: x, "must return (codes, scale, zero_point), got Tensor"),
    "no scale": (INT8[0], lambda x: (x.to(torch.int8), 1.0, None), "must return (codes, scale, zero_point), got tuple"),
    "dtype": (INT8[0], lambda x: (x, x[..., :1], None), "must return int8 codes of x's shape [2, 3, 64], got float32"),
    "shape": (INT8[0], lambda x: (x[0].to(torch.int8), x[..., :1], None), "of x's shape [2, 3, 64], got int8 [3, 64]"),
    "scale dtype": (INT8[0], lambda x: (x.to(torch.int8), x[..., :1].int(), None), "a float scale that broadcasts to"),
    "scale shape": (INT8[0], lambda x: (x.to(torch.int8), x[..., :2], None), "to [2, 3, 1], got float32 [2, 3, 2]"),
    "scale rank": (INT8[0], lambda x: (x.to(torch.int8), x[None, ..., :1], None), "got float32 [1, 2, 3, 1]"),
    "scale per token": (INT8[2], lambda x: (x.to(torch.int8), x[..., :1], None), "a float scale of one element"),
    "groups": (BLOCK[0], lambda x: (x.to(E4M3), x[..., :3], None), "to [2, 3, 4], got float32 [2, 3, 3]"),
    "zero point": (INT8[0], lambda x: (x.to(torch.int8), x[..., :1], x[..., :1].int()), "must return no zero point"),
    "no zero point": (INT8[4], lambda x: (x.to(torch.int8), x[..., :1], None), "must return a zero point, got none"),
    "float zero point": (INT8[4], lambda x: (x.to(torch.int8), x[..., :1], x[..., :1]), "must return integer zero"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_quantizer_that_returns_something_else_is_an_error_of_one_line(case):
    text, wrong, message = WRONG[case]
    layer = quantized_by(lambda x, scale, zero_point: wrong(x), text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        layer(torch.rand(2, 3, K))
    assert "\n" not in str(error.value)


def test_what_is_no_quantizer_is_refused():
    with pytest.raises(
        ValueError, match=r"^quantizer must be a function \(x, input_scale, input_zero_point\), got int"
    ):
        quantized_by(8)
    with pytest.raises(ValueError, match=r"^a quantizer is for quantized activations, got one with bfloat16 x int8"):
        quantized_by(coarse, WEIGHT_ONLY[0])


def test_a_deep_copy_has_its_own_weight():
    layer, x = build(INT8[0]), torch.randn(4, K)
    twin, expected = copy.deepcopy(layer), layer(x)
    twin.weight.zero_()
    assert torch.equal(twin(x), twin.bias.expand(4, N))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "text", [INT8[0], INT8[-1], FLOAT8[0], BLOCK[0], "bfloat16 x float8_e4m3fn per_channel", WEIGHT_ONLY[-1]]
)
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda m: m.bfloat16().float(), torch.float32),
    ],
)
def test_a_cast_changes_the_bias_only(cast, dtype, text):
    layer, x = build(text), torch.randn(4, K).to(dtype)
    before = {name: (value.dtype, value.clone()) for name, value in layer.named_buffers()}
    cast(layer)
    assert layer.bias.dtype is dtype
    for name, value in layer.named_buffers():
        assert value.dtype is before[name][0], name
        assert torch.equal(value.float(), before[name][1].float()), name
    assert_right(layer, x, layer(x))


def test_it_moves_to_a_device():
    layer = build(FLOAT8[0]).to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer.weight.dtype is E4M3
    empty = layer.to_empty(device="cpu")
    assert empty.weight.dtype is E4M3 and empty.weight_scale.dtype is torch.float32


@pytest.mark.parametrize("text", [INT8[0], INT8[2], FLOAT8[0], WEIGHT_ONLY[0]])
def test_a_weight_that_is_updated_in_place_is_seen(text):
    layer, other, x = build(text), build(text), torch.randn(4, K)
    layer(x)
    layer.weight.copy_(other.weight)
    layer.weight_scale.copy_(other.weight_scale)
    assert_right(layer, x, layer(x))


def test_a_padded_weight_that_is_updated_in_place_is_seen():
    layer, x = build("bfloat16 x int8 per_channel", n=17, k=31), torch.randn(4, 31, dtype=torch.bfloat16)
    layer.force_kernel = "cpu_weight_only_int8"
    assert layer.selection(x).padding.k == 32
    layer(x)
    layer.weight.neg_()
    assert_right(layer, x, layer(x))


@pytest.mark.parametrize("text", [INT8[0], FLOAT8[0], WEIGHT_ONLY[3]])
def test_gradients_are_refused_where_they_are_asked_for(text):
    with torch.enable_grad():
        layer, x = build(text), torch.randn(4, K, requires_grad=True)
        out = layer(x)
        assert out.requires_grad
        with pytest.raises(FxQuantError, match="a quantized linear is for inference"):
            out.sum().backward()
        with torch.no_grad():
            assert not layer(x).requires_grad
        assert not layer(x.detach()).requires_grad
    assert not any(p.requires_grad for p in layer.parameters())


def test_it_prints_its_scheme():
    assert repr(build(INT8[0])) == (
        "QuantizedLinear(in_features=64, out_features=40, bias=True, "
        "scheme=int8 per_token (dynamic) x int8 per_channel)"
    )


# --- which kernel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_eager_kernel_is_the_one_that_explain_reports(text, x_dtype):
    layer, x = build(text), torch.randn(4, K).to(x_dtype)
    (site,) = fx_quant.explain(layer, x).sites
    assert layer.selection(x).kernel.name == site.kernel
    assert site.scheme.replace(str(x_dtype).removeprefix("torch."), "bfloat16") == _as_reported(text)


def _as_reported(text: str) -> str:
    # In a graph int4 codes are what is stored, and where a scale came from is not said of a tensor's.
    return text.replace("uint4", "int4")


def test_a_forced_kernel_runs_or_raises():
    x = torch.randn(4, K)
    layer = build(INT8[0], force_kernel="pytorch_int_mm")
    assert layer.selection(x).kernel.name == "pytorch_int_mm"
    assert_right(layer, x, layer(x))
    with pytest.raises(NoKernelError, match=r"forced kernel 'cpu_float8_float32' cannot run .*: has no int8 x int8"):
        build(INT8[0], force_kernel="cpu_float8_float32")(x)
    with pytest.raises(UnknownNameError, match="unknown kernel 'cpu_int_vnni'"):
        build(INT8[0], force_kernel="cpu_int_vnni")(x)


def test_no_kernel_says_every_reason(monkeypatch):
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", "cpu,pytorch")
    with pytest.raises(NoKernelError, match=r"no kernel can run int8 per_token.*on x86.*pytorch_int_mm: is disabled"):
        build(INT8[0])(torch.randn(4, K))


def test_scales_are_kept_in_the_dtype_that_the_scheme_says():
    scheme = Scheme.parse("bfloat16 x float8_e4m3fn per_group(32) float8_e8m0fnu scales")
    scale = torch.tensor([[0.5, 2.0]] * N).to(torch.float8_e8m0fnu)
    layer = QuantizedLinear(scheme, torch.randn(N, K).to(E4M3), scale)
    assert layer.weight_scale.dtype is torch.float8_e8m0fnu
    with pytest.raises(NoKernelError, match="takes scales of float32, got float8_e8m0fnu"):
        layer(torch.randn(3, K))
    with pytest.raises(ValueError, match=r"weight_scale of .* must be float8_e8m0fnu, got float32 \[40, 2\]"):
        QuantizedLinear(scheme, layer.weight, scale.float())


# --- compiled -----------------------------------------------------------------------------------------------------

COMPILED = [
    "int8 per_token (dynamic) x int8 per_channel",
    "int8 per_tensor asymmetric (static) x int8 per_channel",
    "int8 per_token asymmetric (dynamic) x int8 per_tensor",
    "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel",
    "float8_e4m3fn per_group(16) (dynamic) x float8_e4m3fn per_block(32, 16)",
    "bfloat16 x int4 per_group(16) asymmetric",
    "bfloat16 x int8 per_channel",
]


@pytest.mark.parametrize("dynamic", [False, True])
def test_its_graph_gives_the_eager_result(dynamic, op_by_op):
    assert_compiled_gives_the_eager_result(COMPILED, dynamic)


def test_compiled_it_gives_the_eager_result():
    assert_compiled_gives_the_eager_result(COMPILED[::3], dynamic=True)


def assert_compiled_gives_the_eager_result(texts, dynamic):
    """Layers of one graph, each of another number of columns, so that none has the kernel of another."""
    layers = nn.ModuleList([build(text, n=N + i) for i, text in enumerate(texts)])

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return [layer(x) for layer in self.layers]

    compiled = torch.compile(Layers(), backend="fx_quant", dynamic=dynamic, options={"strict": True})
    for m in (5, 3, 9) if dynamic else (5,):
        x = torch.randn(2, m, K)
        for out, layer, text in zip(compiled(x), layers, texts, strict=True):
            chosen = layer.selection(torch.empty(1, K)).kernel.numerics
            assert_within(out, layer(x), chosen if "x int8" in text else Numerics.REASSOCIATED)


def test_compiled_exactly_where_codes_are_integers():
    assert TOLERANCES[build(COMPILED[0]).selection(torch.empty(1, K)).kernel.numerics, torch.float32].atol == 0


def test_compiled_without_rows():
    layer = build(FLOAT8[2])
    compiled = torch.compile(layer, backend="fx_quant", options={"strict": True})
    assert compiled(torch.empty(0, K)).shape == (0, N)


def test_compiled_gradients_are_refused_where_they_are_asked_for():
    layer = build(INT8[0])
    compiled = torch.compile(layer, backend="fx_quant", options={"strict": True})
    with torch.enable_grad():
        x = torch.randn(4, K, requires_grad=True)
        out = compiled(x)
        assert torch.equal(out, layer(x))
        with pytest.raises(FxQuantError, match="a quantized linear is for inference"):
            out.sum().backward()


# --- a whole model ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Nested, with a linear of two names and one that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(K, K), nn.ReLU()) for _ in range(2)])
        self.tied = self.blocks[0][0]
        self.head = nn.Linear(K, N, bias=False)
        self.own = _Scaled(K, K)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.own(self.tied(x)))


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


ELSE = "if it computes the same, set it to QuantizedLinear.from_float"


def test_quantize_replaces_linears_in_place():
    model, x = Model().eval(), torch.randn(4, K)
    expected = model(x)
    report = quantize_(model, INT8[0])
    assert report.quantized == ("blocks.0.0", "blocks.1.0", "tied", "head")
    assert report.left == (LeftWeight("own", "_Scaled", f"its forward pass is not that of nn.Linear; {ELSE}"),)
    assert model.tied is model.blocks[0][0]
    assert isinstance(model.tied, QuantizedLinear) and type(model.own) is _Scaled
    assert not model.head.training
    error = (model(x) - expected).norm() / expected.norm()
    assert error < 0.05


def test_a_filter_chooses():
    model, asked = Model(), []

    def wanted(name: str, linear: nn.Linear) -> bool:
        asked.append(name)
        return name != "tied" and linear.bias is not None

    assert quantize_(model, FLOAT8[0], wanted).quantized == ("blocks.0.0", "blocks.1.0")
    assert asked == ["blocks.0.0", "blocks.1.0", "tied", "head"]
    assert type(model.tied) is nn.Linear
    report = quantize_(Model(), FLOAT8[0], lambda name, linear: False)
    assert report.quantized == ()
    assert [row.reason for row in report.left].count("the filter left it out") == 4


def test_an_attention_that_reads_its_weight_is_left_whole():
    model = nn.MultiheadAttention(K, 4, batch_first=True).eval()
    x = torch.randn(2, 5, K)
    expected = model(x, x, x)[0]
    report = quantize_(model, INT8[0])
    assert report.quantized == ()
    assert report.left == (
        LeftWeight(
            "",
            "MultiheadAttention",
            f"it is no linear, and multiplies with a weight itself: in_proj_weight [{3 * K}, {K}]",
        ),
        LeftWeight("out_proj", "NonDynamicallyQuantizableLinear", "its parent reads its weight without calling it"),
    )
    assert torch.equal(model(x, x, x)[0], expected)


def test_an_encoder_layer_calls_its_quantized_linears():
    model = nn.TransformerEncoderLayer(K, 4, 2 * K, batch_first=True).eval()
    x = torch.randn(2, 5, K)
    expected = model(x)
    assert quantize_(model, INT8[0]).quantized == ("linear1", "linear2")
    assert (model(x) - expected).norm() / expected.norm() < 0.05


class _Experts(nn.Module):
    """As transformers holds them: one parameter for all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, K, 2 * K))
        self.down_proj = nn.Parameter(torch.randn(3, K, 2 * K))
        self.router_bias = nn.Parameter(torch.randn(3, 2))


def test_what_quantize_leaves_is_said_once_for_repeated_layers():
    layers = [nn.ModuleDict({"experts": _Experts(), "up": nn.Linear(K, K)}) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(5, K), nn.LayerNorm(K), nn.Conv1d(K, K, 3), *layers, nn.Bilinear(4, 5, 6))
    report = quantize_(model, INT8[0])
    assert report.quantized == ("3.up", "4.up")
    assert [row.module for row in report.left] == ["3.experts", "4.experts", "5"]
    lines = report.to_text(wide=True).splitlines()
    assert lines[0] == f"fx_quant: 2 linears quantized as {INT8[0]}, 3 left in float"
    assert (
        " ".join(lines[1:]).split()
        == (
            "left in float: *.experts x 2 (_Experts): it is no linear, and multiplies with a weight itself: "
            f"gate_up_proj [3, {K}, {2 * K}], down_proj [3, {K}, {2 * K}] "
            "5 (Bilinear): it is no linear, and multiplies with a weight itself: weight [6, 4, 5]"
        ).split()
    )
    assert json.loads(report.to_json())["left"][0]["kind"] == "_Experts"


def test_a_conv1d_of_transformers_is_the_linear_that_it_is():
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2Model(config).eval()
    conv = model.h[0].attn.c_attn
    conv.bias.data.normal_()
    linear = nn.Linear(32, 96)
    linear.load_state_dict({"weight": conv.weight.t(), "bias": conv.bias})
    report = quantize_(model, INT8[0])
    assert report.left == ()
    assert len(report.quantized) == 8
    assert report.quantized[0] == "h.0.attn.c_attn"
    found, expected = model.h[0].attn.c_attn, QuantizedLinear.from_float(linear, INT8[0])
    x = torch.randn(2, 3, 32)
    assert torch.equal(found(x), expected(x))
    assert (found(x) - conv(x)).norm() / conv(x).norm() < 0.02


def test_a_conv1d_with_a_forward_of_its_own_is_left():
    pytest.importorskip("transformers", reason="the dev extra is not installed")
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(8, 4))
    model[0].forward = lambda x: x
    (row,) = quantize_(model, INT8[0]).left
    assert row.reason == f"its forward pass is not that of Conv1D; {ELSE}"


@pytest.mark.parametrize(
    ("model", "scheme", "message"),
    [
        (nn.Linear(4, 4), INT8[0], "got a linear; use QuantizedLinear.from_float"),
        (nn.Sequential(), INT8[-1], "no input scales for the static scheme int8 per_tensor asymmetric"),
        (nn.Sequential(), "float32 x float32", "the weight of a scheme must be quantized, got float32 x float32"),
        (
            nn.Sequential(nn.ReLU(), nn.Linear(3, 4)),
            "float32 x int4 per_channel",
            "^1: codes must have an even k, got 3",
        ),
        (nn.Sequential(), "integers", "a scheme must read 'activation x weight', got 'integers'"),
    ],
)
def test_quantize_errors(model, scheme, message):
    with pytest.raises(ValueError, match=message):
        quantize_(model, scheme)


# --- errors -------------------------------------------------------------------------------------------------------

CODES, SCALE = torch.zeros(8, 6, dtype=torch.int8), torch.ones(8)
SHIFT = torch.zeros(8, dtype=torch.int32)
DYNAMIC, STATIC = INT8[0], "int8 per_tensor (static) x int8 per_channel"


@pytest.mark.parametrize(
    ("scheme", "weight", "scale", "given", "message"),
    [
        (DYNAMIC, CODES.float(), SCALE, {}, r"weight must be int8 \[n, k\] with k > 0, got float32 \[8, 6\]"),
        (DYNAMIC, CODES[0], SCALE, {}, r"got int8 \[6\]"),
        (DYNAMIC, CODES[:, :0], SCALE, {}, r"k > 0, got int8 \[8, 0\]"),
        (
            DYNAMIC,
            CODES,
            SCALE[:6],
            {},
            r"weight_scale of int8 per_channel must be float of shape \[8, 1\], got float32 \[6\]",
        ),
        (DYNAMIC, CODES, SHIFT, {}, r"must be float of shape \[8, 1\], got int32 \[8\]"),
        (DYNAMIC, CODES, -SCALE, {}, r"weight_scale must be finite and positive, got -1.0 \(8 of 8 elements are not\)"),
        (DYNAMIC, CODES, SCALE.clone().index_fill_(0, torch.tensor(2), float("nan")), {}, r"got nan \(1 of 8"),
        (DYNAMIC, CODES, SCALE * float("inf"), {}, "got inf"),
        (DYNAMIC, CODES, SCALE * 0, {}, "must be finite and positive, got 0.0"),
        (DYNAMIC, CODES, SCALE, {"bias": torch.ones(6)}, r"bias must be .* of shape \[8\], got float32 \[6\]"),
        (DYNAMIC, CODES, SCALE, {"bias": torch.ones(8).double()}, r"got float64 \[8\]"),
        (DYNAMIC, CODES, SCALE, {"weight_zero_point": SHIFT}, "weight of int8 per_channel takes no weight_zero_point"),
        (DYNAMIC, CODES, SCALE, {"input_scale": SCALE[:1]}, "takes no input_scale, got float32"),
        (STATIC, CODES, SCALE, {}, "needs input_scale of one element, got none"),
        (STATIC, CODES, SCALE, {"input_scale": SCALE}, r"of one element, got float32 \[8\]"),
        (STATIC, CODES, SCALE, {"input_scale": SHIFT[:1]}, r"input_scale must be float, got int32 \[1\]"),
        (STATIC, CODES, SCALE, {"input_scale": -SCALE[:1]}, "input_scale must be finite and positive, got -1.0"),
        (STATIC, CODES, SCALE, {"input_scale": SCALE[:1], "input_zero_point": SHIFT[:1]}, "takes no input_zero_point"),
        (INT8[-1], CODES, SCALE, {"input_scale": SCALE[:1]}, "needs input_zero_point of one element, got none"),
        (
            INT8[-1],
            CODES,
            SCALE,
            {"input_scale": SCALE[:1], "input_zero_point": SCALE[:1]},
            r"input_zero_point must be an integer, got float32 \[1\]",
        ),
        ("float32 x uint8 per_channel asymmetric", CODES.to(torch.uint8), SCALE, {}, "needs a weight_zero_point"),
        (
            "float32 x uint8 per_channel asymmetric",
            CODES.to(torch.uint8),
            SCALE,
            {"weight_zero_point": SCALE},
            r"weight_zero_point must be integers of shape \[8, 1\], got float32 \[8\]",
        ),
        ("float32 x int4 per_channel", CODES, SCALE, {}, r"weight must be uint8 \[n, k\]"),
        ("float32 x float32", CODES, SCALE, {}, "use nn.Linear for float weights"),
        ("float32 x int8 per_token", CODES, SCALE, {}, "a weight must be per_tensor, per_channel, per_group"),
        ("float32 x int8 per_group(0)", CODES, SCALE, {}, "a weight must be per_tensor, per_channel, per_group"),
        ("float32 x float8_e4m3fn per_channel asymmetric", CODES, SCALE, {}, "asymmetric weight must have an integer"),
        ("int8 per_token x int8 per_channel asymmetric", CODES, SCALE, {}, "the weight must be symmetric"),
        (
            "float8_e4m3fn per_token x float8_e4m3fn per_group(2)",
            CODES,
            SCALE,
            {},
            r"the activation must be per_group\(2\)",
        ),
        (
            "float8_e4m3fn per_group(2) x float8_e4m3fn per_channel",
            CODES,
            SCALE,
            {},
            "groups of one size or not at all",
        ),
        ("uint8 per_token x int8 per_channel", CODES, SCALE, {}, "must be quantized to int8 or float8, got uint8"),
        ("int8 per_token (static) x int8 per_channel", CODES, SCALE, {}, "a static activation must be per_tensor"),
    ],
)
def test_operands_that_do_not_fit_are_one_clear_error(scheme, weight, scale, given, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(Scheme.parse(scheme), weight, scale, **given)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 63), r"x must be \[..., 64\] of float32, bfloat16 or float16, got float32 \[2, 63\]"),
        (torch.randn(2, K).double(), r"got float64 \[2, 64\]"),
        (torch.zeros(2, K, dtype=torch.int8), r"got int8 \[2, 64\]"),
        (torch.tensor(1.0), r"got float32 \[\]"),
    ],
)
def test_an_input_that_does_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        build(INT8[0])(x)


@pytest.mark.parametrize("text", ["float32 x int8 per_channel asymmetric", "float32 x uint8 per_channel"])
def test_from_float_checks_the_scheme(text):
    if "uint8" in text:
        with pytest.raises(ValueError, match="a symmetric weight must have a signed dtype"):
            QuantizedLinear.from_float(nn.Linear(4, 4), text)
    else:
        layer = QuantizedLinear.from_float(nn.Linear(4, 4), text)
        assert layer.weight_zero_point.dtype is torch.int32


def test_from_float_refuses_weights_that_are_not_finite():
    linear = nn.Linear(4, 4)
    linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite, got 1 NaN"):
        QuantizedLinear.from_float(linear, INT8[0])


def test_apply_linear_returns_the_dtype_that_is_asked_for():
    layer, x = build(INT8[0]), torch.randn(3, K, dtype=torch.bfloat16)
    out = apply_linear(x, layer.scheme, layer.weight, layer.weight_scale, layer.bias, out_dtype=torch.float32)
    assert out.dtype is torch.float32
    assert torch.equal(out.bfloat16(), layer(x))


# --- schemes as text ----------------------------------------------------------------------------------------------

SIZES = st.integers(1, 512)
ACTIVATIONS: st.SearchStrategy[Granularity] = st.one_of(
    st.sampled_from([Granularity.PER_TENSOR, Granularity.PER_TOKEN, Granularity.UNSCALED]),
    st.builds(Granularity.per_group, SIZES),
)
WEIGHTS = st.one_of(
    st.sampled_from([Granularity.PER_TENSOR, Granularity.PER_CHANNEL, Granularity.UNSCALED]),
    st.builds(Granularity.per_group, SIZES),
    st.builds(Granularity.per_block, SIZES, SIZES),
)
CODES_DTYPES = st.sampled_from(sorted(CODE_DTYPES | INT4_DTYPES, key=str))
FLOAT_SPECS = st.builds(OperandSpec, st.sampled_from(sorted(FLOAT_DTYPES, key=str)))
SCHEME = st.builds(
    Scheme,
    st.one_of(FLOAT_SPECS, st.builds(OperandSpec, CODES_DTYPES, ACTIVATIONS, st.booleans(), st.booleans())),
    st.one_of(FLOAT_SPECS, st.builds(OperandSpec, CODES_DTYPES, WEIGHTS, st.just(False), st.booleans())),
)


@settings(max_examples=300, deadline=None)
@given(scheme=SCHEME)
def test_a_scheme_prints_what_it_parses_from(scheme):
    assert Scheme.parse(str(scheme)) == scheme


def test_a_quantized_activation_is_dynamic_unless_it_says_static():
    assert Scheme.parse("int8 per_token x int8 per_channel") == Scheme.parse(INT8[0])
    assert not Scheme.parse(STATIC).activation.dynamic
    assert Scheme.parse("bfloat16 x int4 per_group(128)").weight == OperandSpec(INT4, Granularity.per_group(128))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a scheme must read 'activation x weight', got ''"),
        ("int8 per_token", "for example 'int8 per_token"),
        ("int8 x int8 x int8", "a scheme must read 'activation x weight'"),
        ("int7 per_token x int8 per_channel", "cannot read 'int7 per_token' in the scheme"),
        ("float64 x int8 per_channel", "cannot read 'float64'"),
        ("int8 per_row x int8 per_channel", "a granularity must be one of per_tensor, .* got per_row in"),
        ("int8 per_token x int8 per_group", "got per_group in"),
        ("int8 per_token x int8 per_block(128)", r"got per_block\(128\) in"),
        ("int8 per_token(3) x int8 per_channel", r"got per_token\(3\) in"),
        ("int8 per_token (sometimes) x int8 per_channel", "cannot read"),
    ],
)
def test_a_scheme_that_does_not_parse_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


# --- zero points of 4-bit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize(
    ("least", "most", "kept"),
    [(0, 15, torch.int8), (-120, 127, torch.int8), (-121, 0, torch.int32), (0, 128, torch.int32)],
)
def test_zero_points_of_4_bit_codes_are_kept_in_a_byte_where_it_holds_them(dtype, least, most, kept):
    scheme = Scheme.parse(f"float32 x {dtype} per_group(32) asymmetric")
    codes, scale = torch.randint(0, 256, (5, 32), dtype=torch.uint8), torch.rand(5, 2) + 0.1
    zero_point = torch.randint(least, most + 1, (5, 2))
    zero_point[0, 0], zero_point[4, 1] = least, most
    layer = QuantizedLinear(scheme, codes, scale, weight_zero_point=zero_point)
    assert layer.weight_zero_point.dtype is kept
    x = torch.randn(3, 64)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).double() - (0 if dtype == "uint4" else 8)
    weight = (nibbles - zero_point.repeat_interleave(32, 1)) * scale.double().repeat_interleave(32, 1)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.t(), rtol=1e-4, atol=1e-2)


def test_zero_points_that_are_loaded_widen_the_buffer_that_they_do_not_fit():
    scheme = Scheme.parse("float32 x uint4 per_group(32) asymmetric")
    codes, scale = torch.randint(0, 256, (5, 32), dtype=torch.uint8), torch.rand(5, 2) + 0.1
    layer = QuantizedLinear(scheme, codes, scale, weight_zero_point=torch.full((5, 2), 7))
    wide = QuantizedLinear(scheme, codes, scale, weight_zero_point=torch.full((5, 2), 1000))
    layer.load_state_dict(wide.state_dict())
    assert torch.equal(layer.weight_zero_point, wide.weight_zero_point)
    layer.load_state_dict({**wide.state_dict(), "weight_zero_point": torch.full((5, 2), 3)})
    assert layer.weight_zero_point.dtype is torch.int8 and (layer.weight_zero_point == 3).all()
