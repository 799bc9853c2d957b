"""``prepare_(model, release=True)``: what compiles as it is becomes held once, and computes what it did."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.nn.utils import parametrize

import fx_quant
from fx_quant import PrepareReport, QuantizedLinear, prepare_
from fx_quant.layers.activation import quantize_by
from fx_quant.loading.adapters.base import decoded_weight
from fx_quant.loading.prepare import needs_prepare
from fx_quant.scheme import Numerics
from tests.graphs import calls, capture
from tests.tolerances import assert_within

ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

K, N = 256, 96
DTYPES = (torch.float32, torch.bfloat16)
Made = tuple[Callable[[], Any], str]


def intx(config: str, dtype: torch.dtype, granularity: Any, **more: Any) -> Callable[[], Any]:
    dynamic = config.startswith("Int8Dynamic")
    names = ("weight_dtype", "weight_granularity") if dynamic else ("weight_dtype", "granularity")
    return lambda: getattr(ao, config)(**dict(zip(names, (dtype, granularity), strict=True)), **more)


def static(**more: Any) -> Any:
    scale = torch.full((1, 1, 1), 0.03)
    return ao.Int8StaticActivationInt8WeightConfig(
        act_quant_scale=scale, granularity=[ao.PerTensor(), ao.PerRow()], **more
    )


def float8_weights(granularity: str = "PerRow") -> Callable[[], Any]:
    return lambda: ao.Float8WeightOnlyConfig(granularity=getattr(ao, granularity)())


ASYMMETRIC = ao.MappingType.ASYMMETRIC
TOKEN, DA, WO = "int8 per_token asymmetric (dynamic)", "Int8DynamicActivationIntxWeightConfig", "IntxWeightOnlyConfig"
CONFIGS: Mapping[str, Made] = MappingProxyType(
    {
        "int8": (ao.Int8WeightOnlyConfig, "bfloat16 x int8 per_channel"),
        "int8_tensor": (lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()), "bfloat16 x int8 per_tensor"),
        "int8_group": (lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64)), "bfloat16 x int8 per_group(64)"),
        "dynamic": (
            ao.Int8DynamicActivationInt8WeightConfig,
            "int8 per_token (dynamic) x int8 per_channel",
        ),
        "dynamic_tensor": (
            lambda: ao.Int8DynamicActivationInt8WeightConfig(granularity=ao.PerTensor()),
            "int8 per_tensor (dynamic) x int8 per_tensor",
        ),
        "dynamic_reduced": (
            lambda: ao.Int8DynamicActivationInt8WeightConfig(reduce_range=True),
            "int8 per_token (dynamic) x int8 per_channel",
        ),
        "dynamic_asymmetric": (
            lambda: ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC),
            "int8 per_token asymmetric (dynamic) x int8 per_channel",
        ),
        "static": (static, "int8 per_tensor (static) x int8 per_channel"),
        "static_asymmetric": (
            lambda: static(
                act_mapping_type=ASYMMETRIC, act_quant_zero_point=torch.full((1, 1, 1), 5, dtype=torch.int8)
            ),
            "int8 per_tensor asymmetric (static) x int8 per_channel",
        ),
        "8da4w": (intx(DA, torch.int4, ao.PerGroup(32)), f"{TOKEN} x int4 per_group(32)"),
        "8da4w_asymmetric": (
            intx(DA, torch.int4, ao.PerGroup(32), weight_mapping_type=ASYMMETRIC),
            f"{TOKEN} x int4 per_group(32) asymmetric",
        ),
        "8da4w_channel": (intx(DA, torch.int4, ao.PerAxis(0)), f"{TOKEN} x int4 per_channel"),
        "8da8w": (intx(DA, torch.int8, ao.PerAxis(0)), f"{TOKEN} x int8 per_channel"),
        "int4": (intx(WO, torch.int4, ao.PerGroup(32)), "bfloat16 x int4 per_group(32)"),
        "int4_asymmetric": (
            intx(WO, torch.int4, ao.PerGroup(32), mapping_type=ASYMMETRIC),
            "bfloat16 x int4 per_group(32) asymmetric",
        ),
        "int3": (intx(WO, torch.int3, ao.PerGroup(64)), "bfloat16 x int4 per_group(64)"),
        "float8": (float8_weights(), "bfloat16 x float8_e4m3fn per_channel"),
        "float8_tensor": (float8_weights("PerTensor"), "bfloat16 x float8_e4m3fn per_tensor"),
        "int6": (intx(WO, torch.int6, ao.PerGroup(64)), "bfloat16 x int8 per_group(64)"),
    }
)
FLOAT32_ONLY = ("dynamic_asymmetric", "static_asymmetric")
CASES = [(name, dtype) for name in CONFIGS for dtype in DTYPES if dtype is torch.float32 or name not in FLOAT32_ONLY]
DYNAMIC = [case for case in CASES if "int8 per_t" in CONFIGS[case[0]][1].split(" x ")[0]]


def quantized(config: Any, dtype: torch.dtype = torch.float32, *linears: nn.Module, bias: bool = True) -> nn.Sequential:
    """``linears``, or one, quantized by torchao; Inductor's options stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(*(linears or (nn.Linear(K, N, bias=bias),))).to(dtype).eval()
    if hasattr(config, "set_inductor_config"):
        config.set_inductor_config = False
    ao.quantize_(model, config)
    return model


