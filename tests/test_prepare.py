"""``prepare_``: what is swapped keeps the codes and scales of its library; what is not is left, with its reason."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fx_quant
from fx_quant import PrepareReport, QuantizedLinear, Scheme, prepare_
from fx_quant.layers.activation import quantize_by
from fx_quant.loading.adapters.base import decoded_weight
from fx_quant.loading.prepare import needs_prepare
from fx_quant.scheme import INT4_DTYPES, Numerics
from fx_quant.weights import unpack_int4
from tests.tolerances import assert_within

K, N = 256, 100  # n is ragged: a block of 128 rows is cut short, and no kernel's alignment divides it


# --- compressed-tensors -------------------------------------------------------------------------------------------


def args(**more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, **more}


TOKEN, TENSOR = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
INT8, FLOAT8 = args(strategy="channel"), args(type="float", strategy="channel")
GROUPS: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = MappingProxyType(
    {
        "int8_dynamic": (INT8, args(**TOKEN), "int8 per_token (dynamic) x int8 per_channel"),
        "int8_dynamic_asymmetric": (
            INT8,
            args(**{**TOKEN, "symmetric": False}),
            "int8 per_token asymmetric (dynamic) x int8 per_channel",
        ),
        "int8_static": (INT8, args(**TENSOR), "int8 per_tensor (static) x int8 per_channel"),
        "int8_static_asymmetric": (
            args(strategy="tensor"),
            args(**{**TENSOR, "symmetric": False}),
            "int8 per_tensor asymmetric (static) x int8 per_tensor",
        ),
        "float8_dynamic": (
            FLOAT8,
            args(type="float", **TOKEN),
            "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel",
        ),
        "float8_static": (
            args(type="float", strategy="tensor"),
            args(type="float", **TENSOR),
            "float8_e4m3fn per_tensor (static) x float8_e4m3fn per_tensor",
        ),
        "float8_block": (
            args(type="float", strategy="block", block_structure=[128, 128]),
            args(type="float", strategy="group", group_size=128, dynamic=True),
            "float8_e4m3fn per_group(128) (dynamic) x float8_e4m3fn per_block(128, 128)",
        ),
        "w4a8": (
            args(num_bits=4, strategy="group", group_size=32),
            args(**TOKEN),
            "int8 per_token (dynamic) x int4 per_group(32)",
        ),
        "w4a8_asymmetric": (
            args(num_bits=4, strategy="group", group_size=64, symmetric=False),
            args(**{**TOKEN, "symmetric": False}),
            "int8 per_token asymmetric (dynamic) x uint4 per_group(64) asymmetric",
        ),
        "w4a8_channel": (
            args(num_bits=4, strategy="channel"),
            args(**TOKEN),
            "int8 per_token (dynamic) x int4 per_channel",
        ),
        "w8a8_group": (
            args(strategy="group", group_size=64),
            args(**TOKEN),
            "int8 per_token (dynamic) x int8 per_group(64)",
        ),
        "w8a16": (INT8, None, "bfloat16 x int8 per_channel"),
        "w8a16_asymmetric": (
            args(strategy="group", group_size=64, symmetric=False),
            None,
            "bfloat16 x int8 per_group(64) asymmetric",
        ),
        "w4a16": (args(num_bits=4, strategy="group", group_size=32), None, "bfloat16 x int4 per_group(32)"),
        "w4a16_asymmetric": (
            args(num_bits=4, strategy="group", group_size=64, symmetric=False),
            None,
            "bfloat16 x uint4 per_group(64) asymmetric",
        ),
        "w4a16_channel": (
            args(num_bits=4, strategy="channel", symmetric=False),
            None,
            "bfloat16 x uint4 per_channel asymmetric",
        ),
    }
)
STATES = ("frozen", "compressed", "decompressed", "after_first_forward")
DTYPES = (torch.float32, torch.bfloat16)


class Net(nn.Module):
    """One linear, with weights that are hostile to a scale: a row of zeros, outliers, one value, both signs."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0, zeros: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(K, N, bias=bias)
        with torch.no_grad():
            self.fc.weight[3] *= not zeros
            self.fc.weight[5, 7] = 4.0
            self.fc.weight[6] = 0.01
            self.fc.weight[7].abs_()
        self.to(dtype).requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def library() -> Any:
    return pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def apply_scheme(model: nn.Module, name: str, ignore: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """``model``, calibrated by the library's own formula: the state called frozen. Inputs are -4..4.2."""
    library()
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant

    weights, inputs, _ = GROUPS[name]
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=list(ignore), quantization_status="frozen")
    apply_quantization_config(model, config, show_progress=False)

    def store(module: nn.Module, what: str, low: Tensor, high: Tensor, spec: Any) -> None:
        for part, value in zip(("scale", "zero_point"), calculate_qparams(low, high, spec), strict=True):
            place = getattr(module, f"{what}_{part}", None)
            if place is not None:
                place.data = value.reshape(place.shape).to(place.dtype)

    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        spec, w = module.quantization_scheme.weights, module.weight.data
        rows, columns = {
            "tensor": w.shape,
            "channel": (1, w.shape[1]),
            "group": (1, spec.group_size),
            "block": spec.block_structure,
        }[spec.strategy]
        w = maybe_pad_tensor_for_block_quant(w, (rows, columns))
        blocks = w.reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
        store(module, "weight", blocks.amin((1, 3)), blocks.amax((1, 3)), spec)
        if getattr(module, "input_scale", None) is not None:
            given = module.quantization_scheme.input_activations
            store(module, "input", torch.tensor([-4.0]), torch.tensor([4.2]), given)
    return model


def in_state(model: nn.Module, state: str, x: Any = None) -> nn.Module:
    """A frozen model, brought to ``state`` as transformers or llm-compressor would."""
    from compressed_tensors.compressors import ModelCompressor

    if state == "frozen":
        return model
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    if state == "decompressed":
        compressor.decompress_model(model)
    if state == "after_first_forward":
        with torch.no_grad():
            model(torch.zeros(1, 1, K, dtype=next(model.parameters()).dtype) if x is None else x)
    return model


