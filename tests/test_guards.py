"""What a call of compiled code looks at of each quantized linear: little more than of a float one, and all that matters."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import fx_quant
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.layers.traced import OF_ITS_OWN, SAID
from fx_quant.loading.adapters.compressed_tensors import quantize_activation as of_compressed_tensors
from fx_quant.loading.adapters.torchao import quantize_activation as of_torchao
from fx_quant.scheme import Scheme

SIZE = 64
W8A8, W4A16 = "int8 per_token (dynamic) x int8 per_channel", "bfloat16 x uint4 per_group(32) asymmetric"
W4A8, STATIC = "int8 per_token (dynamic) x int4 per_group(32)", "int8 per_tensor asymmetric (static) x int8 per_channel"
# A tensor is looked at six times, and its memory compared where it is no parameter.
TENSOR = 7


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """Linears, each of which is its neighbour's input; every test traces a function of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def float_layers(count: int) -> Layers:
    torch.manual_seed(0)
    return Layers(*(nn.Linear(SIZE, SIZE) for _ in range(count))).requires_grad_(False).eval()


def quantized_layers(count: int, scheme: str = W8A8) -> Layers:
    model = float_layers(count)
    if "static" in scheme:
        given = {"input_scale": torch.tensor(0.03), "input_zero_point": torch.tensor(3)}
        model.layers = nn.ModuleList(QuantizedLinear.from_float(layer, scheme, **given) for layer in model.layers)
    else:
        fx_quant.quantize_(model, scheme)
    return model


def guards_of(model: Layers, layer: int) -> tuple[Counter[str], set[str]]:
    """The guards on one of the layers by kind, and the types of what they look at."""
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(torch.ones(2, SIZE))
    (entry,) = _debug_get_cache_entry_list(Layers.forward.__code__)
    kinds, types = Counter(), set()
    for line in str(entry.guard_manager).splitlines():
        if f"_modules['{layer}']" not in line:
            continue
        kind = re.search(r"\+- (?:ValueManager: )?(\w+)", line)
        if kind and kind[1] == "GuardManager":
            types.add(re.search(r"type=<class '([^']+)'>", line)[1].rpartition(".")[2])
        elif kind and "check_no_aliasing(" not in line:  # one of the whole graph
            kinds[kind[1]] += 1
    return kinds, types


TOKEN = Scheme.parse(W8A8).activation
QUANTIZERS = {
    "none": None,
    "compressed-tensors": partial(of_compressed_tensors, spec=TOKEN),
    "torchao": partial(of_torchao, rows=True, symmetric=True, low=-128, high=127, wide=True),
}


@pytest.mark.parametrize(
    ("scheme", "tensors"), [(W8A8, 1), (W4A8, 1), (W4A16, 2), (STATIC, 3)], ids=["w8a8", "w4a8", "w4a16", "static"]
)
def test_a_quantized_linear_has_few_guards_more_than_a_float_one(scheme, tensors):
    """``tensors``: what it holds beside weight and bias."""
    float_kinds, _ = guards_of(float_layers(3), 2)
    kinds, types = guards_of(quantized_layers(3, scheme), 2)
    assert float_kinds["TENSOR_MATCH"] == 2  # those of the layer were found
    # The weight is no parameter (1) and may be held as codes (2); the buffers are a dict beside the parameters (1); the
    # layout is a text in a dict (2), scheme and quantizer are a text (1).
    assert kinds.total() <= float_kinds.total() + 7 + tensors * TENSOR, kinds
    assert types <= {"QuantizedLinear", "dict", "str", "NoneType", "Tensor", "Parameter"}


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "none"])
def test_a_formula_of_a_library_is_no_guard_of_each_layer(name):
    expected = guards_of(quantized_layers(3), 2)
    model = quantized_layers(3)
    for layer in model.layers:
        layer.quantizer = copy.copy(QUANTIZERS[name])
    assert guards_of(model, 2) == expected


# --- nothing that matters is missed -------------------------------------------------------------------------------