def of(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Sequential:
    return quantized(CONFIGS[name][0](), dtype, **more)


def inputs(dtype: torch.dtype, rank: int = 3) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 5, K) * torch.tensor([[1.0], [10.0], [1e-3], [0.0], [3.0]])
    x[0, 0, 3] = -40
    return (x if rank == 3 else x.flatten(0, 1)).to(dtype)


def released(model: nn.Module) -> PrepareReport:
    report = prepare_(model, release=True)
    assert not report.left and not report.notes, report
    return report


# --- what is swapped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_released_linear_is_torchaos_but_for_the_order_of_sums(name, dtype, bias):
    model, x = of(name, dtype, bias=bias), inputs(dtype)
    before, weight = model(x), model[0].weight.dequantize()
    (swapped,) = released(model).swapped
    assert (swapped.library, swapped.from_class, swapped.scheme) == ("torchao", "Linear", CONFIGS[name][1])
    assert (swapped.numerics, swapped.note) == ("reassociated", "")
    # In bfloat16 the library multiplies sums of int8 codes with scales that are rounded.
    rounded = dtype is torch.bfloat16 and name in ("int8", "int8_tensor")
    assert_within(decoded_weight(model[0]).to(dtype), weight, Numerics.SAME_ACCUM if rounded else Numerics.EXACT)
    terms = (x.double().abs() @ weight.double().abs().t()).max()
    assert_within(model(x), before, Numerics.REASSOCIATED, terms=float(terms) if dtype is torch.bfloat16 else 0.0)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_released_weight_is_held_once_and_the_librarys_is_freed(name, dtype):
    model = of(name, dtype)
    # qdata, scale and zero_point, each in a storage of its own.
    weight = model[0].weight
    theirs = [x for x in (weight.qdata, weight.scale, getattr(weight, "zero_point", None)) if x is not None]
    sizes = [x.untyped_storage().nbytes() for x in theirs]
    del weight, theirs
    report = released(model)
    # A float32 scale may be taken as it is.
    assert max(sizes[0], sum(sizes) - model[0].weight_scale.nbytes) <= report.freed <= sum(sizes) + 16
    _, held = model[0].held_weight()
    assert held is not None and model[0].packed_weight.nbytes <= N * K * 1.4  # panels are of 64 rows


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(("name", "dtype"), DYNAMIC)
def test_activations_get_torchaos_values_bit_for_bit(name, dtype, rank):
    model, x = of(name, dtype), inputs(dtype, rank if "static" not in name else 3)
    weight = model[0].weight
    if type(weight).__name__ == "Int8Tensor":
        from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor as quantize

        given = quantize(x, weight.act_quant_kwargs, weight.act_quant_scale, weight.act_quant_zero_point)
        wanted = given.dequantize()
    else:
        from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as home

        wanted = home._apply_int8_act_asym_per_token_quant_dequant(x)
    del weight
    released(model)
    linear = model[0]
    codes, scale, zero_point = linear.quantizer(x, linear.input_scale, linear.input_zero_point)
    shifted = codes.to(dtype) if zero_point is None else codes.to(dtype) - zero_point.to(dtype)
    assert torch.equal((shifted * scale).to(dtype), wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["dynamic", "8da4w"])