def compressed_net(name: str, state: str, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> Net:
    return in_state(apply_scheme(Net(dtype, bias, seed), name), state)


def library_codes(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes in their signed range, scale and zero point of ``Net``, as the library writes them to a checkpoint."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    fc = compressed_net(name, "compressed", dtype).fc
    bits, scale, zero_point = GROUPS[name][0]["num_bits"], fc.weight_scale, getattr(fc, "weight_zero_point", None)
    codes = getattr(fc, "weight", None)
    if codes is None:
        codes = unpack_from_int32(fc.weight_packed, bits, torch.Size((N, K)))
    if zero_point is not None and zero_point.dtype is torch.int32:
        zero_point = unpack_from_int32(zero_point, bits, torch.Size((N, scale.shape[1])), packed_dim=0)
    return codes, scale, zero_point


def inputs(dtype: torch.dtype, rank: int = 3) -> Tensor:
    """Rows of zeros, of large and of tiny values, and ordinary ones."""
    x = torch.randn(33, K)
    x[0] = 0
    x[1] *= 1e3
    x[2] *= 1e-3
    x[3, 0] = 100.0
    x = x.to(dtype)
    return x if rank == 2 else x.reshape(3, 11, K)


def ordinary(dtype: torch.dtype, rank: int) -> Tensor:
    x = torch.randn(33, K).clamp(-4, 4.2).to(dtype)
    return x if rank == 2 else x.reshape(3, 11, K)


def only(report: PrepareReport) -> Any:
    assert len(report.swapped) == 1 and not report.left, str(report)
    return report.swapped[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", GROUPS)
def test_a_swapped_linear_holds_the_codes_scales_and_zero_points_of_the_checkpoint(name, state, dtype):
    library()
    codes, scale, zero_point = library_codes(name, dtype)
    model = compressed_net(name, state, dtype)
    swapped = only(prepare_(model))
    scheme = Scheme.parse(GROUPS[name][2])
    fc = model.fc
    assert isinstance(fc, QuantizedLinear) and fc.scheme == scheme and swapped.scheme == str(scheme)
    shift = 8 if zero_point is not None and scheme.weight.dtype in INT4_DTYPES else 0
    ours = unpack_int4(fc.weight, scheme.weight.dtype) if scheme.weight.dtype in INT4_DTYPES else fc.weight
    assert torch.equal(ours.double(), codes.double() + shift)
    assert torch.equal(fc.weight_scale.flatten().double(), scale.flatten().double())
    assert (fc.weight_zero_point is None) == scheme.weight.symmetric
    if fc.weight_zero_point is not None:
        assert torch.equal(fc.weight_zero_point.flatten().double(), zero_point.flatten().double() + shift)
    assert (fc.input_scale is None) == (scheme.weight_only or scheme.activation.dynamic)
    assert (fc.input_zero_point is None) == (fc.input_scale is None or scheme.activation.symmetric)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPS)
def test_a_swapped_model_is_the_old_one_but_for_the_order_of_sums(name, dtype, bias, rank):
    model = compressed_net(name, "after_first_forward", dtype, bias)
    x = ordinary(dtype, rank)
    before = model(x)
    swapped = only(prepare_(model))
    after = model(x)
    assert after.shape == before.shape and (swapped.numerics, swapped.note) == ("reassociated", "")
    assert_within(after, before, Numerics.REASSOCIATED)
    # In norm, where rounding averages and one wrong code would show.
    most = 5e-7 if dtype is torch.float32 else 6e-3
    assert ((after - before).double().norm() / before.double().norm()).item() < most


HOSTILE = ("ordinary", "hostile", "huge", "tiny", "zeros", "one_sided", "nan", "infinite")


def hostile(kind: str, dtype: torch.dtype, rank: int) -> Tensor:
    """``[.., K]`` of the rank, from inputs whose scales are ordinary to such whose scales are zero, NaN or infinite."""
    torch.manual_seed(rank)
    x = inputs(torch.float32, 2)[:24]
    if kind == "ordinary":
        x = x.clamp(-4, 4.2)
    elif kind in ("huge", "tiny"):
        x *= (torch.finfo(dtype).max / 4 / x.abs().max()) if kind == "huge" else 1e-38
    elif kind == "zeros":
        x.zero_()
    elif kind == "one_sided":
        x = x.abs() + 1
    elif kind in ("nan", "infinite"):
        x[5, 3] = torch.nan if kind == "nan" else torch.inf
    shape = {1: (-1,), 2: (24, K), 3: (4, 6, K), 4: (2, 3, 4, K)}[rank]
    return (x[7] if rank == 1 else x).to(dtype).reshape(shape)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", [name for name, (_, activation, _) in GROUPS.items() if activation is not None])
def test_activations_get_the_codes_and_scales_of_compressed_tensors_bit_for_bit(name, dtype, kind, rank):
    """Against the functions that the library's own forward calls."""
    library()
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    model = compressed_net(name, "frozen", dtype)
    fc, x = model.fc, hostile(kind, dtype, rank)
    spec = fc.quantization_scheme.input_activations
    if spec.dynamic:
        scale, zero_point = compute_dynamic_scales_and_zp(x, spec, fc)
    else:
        scale, zero_point = fc.input_scale.data, getattr(fc, "input_zero_point", None)
    only(prepare_(model))
    quantizer, activation = model.fc.quantizer, model.fc.scheme.activation
    codes, found, offset = quantizer(x, model.fc.input_scale, model.fc.input_zero_point)
    assert codes.dtype is activation.dtype and codes.shape == x.shape
    torch.testing.assert_close(found.float().flatten(), scale.float().flatten(), rtol=0, atol=0, equal_nan=True)
    assert found.dtype is (dtype if spec.dynamic else torch.float32) and (offset is None) == spec.symmetric
    wide = found.float().unsqueeze(-1) if spec.strategy == "group" else found.float()
    known = scale.isfinite().reshape(found.shape)
    if offset is not None:
        # Of zeros the library casts 0 / 0 to int8, which is whatever the processor makes of it.
        known = known & ((x != 0).any() if scale.numel() == 1 else (x != 0).flatten(2).any(-1).reshape(found.shape))
        wanted = zero_point.int().reshape(offset.shape)
        assert torch.equal(offset[known], wanted[known])
    known = known.unsqueeze(-1) if spec.strategy == "group" else known
    grouped = x.unflatten(-1, (-1, 128)) if spec.strategy == "group" else x
    known = known.expand(grouped.shape).reshape(x.shape) & x.isfinite()
    theirs = quantize(x, scale, zero_point, spec, activation.dtype)
    assert torch.equal(codes.float()[known], theirs.float()[known])
    if kind in ("nan", "infinite") and not spec.dynamic:
        return
    # What the codes stand for, the unknown ones too.
    stands_for = codes.float().reshape(grouped.shape) - (0 if offset is None else offset)
    ours = (stands_for.to(dtype) * wide.to(dtype)).reshape(x.shape)
    torch.testing.assert_close(ours, fake_quantize(x, scale, zero_point, spec), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["nan", "infinite"])
@pytest.mark.parametrize("name", ["int8_dynamic", "int8_dynamic_asymmetric", "float8_dynamic", "float8_block"])
def test_values_that_are_not_finite_spoil_the_rows_that_they_spoil_in_the_library(name, kind):
    model = compressed_net(name, "after_first_forward", torch.float32)
    x = hostile(kind, torch.float32, 3)
    before = model(x)
    only(prepare_(model))
    after = model(x)
    assert before.isnan().any() and not before.isnan().all()
    assert torch.equal(after.isnan(), before.isnan()) and after[~after.isnan()].isfinite().all()


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("int8_dynamic", (1, 2, 3)),
        ("int8_dynamic_asymmetric", (1,)),  # rank 3 is below, as of the next
        ("float8_dynamic", (2,)),
        ("float8_block", (1, 2, 3)),
    ],
)
def test_a_swapped_linear_is_rewritten_and_computes_as_eagerly(name, ranks, op_by_op):
    model = compressed_net(name, "frozen")
    prepare_(model)
    inputs = {rank: hostile("ordinary", torch.float32, rank) for rank in ranks}

    class OfEachRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, *inputs):
            return tuple(self.net(x) for x in inputs)

    whole = OfEachRank()
    found = fx_quant.explain(whole, *inputs.values())
    assert (len(found.sites), len(found.misses), found.graph_breaks) == (len(ranks), 0, 0), str(found)
    outs = torch.compile(whole, backend="fx_quant", fullgraph=True)(*inputs.values())
    for (rank, x), out in zip(inputs.items(), outs, strict=True):
        try:
            assert_within(out, model(x), Numerics.REASSOCIATED)
        except AssertionError as error:
            raise AssertionError(f"rank {rank}: {error}") from None


