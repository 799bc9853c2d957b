"""Modules that hold codes and are in no graph, or in no matmul that is known: explain counts and names them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fx_quant
from fx_quant.errors import MissError
from fx_quant.loading.coded_modules import holds_codes
from fx_quant.loading.library_notes import library_notes
from fx_quant.loading.prepare import hidden

K = 16
X = torch.randn(3, K)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def codes(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


class Coded(nn.Module):
    """A linear of int8 codes, as bitsandbytes and many others hold them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(codes(K, K), requires_grad=False)
        self.register_buffer("scale", torch.full((K, 1), 0.01))

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).t()


class Hidden(nn.Module):
    """Layers of which some run outside the graph."""

    def __init__(self, wrap):
        super().__init__()
        self.layers = nn.ModuleList([Coded() for _ in range(3)])
        for layer in self.layers:
            wrap(layer)

    def forward(self, x):
        # No loop: Dynamo leaves a frame that breaks in one to Python, whole.
        first, second, third = self.layers
        return third(second(first(x))).relu()


def disable(layer):
    layer.forward = torch.compiler.disable(layer.forward)


def text_of(model, *args):
    return " ".join(str(fx_quant.explain(model, *args)).split())


def test_modules_in_no_graph_are_counted_and_named_with_the_place_that_broke():
    report = fx_quant.explain(Hidden(disable), X)
    assert [(row.module, row.kind, row.in_graph) for row in report.unseen] == [
        (f"layers.{i}", "Coded", False) for i in range(3)
    ]
    text = " ".join(str(report).split())
    assert "fx_quant: no quantized matmul found (1 graph, 3 graph breaks), though 3 modules are quantized" in text
    assert "so nothing is done there: layers.* x 3 (Coded)" in text
    assert "tests/test_coded_modules.py:" in text
    assert "torch.compiler.disable" in text
    assert "unchanged" not in text


def test_a_frame_that_breaks_in_a_loop_is_said_not_to_be_captured():
    model = nn.Sequential(Coded(), Coded())
    for layer in model:
        disable(layer)
    report = fx_quant.explain(model, X)
    text = " ".join(str(report).split())
    assert report.graphs == 0
    assert "nothing was captured: the graph broke at " in text
    assert "torch.compiler.disable" in text
    assert "2 quantized modules are in no graph" in text


def test_a_hook_that_breaks_the_graph_is_where_it_says():
    def hook(forward, x):
        torch._dynamo.graph_break()
        return forward(x)

    def wrap(layer):
        layer.forward = functools.partial(hook, layer.forward)

    report = fx_quant.explain(Hidden(wrap), X)
    assert any(
        row.source.endswith(f"test_coded_modules.py:{hook.__code__.co_firstlineno + 1}") for row in report.breaks
    )
    # Dynamo goes on behind the break, so that each is seen.
    assert {row.module for row in (*report.sites, *report.recognised)} == {f"layers.{i}" for i in range(3)}
    assert report.unseen == ()


def test_modules_that_are_seen_are_not_listed():
    report = fx_quant.explain(Hidden(lambda layer: None), X)
    assert report.unseen == ()
    assert "quantized module" not in str(report)


def test_a_module_that_is_not_called_is_in_no_graph():
    model = nn.ModuleDict({"used": Coded(), "unused": Coded()})
    (row,) = fx_quant.explain(lambda x: model["used"](x) * 1, X).unseen
    assert (row.module, row.in_graph) == ("unused", False)