def test_values_that_are_not_finite_spoil_the_rows_that_they_spoil_in_the_library(name, bad):
    model, x = of(name), inputs(torch.float32)
    x[1, 2, 7] = bad
    before = model(x)
    released(model)
    assert torch.equal(model(x).isfinite(), before.isfinite()) and not before[1, 2].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "dynamic", "dynamic_asymmetric", "static", "8da4w", "int4_asymmetric"])
def test_a_compiled_released_model_is_rewritten_and_reads_the_one_copy(name):
    model = of(name)
    before = fx_quant.explain(model, inputs(torch.float32))
    assert before.held_twice == before.releasable == N * K
    report = released(model)
    assert report.freed >= before.releasable
    after = fx_quant.explain(model, inputs(torch.float32))
    assert len(after.sites) == 1 and not after.misses and not after.recognised
    assert (after.held_twice, after.releasable, after.note) == (0, 0, "")
    x = inputs(torch.float32)
    (captured,) = capture(model, x)
    graph = captured.state.graph
    assert not calls(graph, torch.ops.fx_quant.unpack.default) and model[0].held_weight()[1] is not None
    out = Interpreter(GraphModule(nn.Module(), graph)).run(*captured.inputs)
    assert_within(out[0] if isinstance(out, (list, tuple)) else out, model(x), Numerics.REASSOCIATED)


def test_copies_and_pickles_of_a_released_model_compute_the_same():
    model, x = of("8da4w"), inputs(torch.float32)
    released(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_modes_names_and_trees_stay_as_they_were():
    model = quantized(CONFIGS["dynamic"][0](), torch.float32, nn.Linear(K, K), nn.ReLU())
    model.append(nn.Sequential(model[0]))
    model[0].train()
    report = released(model)
    assert [(row.module, row.tied) for row in report.swapped] == [("0", ("2.0",))]
    assert model[0] is model[2][0] and model[0].training and not model[1].training
    assert prepare_(model, release=True) == PrepareReport(already=1, released=True)


def test_a_float_linear_and_an_unasked_torchao_linear_are_none_of_its_business():
    model = nn.Sequential(nn.Linear(K, K), *of("int8"))
    assert needs_prepare(model) is None and prepare_(model) == PrepareReport()
    assert [row.module for row in released(model).swapped] == ["1"] and type(model[0]) is nn.Linear


# --- what is left -------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Named(nn.Linear):
    """A subclass that computes as nn.Linear does."""


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def doubled() -> nn.Module:
    return quantized(CONFIGS["int8"][0](), torch.float32, Doubled(K, N))


def hooked() -> nn.Module:
    model = of("int8")
    model[0].register_forward_hook(lambda module, args, out: out)
    return model


def replaced() -> nn.Module:
    model = of("int8")
    model[0].forward = lambda x: x
    return model


def parametrized() -> nn.Module:
    model = of("int8")
    parametrize.register_parametrization(model[0], "bias", Same())
    return model


def scaled() -> nn.Module:
    model = of("int8")
    model[0].weight.act_pre_scale = torch.ones(K)
    return model


def shifted() -> nn.Module:
    model = of("int8")
    model[0].weight.zero_point.fill_(1)
    return model


def half_zero_points() -> nn.Module:
    model = of("int4_asymmetric")
    model[0].weight.zero_point = model[0].weight.zero_point.float() + 0.5
    return model


def negative_scale() -> nn.Module:
    model = of("int8")
    model[0].weight.scale[3] = -1
    return model


def embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(16, K))
    ao.quantize_(model, CONFIGS["int4"][0](), lambda module, name: isinstance(module, nn.Embedding))
    return model


def float8() -> nn.Module:
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    model = of("int8")
    quantized = Float8Tensor.from_hp(torch.randn(N, K), act_quant_kwargs=QuantizeTensorToFloat8Kwargs())
    model[0].weight = nn.Parameter(quantized, requires_grad=False)
    return model