@pytest.mark.parametrize("state", ["frozen", "compressed"])
@pytest.mark.parametrize("name", GROUPS)
def test_other_states_compute_the_same_bits(name, state):
    library()
    models = [compressed_net(name, each) for each in (state, "after_first_forward")]
    for model in models:
        only(prepare_(model))
    x = inputs(torch.float32)
    assert torch.equal(models[0](x), models[1](x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPS)
def test_a_swapped_linear_multiplies_what_its_codes_stand_for(name, dtype):
    """Against float64: codes of the library, codes of the activation by its quantizer, products summed exactly."""
    codes, scale, zero_point = library_codes(name, dtype)
    rows, columns = {"group": (1, GROUPS[name][0].get("group_size")), "block": (128, 128)}.get(
        GROUPS[name][0]["strategy"], (1, K)
    )

    def spread(v: Tensor, over: tuple[int, int]) -> Tensor:
        v = v.double().reshape(-1, v.shape[-1]) if v.dim() == 2 else v.double().reshape(1, 1).expand(N, 1)
        return v.repeat_interleave(over[0], 0).repeat_interleave(over[1], 1)[:N, :K]

    weight = codes.double() - (0 if zero_point is None else spread(zero_point, (rows, columns)))
    weight = weight * spread(scale, (rows, columns))
    model = compressed_net(name, "after_first_forward", dtype)
    bias = model.fc.bias.double()
    prepare_(model)
    x, spec = inputs(dtype), model.fc.scheme.activation
    a = x.reshape(-1, K)
    if not model.fc.scheme.weight_only:
        qa, sa, za = quantize_by(model.fc.quantizer, x, spec, model.fc.input_scale, model.fc.input_zero_point)
        sa = sa.double().repeat_interleave(128, 1) if spec.group else sa.double()
        a = (qa.double() - (0 if za is None else za.double())) * sa
    expected = (a.double() @ weight.t() + bias).reshape(3, 11, N)
    terms = (a.double().abs() @ weight.abs().t()).max().item()
    assert_within(model(x), expected.to(dtype), Numerics.REASSOCIATED, terms)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", ["int8_dynamic", "w8a16_asymmetric", "w4a16_asymmetric", "float8_dynamic"])
def test_every_code_is_recovered_from_a_decompressed_weight(name, dtype):
    """All codes a row can have, under scales of every magnitude, survive rounding to the model's dtype."""
    model = compressed_net(name, "decompressed", dtype)
    fc, spec = model.fc, GROUPS[name][0]
    with torch.no_grad():
        fc.weight_scale.copy_(torch.rand(fc.weight_scale.shape).add(0.5) * 2.0 ** torch.randint(-5, 3, (N, 1)))
        scale = fc.weight_scale.repeat_interleave(K // fc.weight_scale.shape[1], 1)
        if spec["type"] == "float":
            every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
            codes = every.to(dtype).nan_to_num(0.0)[torch.arange(N * K).reshape(N, K) % 256]
        else:
            low = -(2 ** (spec["num_bits"] - 1))
            codes = (torch.arange(N * K).reshape(N, K) % -(2 * low) + low).to(dtype)
        if not spec["symmetric"]:
            fc.weight_zero_point.copy_(torch.randint(low, -low, fc.weight_zero_point.shape))
            codes = codes - fc.weight_zero_point.to(dtype).repeat_interleave(K // fc.weight_scale.shape[1], 1)
        fc.weight.copy_(codes * scale)
    dense = fc.weight.clone()
    only(prepare_(model))
    assert torch.equal(decoded_weight(model.fc).to(dtype), dense)


@pytest.mark.parametrize("name", ["int8_dynamic", "int8_dynamic_asymmetric", "float8_dynamic"])
def test_a_compiled_bfloat16_formula_rounds_as_eagerly_where_casts_are_kept(name):
    import torch._inductor.config as inductor_config

    model = compressed_net(name, "after_first_forward", torch.bfloat16)
    x = ordinary(torch.bfloat16, 3)
    before = model(x)
    prepare_(model)
    with inductor_config.patch(emulate_precision_casts=True):
        after = torch.compile(model, backend="fx_quant", fullgraph=True)(x)
    assert_within(after, before, Numerics.REASSOCIATED)


@pytest.mark.parametrize("rank", [2, 3])
def test_zero_points_in_bfloat16_are_rounded_where_the_library_rounds_them(rank):
    """Of one scale for all they are rounded from float32, of a scale for each token from bfloat16: seldom another."""
    library()
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from fx_quant.loading.adapters.compressed_tensors import quantize_activation

    spec = QuantizationArgs(**args(**{**TOKEN, "symmetric": False}))
    activation = Scheme.parse(GROUPS["int8_dynamic_asymmetric"][2]).activation
    torch.manual_seed(0)
    for _ in range(500):
        x = (torch.randn(4, 8) + 2 * torch.randn(1)).bfloat16()
        x = x if rank == 2 else x.unsqueeze(0)
        scale, zero_point = compute_dynamic_scales_and_zp(x, spec, nn.Identity())
        _, found, offset = quantize_activation(x, None, None, spec=activation)
        assert torch.equal(found.flatten(), scale.flatten())
        assert torch.equal(offset.flatten(), zero_point.int().flatten())


def test_a_weight_that_is_not_codes_times_scale_is_left():
    model = compressed_net("w4a16", "decompressed")
    with torch.no_grad():
        model.fc.weight[0, 0] += 1e-4
    before, x = type(model.fc._parameters), ordinary(torch.float32, 3)
    y = model(x)
    report = prepare_(model)
    assert not report.swapped
    assert "its weight must be its codes times their scale, but 1 of 25600 values are not" in report.left[0].reason
    assert type(model.fc) is nn.Linear and type(model.fc._parameters) is before and torch.equal(model(x), y)


def test_a_model_cast_after_decompression_is_left():
    model = compressed_net("int8_dynamic", "decompressed").to(torch.bfloat16)
    (left,) = prepare_(model).left
    assert "was changed or cast after quantization" in left.reason


def test_offloading_wrappers_and_the_decompression_hook_are_removed():
    model = nn.Sequential(Net(), nn.LayerNorm(N))
    in_state(apply_scheme(model, "int8_dynamic"), "after_first_forward")
    wrapped = [m for m in model.modules() if hasattr(m, "_original_forward_func")]
    assert wrapped == [model[0].fc, model[1]]
    prepare_(model)
    for module in model.modules():
        assert type(module._parameters) is dict and type(module._buffers) is dict
        assert not hasattr(module, "_original_forward_func") and "forward" not in vars(module)

    model = compressed_net("w4a16", "compressed")
    assert len(model._forward_pre_hooks) == 1
    prepare_(model)
    assert not model._forward_pre_hooks and not hasattr(model, "ct_decompress_hook")


def test_what_the_filter_leaves_compressed_still_runs():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return apply_scheme(nn.ModuleDict({"a": Net(seed=1), "b": Net(seed=2)}), "w4a16")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = build()

        def forward(self, x: Tensor) -> Tensor:
            return self.nets["a"](x) + self.nets["b"](x)

    x = ordinary(torch.float32, 3)
    expected = in_state(Both(), "after_first_forward")(x)
    model = in_state(Both(), "compressed")
    report = prepare_(model, filter=lambda name, module: name == "nets.a.fc")
    assert [swapped.module for swapped in report.swapped] == ["nets.a.fc"]
    assert [(left.module, left.reason) for left in report.left] == [("nets.b.fc", "the filter left it out")]
    assert_within(model(x), expected, Numerics.REASSOCIATED)
    report = prepare_(model)
    assert [swapped.module for swapped in report.swapped] == ["nets.b.fc"] and report.already == 1
    assert_within(model(x), expected, Numerics.REASSOCIATED)


def hook(*_: Any) -> None:
    return None


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def change(fc: Any, how: str) -> None:
    """Something of the user's on a quantized module."""
    if how == "forward_hook":
        fc.register_forward_hook(hook)
    elif how == "forward_pre_hook":
        fc.register_forward_pre_hook(hook)
    elif how == "backward_hook":
        fc.register_full_backward_hook(hook)
    elif how == "state_dict_hook":
        fc.register_state_dict_post_hook(hook)
    elif how == "load_hook":
        fc.register_load_state_dict_post_hook(hook)
    elif how == "parametrization":
        parametrize.register_parametrization(fc, "bias", Doubled())
    elif how == "forward":
        inner = fc.forward
        fc.forward = lambda x: 2 * inner(x)
    elif how == "forward_removed":
        del fc.forward
    elif how == "no_scale":
        del fc.weight_scale
    elif how == "submodule":
        fc.observer = nn.Identity()
    elif how == "switched_off":
        fc.quantization_enabled = False
    elif how == "calibrating":
        from compressed_tensors.quantization import QuantizationStatus

        fc.quantization_status = QuantizationStatus.CALIBRATION
    elif how == "meta":
        fc.to("meta")
    elif how == "nan_scale":
        fc.weight_scale.data[0] = torch.nan


REASONS = {
    "forward_hook": "must have no hooks, which a swap would lose, got forward_hooks",
    "forward_pre_hook": "got forward_pre_hooks",
    "backward_hook": "got backward_hooks",
    "state_dict_hook": "got state_dict_hooks",
    "load_hook": "got load_state_dict_post_hooks",
    "parametrization": "must have no parametrization",
    "forward": "its forward must be that of compressed-tensors around nn.Linear",
    "forward_removed": "must be that of compressed-tensors around nn.Linear's, got torch.nn.modules.linear;",
    "no_scale": "it must have weight and weight_scale, got bias, input_scale, input_zero_point, weight",
    "submodule": "must hold no submodules, got observer",
    "switched_off": "quantization_enabled=False",
    "calibrating": "got calibration; end calibration first",
    "meta": "got some on the meta device",
    "nan_scale": "weight_scale must be finite and positive, got nan",
}


@pytest.mark.parametrize("how", REASONS)
def test_what_is_not_the_librarys_own_is_never_lost(how):
    model = compressed_net("int8_static", "frozen")
    change(model.fc, how)
    fc, kept = model.fc, dict(vars(model.fc))
    for report in (prepare_(model), prepare_(model)):
        assert not report.swapped and REASONS[how] in report.left[0].reason
        assert "\n" not in report.left[0].reason
        assert model.fc is fc and vars(fc).keys() == kept.keys()
    if how not in ("nan_scale", "no_scale"):  # the others are seen without looking at tensors
        assert needs_prepare(model) is None


def test_an_offloaded_module_is_left():
    model = compressed_net("int8_dynamic", "after_first_forward")
    model.fc._parameters.onload_device = "cuda:0"
    (left,) = prepare_(model).left
    assert left.reason == (
        "its parameters must live where they are used, got them offloaded from cuda:0 to cpu; load the model without "
        "offloading"
    )


def test_wrappers_of_a_model_on_several_devices_stay_with_a_note():
    model = nn.Sequential(Net(), nn.LayerNorm(N))
    in_state(apply_scheme(model, "int8_dynamic"), "after_first_forward")
    model[1]._parameters.onload_device = "cuda:0"
    report = prepare_(model)
    assert len(report.swapped) == 1 and "spread over cpu, cuda:0" in report.notes[0]
    assert report.notes[0] in " ".join(str(report).split())
    assert hasattr(model[1], "_original_forward_func")


def test_modules_that_are_not_plain_linears_are_left():
    library()
    from compressed_tensors.quantization import QuantizationScheme

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {"scaled": Scaled(8, 8), "embedding": nn.Embedding(8, 8), "attention": nn.MultiheadAttention(8, 2)}
    )
    for module in (model["scaled"], model["embedding"], model["attention"].out_proj):
        module.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=INT8)
    report = prepare_(model)
    assert not report.swapped
    assert [(left.module, left.from_class) for left in report.left] == [
        ("scaled", "Scaled"),
        ("embedding", "Embedding"),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear"),
    ]
    assert all("it must compute as nn.Linear does" in left.reason for left in report.left)


@pytest.mark.parametrize(
    ("preset", "reason"),
    [("NVFP4", "mxfp4, mxfp8 or nvfp4"), ("MXFP4", "mxfp4")],
)
def test_schemes_without_a_kernel_are_left(preset, reason):
    library()
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    model = Net()
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])}, quantization_status="frozen"
    )
    apply_quantization_config(model, config, show_progress=False)
    (left,) = prepare_(model).left
    assert reason in left.reason and left.scheme.startswith("4-bit")


