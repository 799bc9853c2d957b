"""Modules in reports have the names that ``named_modules()`` gives them, however the model is called."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fx_quant
from fx_quant.diagnose.capture import run_eagerly
from fx_quant.loading.module_names import named_modules_of
from fx_quant.passes.nodes import module_path

SCHEME = "float32 x int8 per_channel"
K = 16


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Block(nn.Module):
    """Two linears with a graph break between them, if wanted."""

    def __init__(self, breaks=False):
        super().__init__()
        self.up, self.down, self.breaks = nn.Linear(K, 2 * K), nn.Linear(2 * K, K), breaks

    def forward(self, x):
        x = self.up(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.down(x)


def quantized(model):
    fx_quant.quantize_(model, SCHEME)
    return model.eval()


def names(model, *args, **kwargs):
    report = fx_quant.explain(model, *args, **kwargs)
    assert not report.misses
    return [row.module for row in (*report.sites, *report.recognised)]


def blocks(breaks=False):
    return quantized(nn.Sequential(Block(breaks), Block(breaks)))


WANTED = ["0.up", "0.down", "1.up", "1.down"]
X = torch.randn(3, K)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda m: m,
        lambda m: m.forward,
        torch.compile,
        lambda m: torch.compile(m.forward),
        lambda m: lambda x: m(x) * 1,
        lambda m: functools.partial(lambda model, x: model(x), m),
        lambda m: lambda *args: m(*args) * 1,
    ],
    ids=["module", "forward", "compiled", "compiled_forward", "closure", "partial", "variadic"],
)
def test_names_are_those_of_the_module(call, breaks):
    assert sorted(names(call(blocks(breaks)), X)) == sorted(WANTED)


GLOBAL = blocks()


def test_names_are_those_of_a_module_in_a_global_variable():
    assert names(lambda x: GLOBAL(x) * 1, X) == WANTED


def test_several_modules_of_a_function_go_by_its_variables():
    encoder, decoder = blocks(), quantized(nn.Sequential(nn.Linear(K, K)))
    assert names(lambda x: decoder(encoder(x)), X) == [*(f"encoder.{name}" for name in WANTED), "decoder.0"]


class ByDict(nn.Module):
    """Reads its child as PEFT does, past ``__getattr__``."""

    def __init__(self, breaks=False):
        super().__init__()
        self.inner, self.breaks = Block(), breaks

    def forward(self, x):
        x = self.__dict__["_modules"]["inner"](x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + 1


@pytest.mark.parametrize("breaks", [False, True])
def test_a_child_that_is_read_from_a_dict_has_its_name(breaks):
    model = quantized(nn.Sequential(ByDict(breaks), ByDict(breaks)))
    assert names(model, X) == ["0.inner.up", "0.inner.down", "1.inner.up", "1.inner.down"]


def test_tied_modules_go_by_one_of_their_names():
    model = nn.ModuleDict({"a": nn.Linear(K, K)})
    model["b"] = model["a"]
    model = quantized(model)
    assert names(lambda x: model["b"](model["a"](x)), X)[0] in ("a", "b")


def wrapped(function):
    @functools.wraps(function)
    def inner(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return inner


class Decorated(nn.Module):
    """Its forward is behind a decorator, as that of each model of transformers."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    @wrapped
    def forward(self, x):
        return self.block(x)


def test_a_decorated_forward_does_not_show():
    model = quantized(Decorated())
    assert names(model, X) == ["block.up", "block.down"]
    assert names(nn.Sequential(model), X) == ["0.block.up", "0.block.down"]


@pytest.mark.parametrize("kind", ["Llama", "Bert", "GPT2"])
def test_names_of_transformers_models(kind):
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    small = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, **small))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = getattr(transformers, f"{kind}Config")(**sizes, **small)
        model = getattr(transformers, {"Llama": "LlamaForCausalLM", "Bert": "BertModel"}[kind])(config)
    wanted = set(fx_quant.quantize_(model, SCHEME).quantized)
    ids = torch.arange(5)[None]
    assert set(names(model.eval(), ids)) == wanted
    assert set(names(model, input_ids=ids)) == wanted
    outer = nn.Sequential(model)
    assert set(names(outer, ids)) == {f"0.{name}" for name in wanted}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("L['self']._modules['model']._modules['layers']._modules['0']", "model.layers.0"),
        ("L['args'][0].model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("L['fn'].0.model.q_proj", "0.model.q_proj"),
        ("L['fn'].__self__.0", "0"),
        ("G['model'].lm_head", "lm_head"),
        ("L['f'].__closure__[0].cell_contents.proj", "proj"),
        ("L['fn'].0.__dict__['_modules']['lin'].base_layer", "0.lin.base_layer"),
        ("L['self']._orig_mod.proj", "proj"),
        ("L['self'].experts['a'].up", "experts.a.up"),
        ("L['self']", ""),
    ],
)
def test_what_is_no_attribute_of_a_module_is_stripped_where_no_model_is_at_hand(path, name):
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"1": (path, nn.Linear)}
    assert module_path(node) == name


def test_modules_are_found_in_what_a_function_holds():
    block = Block()
    assert set(named_modules_of(block.forward)) == {"", "up", "down"}
    assert set(named_modules_of(functools.partial(lambda f, x: f(x), block))) == {"", "up", "down"}
    assert named_modules_of(lambda x: x) == {}


def test_check_compares_each_module_that_a_graph_serves(monkeypatch):
    monkeypatch.setattr("fx_quant.diagnose.check.compile_graph", run_eagerly)
    model = nn.Sequential(*(quantized(TwoSteps()) for _ in range(2)))
    assert [site.module for site in fx_quant.check(model, X).sites] == ["0.linear", "1.linear"]


class TwoSteps(nn.Module):
    """A linear with a quantized input, behind a graph break."""

    def __init__(self):
        super().__init__()
        self.linear = fx_quant.QuantizedLinear.from_float(
            nn.Linear(K, K), "int8 per_token (dynamic) x int8 per_channel"
        )

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.linear(x)