class Compiled:
    """``model`` compiled by a backend that counts."""

    def __init__(self, model: nn.Module) -> None:
        self.count, self._model = 0, model
        self._compiled = torch.compile(model, backend=self._backend)

    def _backend(self, gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        self.count += 1
        return gm

    def compiles_and_is_right(self) -> int:
        """How many graphs a call made, with the result of an eager one."""
        before, x = self.count, torch.randn(3, SIZE)
        # An eager call may pack a weight.
        torch.testing.assert_close(self._compiled(x), copy.deepcopy(self._model)(x), rtol=1e-5, atol=1e-5)
        return self.count - before


def test_another_scheme_elsewhere_compiles_nothing_again():
    compiled = Compiled(quantized_layers(2))
    assert compiled.compiles_and_is_right() == 1
    SAID.pop("int8 per_token (dynamic) x int8 per_group(16)", None)
    quantized_layers(1, "int8 per_token (dynamic) x int8 per_group(16)")
    assert compiled.compiles_and_is_right() == 0


@pytest.mark.parametrize("layout", ["vnni", "columns", "pairs"])
def test_a_weight_in_another_layout_is_read_as_it_is(layout):
    model = quantized_layers(2)
    compiled, layer = Compiled(model), model.layers[1]
    for each in model.layers:
        each.unpack()
        assert each._pack("columns" if layout == "vnni" else "vnni", settled=True)
    assert compiled.compiles_and_is_right() == 1
    layer.unpack()
    assert compiled.compiles_and_is_right() == 1  # as codes
    assert layer._pack(layout, settled=True)
    assert compiled.compiles_and_is_right() == 1
    assert layer.held_weight()[1].layout == layout


def test_a_layer_with_another_scheme_quantizer_or_zero_point_is_traced_anew():
    model = quantized_layers(2)
    compiled, layer = Compiled(model), model.layers[1]
    assert compiled.compiles_and_is_right() == 1
    layer.quantizer = QUANTIZERS["torchao"]
    assert compiled.compiles_and_is_right() == 1
    layer.quantizer = partial(of_torchao, rows=True, symmetric=True, low=-64, high=63, wide=True)
    assert compiled.compiles_and_is_right() == 1
    layer.quantizer = lambda x, *given: QUANTIZERS["torchao"](x / 1, *given)
    assert compiled.compiles_and_is_right() == 1 and layer._traced_as.endswith(OF_ITS_OWN)
    layer.quantizer = lambda x, *given: QUANTIZERS["compressed-tensors"](x / 1, *given)
    assert compiled.compiles_and_is_right() == 1
    layer.quantizer = None
    assert compiled.compiles_and_is_right() == 0
    layer.scheme = Scheme.parse("int8 per_tensor (dynamic) x int8 per_channel")
    assert compiled.compiles_and_is_right() == 1


def test_tensors_that_are_made_parameters_are_still_the_layers():
    model = quantized_layers(1)
    compiled, layer = Compiled(model), model.layers[0]
    assert compiled.compiles_and_is_right() == 1
    layer.weight_scale = nn.Parameter(2 * layer.weight_scale, requires_grad=False)
    assert compiled.compiles_and_is_right() == 1
    layer.weight = nn.Parameter(-layer.weight.clone(), requires_grad=False)
    assert compiled.compiles_and_is_right() == 1
    assert "weight" not in layer._buffers and layer.packed_weight is not None


def test_functional_calls_of_compiled_code_read_what_they_are_given():
    model = quantized_layers(1)
    layer = model.layers[0]
    codes = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8)

    @torch.compile(backend="eager")
    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": codes}, (x,))

    x = torch.randn(3, SIZE)
    given = copy.deepcopy(layer)
    given.weight = codes
    torch.testing.assert_close(call(x), given(x))
    torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


def test_copies_pickles_and_what_another_process_made_are_told_by_the_same_text():
    model = quantized_layers(1)
    model.layers[0].quantizer = QUANTIZERS["torchao"]
    saved, text = pickle.dumps(model), model.layers[0]._traced_as
    kept = SAID.pop(text)
    try:
        for other in (pickle.loads(saved), copy.deepcopy(model), copy.copy(model)):
            assert other.layers[0]._traced_as == text
            assert Compiled(other).compiles_and_is_right() == 1
    finally:
        SAID[text] = kept


def test_a_shallow_copy_follows_the_layout_of_the_other():
    layer = quantized_layers(1).layers[0]
    other = copy.copy(layer)
    compiled = Compiled(Layers(other))
    layer.unpack()
    assert layer._pack("columns", settled=True)
    assert compiled.compiles_and_is_right() == 1
    assert other.held_weight()[1].layout == "columns"