def test_a_linear_that_no_kernel_of_the_machine_can_run_is_left(monkeypatch):
    from fx_quant.kernels.registry import kernels

    model = compressed_net("int8_dynamic", "frozen")
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", ",".join(kernel.name for kernel in kernels()))
    (left,) = prepare_(model).left
    assert left.reason.startswith("no kernel can run int8 per_token (dynamic) x int8 per_channel")


def test_tied_modules_are_swapped_once_and_stay_tied():
    net = Net()
    model = apply_scheme(nn.ModuleDict({"a": net, "b": net, "c": nn.Sequential(net.fc)}), "w8a16")
    swapped = only(prepare_(model))
    assert (swapped.module, swapped.tied) == ("a.fc", ("b.fc", "c.0"))
    assert model["a"].fc is model["b"].fc is model["c"][0] and isinstance(model["c"][0], QuantizedLinear)


def test_a_weight_of_two_modules_is_left_to_both():
    model = nn.ModuleDict({"embedding": nn.Embedding(N, K), "head": nn.Linear(K, N, bias=False)})
    model["head"].weight = model["embedding"].weight
    apply_scheme(model, "w8a16")
    report = prepare_(model)
    assert report.left[0].reason == "its weight must be its own, but it is that of embedding too; untie them first"
    assert model["head"].weight is model["embedding"].weight
    assert needs_prepare(model) is None