class Gathered(nn.Module):
    """Its codes are in a graph, which multiplies with none of them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(codes(K, K), requires_grad=False)

    def forward(self, x):
        return x + self.weight[0]


def test_codes_in_a_graph_and_in_no_matmul_are_said_to_be():
    report = fx_quant.explain(nn.Sequential(Gathered()), X)
    assert [(row.module, row.in_graph) for row in report.unseen] == [("0", True)]
    text = " ".join(str(report).split())
    assert "1 quantized module is in a graph, but in no quantized matmul that fx_quant knows: 0 (Gathered)" in text


def test_nothing_captured_counts_the_modules_too():
    with torch.compiler.set_stance("force_eager"):
        text = text_of(Hidden(lambda layer: None), X)
    assert "nothing was captured: torch.compiler.set_stance('force_eager')" in text
    assert "3 quantized modules are in no graph" in text


def packed(name, dtype=torch.int32):
    module = nn.Module()
    module.register_buffer(name, torch.zeros(4, K, dtype=dtype))
    return module


def torchao_linear():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(K, K))
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def experts():
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(codes(3, K, K), requires_grad=False)
    return module


def dynamic_linear():
    quantize = torch.ao.quantization.quantize_dynamic
    return quantize(nn.Sequential(nn.Linear(K, K)), dtype=torch.qint8)[0]


def zero_points_alone():
    module = nn.Module()
    module.register_buffer("_zero_point", torch.zeros(K, 1, dtype=torch.uint8))
    return module


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Coded, True),
        (experts, True),
        (torchao_linear, True),
        (dynamic_linear, True),
        (lambda: packed("qweight"), True),
        (lambda: packed("weight_packed"), True),
        (lambda: packed("weight", torch.float8_e4m3fn), True),
        (lambda: fx_quant.QuantizedLinear.from_float(nn.Linear(K, K), "float32 x int8 per_channel"), True),
        (lambda: packed("position_ids"), False),
        (lambda: packed("attention_mask", torch.uint8), False),
        (lambda: packed("bias", torch.bool), False),
        (lambda: nn.Linear(K, K), False),
        (lambda: nn.Embedding(4, K, _weight=torch.zeros(4, K)), False),
        (lambda: nn.Sequential(Coded()), False),
        (zero_points_alone, False),
    ],
)
def test_what_holds_codes(build, expected):
    assert holds_codes(build()) is expected


def of_package(base, package, **attributes):
    """A class as ``package`` would define it."""
    return type(base.__name__, (base,), {"__module__": package, **attributes})


@pytest.mark.parametrize(
    ("package", "says"),
    [
        ("bitsandbytes.nn.modules", "1 module of bitsandbytes call"),
        ("modelopt.torch.quantization.nn.modules.quant_linear", "1 module of modelopt round in float"),
        ("brevitas.nn.quant_linear", "1 module of brevitas round in float"),
        ("neural_compressor.torch.algorithms.weight_only.modules", "1 module of neural_compressor decode"),
        ("torch.ao.nn.qat.modules.linear", "1 module of torch.ao.nn.qat are trained"),
    ],
)
def test_libraries_out_of_reach_get_the_note_what_to_do(package, says):
    model = nn.Sequential(of_package(Coded, package)(), nn.ReLU())
    text = text_of(model, X)
    assert says in text
    assert "quantize the float model with fx_quant.quantize_ or torchao instead" in text


class Rounding(nn.Linear):
    """A linear as libraries simulate it, in float; it breaks the graph between rounding and multiplying."""

    def __init__(self):
        super().__init__(K, K)
        self.weight_quantizer = nn.Identity()
        self.weight_quantizer.is_enabled = True
        self.weight_quantizer.register_buffer("amax", self.weight.abs().amax(1, keepdim=True))

    def forward(self, x):
        rounded = (self.weight * 64).round() / 64
        torch._dynamo.graph_break()
        return self.multiplied(x, rounded)

    @torch.compiler.disable
    def multiplied(self, x, weight):
        return x @ weight.t()


BREAKS = f"the graph breaks at tests/test_coded_modules.py:{Rounding.forward.__code__.co_firstlineno + 2}"


def test_a_module_that_simulates_quantization_and_is_not_reached_has_a_row_with_the_break_and_what_to_do():
    simulating = of_package(Rounding, "modelopt.torch.quantization.nn.modules.quant_linear")
    report = fx_quant.explain(nn.Sequential(simulating(), nn.ReLU(), nn.Linear(K, K)), X)
    (row,) = report.unseen
    assert (row.module, row.kind) == ("0", "Rounding")
    assert row.reason.startswith(BREAKS), row.reason
    assert row.reason.endswith("quantize the float model with fx_quant.quantize_ or torchao instead")
    assert [each.module for each in report.floats] == ["2"]
    assert "though 1 module is quantized" in report.summary() and "unchanged" not in str(report)
    assert "1 module of modelopt round" in report.note  # its quantizer, which holds a matrix too, is not another
    assert fx_quant.Report.from_json(report.to_json()) == report
    with pytest.raises(MissError):
        report.raise_if()


def test_linears_that_a_library_left_in_float_are_float():
    simulating = of_package(Rounding, "modelopt.torch.quantization.nn.modules.quant_linear")
    model = nn.Sequential(simulating())
    model[0].weight_quantizer.is_enabled = False
    assert hidden(model) == {} and library_notes(model) == []
    report = fx_quant.explain(model, X)
    assert report.unseen == () and [row.module for row in report.floats] == ["0"]


def test_tables_that_a_library_quantizes_multiply_nothing():
    assert hidden(nn.Sequential(of_package(nn.Embedding, "brevitas.nn.quant_embedding")(K, K))) == {}


class Breaking(Coded):
    """Codes of a library that nobody knows, which leaves the graph in its own forward."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.multiplied(x)

    @torch.compiler.disable
    def multiplied(self, x):
        return super().forward(x)


def test_a_break_is_said_of_the_class_that_breaks_and_of_no_other():
    model = nn.ModuleDict({"breaking": Breaking(), "unused": Coded()})
    rows = {row.module: row.reason for row in fx_quant.explain(lambda x: model["breaking"](x) * 1, X).unseen}
    assert rows["breaking"].startswith("the graph breaks at tests/test_coded_modules.py:")
    assert rows["unused"] == ""


def test_modules_that_prepare_leaves_say_why_in_their_rows():
    ready, hooked = dynamic_linear(), dynamic_linear()
    hooked.register_forward_hook(lambda *_: None)
    report = fx_quant.explain(nn.Sequential(ready, hooked), X)
    assert [row.reason.partition(";")[0] for row in report.unseen] == [
        "fx_quant.prepare_(model) swaps it for QuantizedLinear",
        "it must have no hooks, which a swap would lose, got forward_hooks",
    ]


def test_static_modules_of_torch_ao_get_a_note_and_dynamic_linears_their_own():
    linear = torch.ao.nn.quantized.Linear(K, K)
    (note,) = library_notes(nn.Sequential(linear))
    assert "1 module of torch.ao.nn.quantized" in note
    text = text_of(nn.Sequential(dynamic_linear()), X)
    assert "fx_quant.prepare_(model) swaps them" in text
    assert "torch.ao.nn.quantized" not in text


def test_an_encoder_layer_that_may_skip_its_quantized_linears_is_said():
    layer = nn.TransformerEncoderLayer(K, 2, K, batch_first=True).eval()
    assert library_notes(layer) == []
    layer.linear1 = torchao_linear()
    (note,) = library_notes(layer)
    assert "torch.backends.mha.set_fastpath_enabled(False)" in note
    assert library_notes(layer.train()) == []
    fx_quant.quantize_(other := nn.TransformerEncoderLayer(K, 2, K).eval(), "float32 x int8 per_channel")
    assert library_notes(other) == []