def table() -> nn.Module:
    """QLoRA's weight, whose codes index a table."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    model = of("int8")
    model[0].weight = nn.Parameter(to_nf4(torch.randn(N, K), 64, 2), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (doubled, "it must compute as nn.Linear does, got Doubled"),
        (hooked, "it must have no hooks, which a swap would lose, got forward_hooks"),
        (replaced, "it must compute as nn.Linear does, got Linear with a forward of its own"),
        (parametrized, "it must have no parametrization"),
        (scaled, "its activation must be scaled by what quantizes it only"),
        (shifted, "its weight must be symmetric, as the library reads it"),
        (half_zero_points, "its zero points must be whole numbers"),
        (negative_scale, "weight_scale must be finite and positive"),
        (embedding, "it must be an nn.Linear, got Embedding"),
        (float8, "beside float8 codes its activation must be float, got one that is quantized"),
        (table, "its weight must be one of Int8Tensor, Float8Tensor, IntxUnpackedToInt8Tensor, got NF4Tensor"),
        (lambda: of("dynamic_asymmetric", torch.bfloat16), "an asymmetric activation must be float32"),
        (lambda: of("static_asymmetric", torch.bfloat16), "an asymmetric activation must be float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_provably_the_same_is_left_with_its_reason(make, reason):
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    report = prepare_(model, release=True)
    assert not report.swapped and [row.reason[: len(reason)] for row in report.left] == [reason]
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert report.freed == 0


def test_a_subclass_that_computes_as_a_linear_is_swapped():
    assert released(quantized(CONFIGS["int8"][0](), torch.float32, Named(K, N))).swapped[0].from_class == "Named"


def test_codes_of_two_weights_are_left_to_both():
    model = nn.Sequential(*of("int8"), *of("int8"))
    model[1].weight.qdata = model[0].weight.qdata
    report = prepare_(model, release=True)
    assert [row.reason.partition(";")[0] for row in report.left] == [
        "its weight must be its own, but it is that of 1 too",
        "its weight must be its own, but it is that of 0 too",
    ]
    untied = nn.Sequential(*of("int8"), *of("int8"))
    untied[1].weight = untied[0].weight
    assert len(prepare_(untied, release=True).left) == 2


def test_a_library_that_computes_something_else_is_left(monkeypatch):
    from torchao.quantization.quantize_.workflows.int8 import int8_tensor

    model = of("dynamic")
    of_library = int8_tensor.int_scaled_matmul
    monkeypatch.setattr(int8_tensor, "int_scaled_matmul", lambda *args: of_library(*args) * 1.01)
    (left,) = prepare_(model, release=True).left
    assert left.reason.startswith("its result must be codes times codes times scales")


def test_a_formula_of_another_version_is_left(monkeypatch):
    from torchao.quantization.quantize_.workflows.int8 import int8_tensor

    model = of("dynamic")
    of_library = int8_tensor.choose_qparams_affine

    def wider(*args: Any, **more: Any) -> Any:
        scale, zero_point = of_library(*args, **more)
        return scale * (1 + 2**-20), zero_point

    monkeypatch.setattr(int8_tensor, "choose_qparams_affine", wider)
    (left,) = prepare_(model, release=True).left
    assert left.reason.startswith("its activation must be quantized as in torchao")


def test_a_kernel_without_a_layout_frees_nothing_and_so_swaps_nothing(monkeypatch):
    monkeypatch.setattr(QuantizedLinear, "can_pack", lambda self, selection: False)
    model = of("int8")
    (left,) = prepare_(model, release=True).left
    assert left.reason.startswith("its kernel must hold the weight packed in as many bytes as its codes, ")


def test_the_filter_leaves_what_it_is_asked_to():
    model = nn.Sequential(*of("int8"), *of("8da4w"))
    report = prepare_(model, release=True, filter=lambda name, module: name == "1")
    assert [row.module for row in report.swapped] == ["1"]
    assert [(row.module, row.scheme, row.reason) for row in report.left] == [
        ("0", "Int8Tensor", "the filter left it out")
    ]


def test_a_quantized_linear_itself_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match=r"^prepare_ swaps the modules inside a model, got a Linear of torchao itself"):
        prepare_(of("int8")[0], release=True)


# --- what is said -------------------------------------------------------------------------------------------------


def test_memory_that_something_outside_the_model_refers_to_is_not_counted_as_freed():
    model, x = of("int8"), inputs(torch.float32)
    codes = model[0].weight.qdata
    report = prepare_(model, release=True)
    assert report.freed < N * K and "0.0 MiB of codes are not freed, as something outside" in report.notes[0]
    assert model[0].held_weight()[1] is None
    del codes
    model(x)
    assert model[0].held_weight()[1] is not None


def test_memory_that_modules_share_is_counted_once():
    bias = nn.Parameter(torch.zeros(N))
    model = nn.Sequential(*of("int8"), *of("int8"))
    model[0].bias = model[1].bias = bias
    report = released(model)
    assert report.freed == sum(row.freed for row in report.swapped) == 2 * (N * K + N)  # zero points are a byte each


def test_the_report_prints_what_was_freed():
    model = quantized(CONFIGS["8da4w"][0](), torch.float32, *(nn.Linear(1024, 1024, bias=False) for _ in range(2)))
    report = released(model)
    data = json.loads(report.to_json())
    assert data["freed"] == report.freed == sum(row["freed"] for row in data["swapped"])
    assert str(report) == GOLDEN


GOLDEN = """\
fx_quant: 2 of 2 quantized modules swapped for QuantizedLinear, 0 left, 2.1 MiB
of their tensors freed