@pytest.mark.parametrize("state", STATES)
def test_a_state_dict_fits_another_prepared_copy(state):
    library()
    source, copy_ = compressed_net("w4a16_asymmetric", state), compressed_net("w4a16_asymmetric", "frozen", seed=1)
    prepare_(source)
    prepare_(copy_)
    x = inputs(torch.float32)
    assert not torch.equal(source(x), copy_(x))
    copy_.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source(x), copy_(x))
    assert torch.equal(copy.deepcopy(source)(x), source(x))


def test_a_prepared_encoder_layer_calls_its_linears():
    """The fast path of nn.TransformerEncoderLayer reads the weights, which are codes now, without calling anything."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval().requires_grad_(False)
    apply_scheme(layer, "w8a16", ignore=("re:.*out_proj",))
    x = torch.randn(2, 5, 64)
    layer.activation_relu_or_gelu = 0
    expected = layer(x)
    layer.activation_relu_or_gelu = 1
    report = prepare_(layer)
    assert {swapped.module for swapped in report.swapped} == {"linear1", "linear2"}
    assert_within(layer(x), expected, Numerics.REASSOCIATED)


# --- a whole model ------------------------------------------------------------------------------------------------


def llama(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval().to(dtype).requires_grad_(False)


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(24).reshape(2, 12) * 7 % 96, "use_cache": False}


def saved(name: str, directory: Any) -> None:
    """A checkpoint by compressed-tensors, as llm-compressor saves it."""
    from compressed_tensors.compressors import ModelCompressor

    model = apply_scheme(llama(), name)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)


@pytest.mark.parametrize("name", ["int8_dynamic", "float8_static", "w4a16"])
def test_a_llama_from_a_checkpoint_compiles_to_one_graph_with_every_linear_rewritten(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    saved(name, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        before = model(**tokens()).logits
    broken = fx_quant.explain(model.model.layers[0].mlp, torch.zeros(1, 2, model.config.hidden_size).bfloat16())
    assert not broken.sites and broken.graph_breaks > 0
    assert needs_prepare(model) == (
        "7 modules of compressed-tensors break the graph: fx_quant.prepare_(model) swaps them for QuantizedLinear"
    )
    unused = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    report = prepare_(model)
    assert prepare_(unused).swapped == report.swapped
    assert report.summary() == "7 of 7 quantized modules swapped for QuantizedLinear, 0 left"
    assert needs_prepare(model) is None
    with torch.no_grad():
        after = model(**tokens()).logits
    # bfloat16 itself moves the logits by 1e-2; codes that tip move them further.
    assert ((after.double() - before.double()).norm() / before.double().norm()).item() < 8e-2
    found = fx_quant.explain(model, **tokens())
    assert (len(found.sites), len(found.misses), found.graphs, found.graph_breaks) == (7, 0, 1, 0)
    with torch.no_grad():
        assert torch.equal(unused(**tokens()).logits, after)
    assert {site.module for site in found.sites} == {swapped.module for swapped in report.swapped}


def test_the_graph_of_a_prepared_llama_runs_as_it_does_eagerly(tmp_path, op_by_op):
    library()
    model = in_state(apply_scheme(llama(torch.float32), "w8a16"), "frozen")
    prepare_(model)
    with torch.no_grad():
        eager = model(**tokens()).logits
        compiled = torch.compile(model, backend="fx_quant", fullgraph=True)(**tokens()).logits
    assert ((compiled - eager).norm() / eager.norm()).item() < 1e-5


# --- torch.ao -----------------------------------------------------------------------------------------------------


def quantize_dynamic(model: nn.Module, qconfig: str, mode: str) -> nn.Module:
    import torch.ao.quantization as quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mode == "eager":
            return quantization.quantize_dynamic(model, {nn.Linear: getattr(quantization, qconfig)})
        from torch.ao.quantization import quantize_fx

        mapping = quantization.QConfigMapping().set_global(getattr(quantization, qconfig))
        return quantize_fx.convert_fx(quantize_fx.prepare_fx(model, mapping, (torch.zeros(1, K),)))


@pytest.mark.parametrize("mode", ["eager", "fx"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qconfig", ["default_dynamic_qconfig", "per_channel_dynamic_qconfig"])
def test_a_dynamic_linear_of_torch_ao_keeps_its_codes_and_its_results(qconfig, bias, mode):
    model = quantize_dynamic(Net(bias=bias), qconfig, mode)
    weight, _ = model.fc._weight_bias()
    for rank in (2, 3):
        x = inputs(torch.float32, rank)
        before = model(x)
        prepared = copy.deepcopy(model)
        swapped = only(prepare_(prepared))
        after = prepared(x)
        assert swapped.from_class == "Linear" and swapped.library == "torch.ao"
        assert (swapped.numerics, swapped.note) == ("reassociated", "")
        assert_within(after, before, Numerics.REASSOCIATED)
    kind = "per_tensor" if qconfig == "default_dynamic_qconfig" else "per_channel"
    assert swapped.scheme == f"int8 per_tensor asymmetric (dynamic) x int8 {kind}"
    assert torch.equal(prepared.fc.weight, weight.int_repr())
    assert torch.equal(decoded_weight(prepared.fc), weight.dequantize())


ENGINES = [
    each for each in ("fbgemm", "x86", "onednn", "qnnpack") if each in torch.backends.quantized.supported_engines
]


def under_engine(engine: str, make: Any) -> Any:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        return make()
    finally:
        torch.backends.quantized.engine = before


def how_added(engine: str) -> str:
    if engine == "onednn":
        return "apart"
    return "fused" if torch.torch_version.TorchVersion(torch.__version__) < (2, 14) else "last"


def halfway(k: int, steps: int, scale: float, zero_point: int) -> Tensor:
    """Values halfway between codes, and the ends of their range: what engines round differently."""
    x = (torch.randint(0, steps, (33, k)) - zero_point + 0.5) * scale
    x[0, 0], x[-1, -1] = -zero_point * scale, (steps - zero_point) * scale
    return x


@pytest.mark.parametrize("reduce_range", [True, False])
@pytest.mark.parametrize("k", [3, 61, 64])
@pytest.mark.parametrize("engine", ENGINES)
def test_activations_get_the_codes_of_the_engine_bit_for_bit(engine, k, reduce_range):
    """Its linear with the identity for a weight gives the codes back."""
    from fx_quant.loading.adapters.torch_ao import quantize_activation

    steps = 127 if reduce_range and engine != "qnnpack" else 255
    eye = torch.quantize_per_tensor(torch.eye(k), 1.0, 0, torch.qint8)
    packed = under_engine(engine, lambda: torch.ops.quantized.linear_prepack(eye, torch.zeros(k)))
    torch.manual_seed(k)
    cases = [halfway(k, steps, scale, z) for scale in (1e-5, 0.0371, 3.3e4) for z in (0, 1, steps // 2, steps)]
    cases += [torch.randn(33, k), torch.zeros(2, k), torch.randn(33, k) * 1e-40, torch.randn(33, k) * 1e37]
    for x in cases:
        y = torch.ops.quantized.linear_dynamic(x, packed, reduce_range=reduce_range)
        codes, scale, zero_point = quantize_activation(x, None, None, steps=steps, adds=how_added(engine))
        expected, point = torch._choose_qparams_per_tensor(x, steps == 127)
        assert zero_point.item() == point - 128
        torch.testing.assert_close(
            scale.double().item(), expected, rtol=2**-24 if engine != "onednn" else 2**-22, atol=0
        )
        assert torch.equal(codes.float() - zero_point, (y / scale).round())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_linear_keeps_the_formula_of_the_engine_that_it_was_made_under(engine):
    qconfig = "default_dynamic_qconfig" if engine == "qnnpack" else "per_channel_dynamic_qconfig"
    model = under_engine(engine, lambda: quantize_dynamic(Net(), qconfig, "eager"))
    x = halfway(K, 255 if engine == "qnnpack" else 127, 0.0371, 50)
    before = model(x)
    assert only(prepare_(model)).numerics == "reassociated"
    assert_within(model(x), before, Numerics.REASSOCIATED)
    assert model.fc.quantizer.keywords == {"steps": 255 if engine == "qnnpack" else 127, "adds": how_added(engine)}


def test_a_linear_of_an_engine_that_no_formula_fits_is_approximate_with_a_note(monkeypatch):
    from fx_quant.loading.adapters import torch_ao

    model = quantize_dynamic(Net(), "per_channel_dynamic_qconfig", "eager")
    x = ordinary(torch.float32, 3)
    before = model(x)
    monkeypatch.setattr(torch_ao, "_ENGINES", ({"steps": 200, "adds": "fused"},))
    swapped = only(prepare_(model))
    assert (swapped.numerics, model.fc.quantizer) == ("approximate", None)
    assert swapped.note == "activations are quantized by a formula that fx_quant does not know"
    assert_within(model(x), before, Numerics.APPROXIMATE)


def test_a_dynamic_model_of_torch_ao_compiles_to_one_graph():
    model = nn.Sequential(Net(), nn.GELU(), nn.Linear(N, 32)).eval()
    model = quantize_dynamic(model, "per_channel_dynamic_qconfig", "eager")
    x = ordinary(torch.float32, 3)
    assert needs_prepare(model) == (
        "2 modules of torch.ao break the graph: fx_quant.prepare_(model) swaps them for QuantizedLinear"
    )
    prepare_(model)
    found = fx_quant.explain(model, x)
    assert (len(found.sites), len(found.misses), found.graphs, found.graph_breaks) == (2, 0, 1, 0), str(found)
    compiled = torch.compile(model[0], backend="fx_quant", fullgraph=True)
    assert_within(compiled(x), model[0](x), Numerics.REASSOCIATED)


def test_what_torch_ao_has_besides_dynamic_int8_linears_is_left():
    import torch.ao.quantization as quantization
    from torch.ao.nn.intrinsic.quantized.dynamic import LinearReLU
    from torch.ao.nn.quantized import Linear
    from torch.ao.nn.quantized.dynamic import LSTM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.float16)
        shifted = nn.Sequential(quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})[0])
        codes = torch.quantize_per_tensor(torch.randn(8, 8), 0.05, 3, torch.qint8)
        shifted[0].set_weight_bias(codes, None)
        model = nn.ModuleDict(
            {"float16": half, "shifted": shifted, "static": Linear(8, 8), "lstm": LSTM(8, 8), "relu": LinearReLU(8, 8)}
        )
    report = prepare_(model)
    assert not report.swapped
    assert {left.module: left.reason.split(",")[0] for left in report.left} == {
        "float16.0": "its weight must be qint8 codes",
        "shifted.0": "its weight must be symmetric beside a quantized activation",
        "static": "it must take and return floats",
        "lstm": "it must be a dynamic Linear of torch.ao",
        "relu": "it must be a dynamic Linear of torch.ao",
    }


# --- optimum-quanto -----------------------------------------------------------------------------------------------


def quanto(weights: str, activations: str | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    oq = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = Net(dtype, **more)
    oq.quantize(model, weights=getattr(oq, weights), activations=getattr(oq, activations) if activations else None)
    if activations:
        with torch.no_grad(), oq.Calibration():
            model(ordinary(dtype, 3))
    oq.freeze(model)
    return model


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weights", "activations", "text"),
    [
        ("qint8", None, "bfloat16 x int8 per_channel"),
        ("qfloat8", None, "bfloat16 x float8_e4m3fn per_channel"),
        ("qfloat8_e5m2", None, "bfloat16 x float8_e5m2 per_channel"),
        ("qint8", "qint8", "int8 per_tensor (static) x int8 per_channel"),
        ("qfloat8", "qfloat8", "float8_e4m3fn per_tensor (static) x float8_e4m3fn per_channel"),
    ],
)
def test_a_quanto_linear_keeps_its_codes_and_its_results(weights, activations, text, dtype, bias, rank):
    model = quanto(weights, activations, dtype, bias=bias, zeros=False)
    codes, scale, x = model.fc.weight._data, model.fc.weight._scale, ordinary(dtype, rank)
    input_scale = model.fc.input_scale
    with torch.no_grad():
        before = model(x)
    swapped = only(prepare_(model))
    assert (swapped.scheme, swapped.numerics, swapped.note) == (text, "reassociated", "")
    assert torch.equal(model.fc.weight.double(), codes.double())
    assert torch.equal(model.fc.weight_scale.flatten(), scale.float().flatten())
    assert_within(model(x), before, Numerics.REASSOCIATED)
    if activations is not None:
        x = inputs(dtype, rank)
        wanted = torch.ops.quanto.quantize_symmetric(x, dtype=codes.dtype, axis=None, scale=input_scale)
        found = model.fc.quantizer(x, model.fc.input_scale, None)
        assert torch.equal(found[0].float(), wanted.float()) and found[1] == input_scale.float()


def test_a_row_of_zeros_which_quanto_gives_the_scale_0_stays_zeros():
    model = quanto("qint8", bias=False)
    x = ordinary(torch.float32, 3)
    before = model(x)
    only(prepare_(model))
    assert_within(model(x), before, Numerics.REASSOCIATED)
    assert not model(x)[..., 3].any() and model.fc.weight_scale[3] == 1
    (left,) = prepare_(quanto("qfloat8")).left
    assert "weight_scale must be finite and positive" in left.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [K, 64])
def test_a_4_bit_quanto_weight_is_swapped_where_its_shifts_are_zero_points(k, dtype):
    model = nn.Sequential(nn.Linear(k, 96, bias=False)).requires_grad_(False).to(dtype)
    group = 128 if k > 128 else k
    scale = 2.0 ** torch.randint(-6, -3, (96, k // group, 1))
    # -3 and 12 times the scale are the ends of every group: 15 steps, and 3 of them below 0.
    weight = (torch.randint(-3, 13, (96, k // group, group)).float() * scale).flatten(1)
    weight[:, ::group], weight[:, 1::group] = -3 * scale.squeeze(-1), 12 * scale.squeeze(-1)
    model[0].weight.copy_(weight)
    oq = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    oq.quantize(model, weights=oq.qint4)
    oq.freeze(model)
    dense, x = model[0].weight.dequantize(), torch.randn(2, 5, k).to(dtype)
    before = model(x)
    swapped = only(prepare_(model))
    assert swapped.scheme == f"bfloat16 x uint4 {'per_group(128)' if k > 128 else 'per_channel'} asymmetric"
    assert torch.equal(decoded_weight(model[0]).to(dtype), dense) and torch.equal(dense, weight.to(dtype))
    assert_within(model(x), before, Numerics.REASSOCIATED)


def test_what_quanto_has_that_cannot_be_swapped_is_left():
    oq = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    unfrozen = Net()
    oq.quantize(unfrozen, weights=oq.qint8)
    hands_on = Net(zeros=False)
    oq.quantize(hands_on, weights=oq.qint8, activations=oq.qint8)
    with torch.no_grad(), oq.Calibration(streamline=False):
        hands_on(ordinary(torch.float32, 3))
    oq.freeze(hands_on)
    convolution = nn.Sequential(nn.Conv2d(3, 3, 1))
    oq.quantize(convolution, weights=oq.qint8)
    hooked = quanto("qint8", "qint8", zeros=False)
    hooked.fc.register_forward_hook(hook)
    cases = {
        "its weight must be frozen": unfrozen,
        "its result must be floats, but it hands codes on": hands_on,
        "the shifts of its 4-bit weight must be whole multiples": quanto("qint4"),
        "its weight must have 8 bits, or 4 beside a float activation": quanto("qint2"),
        "a quantized activation must have the codes of the weight": quanto("qint8", "qfloat8"),
        "it must be a QLinear, got QConv2d": convolution,
        "it must have no hooks": hooked,
    }
    for reason, model in cases.items():
        assert needs_prepare(model) is None, reason
        report = prepare_(model)
        assert not report.swapped and report.left[0].reason.startswith(reason), str(report)


def test_a_swapped_quanto_linear_takes_the_codes_that_a_left_one_hands_on():
    oq = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = nn.Sequential(nn.Linear(K, 64), nn.Linear(64, 32)).requires_grad_(False).eval()
    oq.quantize(model, weights=oq.qint8, activations=oq.qint8)
    x = ordinary(torch.float32, 3)
    with torch.no_grad(), oq.Calibration(streamline=False):
        model(x)
    oq.freeze(model)
    model[1].disable_output_quantization()
    before = model(x)
    report = prepare_(model)
    assert [swapped.module for swapped in report.swapped] == ["1"] and len(report.left) == 1
    assert_within(model(x), before, Numerics.REASSOCIATED)


# --- the report ---------------------------------------------------------------------------------------------------


def test_a_second_call_swaps_nothing_and_says_so():
    model = nn.Sequential(*(compressed_net("w8a16", "frozen") for _ in range(3)))
    assert prepare_(model).summary() == "3 of 3 quantized modules swapped for QuantizedLinear, 0 left"
    linears = [net.fc for net in model]
    report = prepare_(model)
    assert report == PrepareReport(already=3)
    assert str(report) == "fx_quant: nothing to prepare: the model holds 3 QuantizedLinear already"
    assert [net.fc for net in model] == linears


def test_a_model_without_quantized_modules_has_an_empty_report():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 1, 1))
    report = prepare_(model)
    assert report == PrepareReport() and needs_prepare(model) is None
    assert " ".join(str(report).split()) == (
        "fx_quant: nothing to prepare: no quantized module of compressed-tensors, neural-compressor, optimum-quanto, "
        "torch.ao or transformers found"
    )


def test_the_report_prints_as_a_table_and_as_json():
    model = nn.ModuleDict({"layers": nn.ModuleList(compressed_net("w8a16", "frozen") for _ in range(2))})
    model["head"] = compressed_net("int8_dynamic", "frozen")
    model["last"] = compressed_net("int8_dynamic", "frozen")
    model["last"].fc.register_forward_hook(hook)
    report = prepare_(model)
    assert str(report) == GOLDEN
    assert json.loads(report.to_json())["left"][0]["module"] == "last.fc"


GOLDEN = """\
fx_quant: 3 of 4 quantized modules swapped for QuantizedLinear, 1 left

compressed-tensors, Linear, reassociated

module       modules  scheme
-----------  -------  -----------------------------
layers.*.fc  2        bf16 x int8 channel
head.fc      1        int8 token dyn x int8 channel

left:
  last.fc: compressed-tensors Linear (int8 per_token (dynamic) x int8
      per_channel): it must have no hooks, which a swap would lose, got
      forward_hooks; remove them first"""


def test_what_cannot_be_prepared_in_place_is_an_error_of_one_line():
    fc = compressed_net("w8a16", "frozen").fc
    with pytest.raises(ValueError, match=r"^prepare_ swaps the modules inside a model, got a Linear of compressed-"):
        prepare_(fc)
    with pytest.raises(ValueError, match=r"^prepare_ needs an nn.Module, got function$"):
        prepare_(hook)
    assert needs_prepare(hook) is None


def test_a_filter_that_raises_changes_nothing():
    model = nn.Sequential(compressed_net("w8a16", "frozen"), compressed_net("w8a16", "frozen"))
    before = list(model.modules())

    def broken(name: str, module: nn.Module) -> bool:
        if name == "1.fc":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        prepare_(model, filter=broken)
    assert list(model.modules()) == before


def test_the_libraries_are_not_imported_to_look_at_a_model(printed):
    found = printed(
        "import sys, torch, fx_quant\n"
        "from fx_quant.loading.prepare import needs_prepare\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "assert needs_prepare(model) is None and not fx_quant.prepare_(model).left\n"
        "print(*sorted({'compressed_tensors', 'optimum', 'transformers'} & set(sys.modules)))"
    )
    assert found.strip() == ""