torchao, Linear, int8 token asym dyn x int4 group32, reassociated

module  modules  freed
------  -------  -------
*       2        2.1 MiB"""


def test_explain_says_what_a_model_holds_twice_and_what_would_be_freed():
    linears = [nn.Linear(512, 512) for _ in range(4)]
    model, x = quantized(CONFIGS["dynamic"][0](), torch.float32, *linears), torch.ones(4, 512)
    model[0].register_forward_hook(lambda module, args, out: out)
    report = fx_quant.explain(model, x)
    assert (report.held_twice, report.releasable) == (4 * 512 * 512, 3 * 512 * 512)
    line = "1.0 MiB of weights are held twice once compiled, as codes and packed for a kernel; "
    assert f"{line}fx_quant.prepare_(model, release=True) would free 0.8 MiB" in " ".join(str(report).split())
    assert json.loads(report.to_json())["releasable"] == report.releasable
    assert type(report).from_json(report.to_json()) == report


def test_explain_counts_a_weight_once_however_often_it_is_called():
    (linear,) = quantized(CONFIGS["dynamic"][0](), torch.float32, nn.Linear(K, K))
    report = fx_quant.explain(nn.Sequential(linear, nn.ReLU(), linear), inputs(torch.float32))
    assert len(report.sites) == 2 and report.held_twice == K * K


def test_explain_promises_nothing_where_nothing_is_held_twice():
    x = inputs(torch.float32)
    for report in (
        fx_quant.explain(nn.Sequential(nn.Linear(K, K)), x),
        fx_quant.explain(of("dynamic"), x, target="sm90"),
    ):
        assert report.memory() == "" and report.held_twice == report.releasable == 0
    model = hooked()
    kept = fx_quant.explain(model, x)
    assert kept.held_twice == N * K and kept.memory().endswith("as codes and packed for a kernel")


def test_codes_of_a_module_that_no_library_made_are_counted_and_not_promised():
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-127, 128, (N, K), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.codes.float() * 0.01).t()

    report = fx_quant.explain(nn.Sequential(ByHand()), inputs(torch.float32))
    assert (report.held_twice, report.releasable) == (N * K * len(report.sites), 0)


def test_released_linears_quantize_rows_of_any_rank():
    model = of("dynamic")
    released(model)
    linear, x = model[0], inputs(torch.float32)
    codes, scale, _ = quantize_by(linear.quantizer, x, linear.scheme.activation)
    flat, flat_scale, _ = quantize_by(linear.quantizer, x.flatten(0, 1), linear.scheme.activation)
    assert torch.equal(codes, flat) and torch.equal(scale, flat_scale)
