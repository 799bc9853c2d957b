"""A graph in pieces: the same results as whole, each distinct piece compiled once, and left whole where that is unsafe."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config
from torch.nn.attention.flex_attention import flex_attention

import fx_quant
from fx_quant import backend
from fx_quant.backend import RewritePass
from fx_quant.config import ATTENTION, Options
from fx_quant.diagnose.capture import run_eagerly
from fx_quant.errors import FxQuantError
from fx_quant.piecewise.run import as_it_is
from fx_quant.piecewise.split import split
from fx_quant.report import PieceReport, Report
from fx_quant.scheme import Numerics
from tests.tolerances import assert_within

HIDDEN, HEADS = 32, 2


class Compiles:
    """The graphs that Inductor was given, and the reports of the graphs of Dynamo's."""

    def __init__(self):
        self.graphs, self.reports = [], []


@pytest.fixture
def compiles(monkeypatch):
    """Runs what the passes leave op by op instead of compiling it, and counts."""
    found, compile_fx, record = Compiles(), backend.compile_fx, backend._record

    def counted(gm, example_inputs, **arguments):
        found.graphs.append(gm)
        return compile_fx(gm, example_inputs, **{"inner_compile": run_eagerly, **arguments})

    def recorded(report, **how):
        found.reports.append(report)
        record(report, **how)

    monkeypatch.setattr(backend, "compile_fx", counted)
    monkeypatch.setattr(backend, "_record", recorded)
    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True), torch.no_grad():
        yield found
    torch._dynamo.reset()


def compiled(model, dynamic=None, ops=None, **options):
    given = {"piecewise": True, **({} if ops is None else {"splitting_ops": ops}), **options}
    return torch.compile(model, backend="fx_quant", options=given, dynamic=dynamic, fullgraph=True)


class Block(nn.Module):
    """Attention and a linear behind it."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.qkv, self.out, self.eps = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN), eps

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        q, k, v = self.qkv(normed).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Opaque(Block):
    """Attends by an op of the user's own."""

    def attend(self, q, k, v):
        return torch.ops.fx_quant_tests.attend(q, k, v)


class Flex(Block):
    """Attends by flex attention, whose graph of scores is the same in each layer."""

    def attend(self, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j))


class IntoBuffer(Block):
    """Attends by an op that writes its result where it is told, as vLLM's does."""

    def attend(self, q, k, v):
        out = torch.empty_like(q)
        torch.ops.fx_quant_tests.attend_into(q, k, v, out)
        return out


@torch.library.custom_op("fx_quant_tests::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().transpose(1, 2)


@attend.register_fake
def _(q, k, v):
    return torch.empty(q.shape, dtype=q.dtype)  # laid out otherwise than the op does


@torch.library.custom_op("fx_quant_tests::attend_into", mutates_args=("out",))
def attend_into(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(F.scaled_dot_product_attention(q, k, v))


@attend_into.register_fake
def _(q, k, v, out):
    return None


def blocks(count, kind=Block, eps=(1e-5,)):
    torch.manual_seed(0)
    model = nn.Sequential(*[kind(eps[i % len(eps)]) for i in range(count)]).eval().requires_grad_(False)
    fx_quant.quantize_(model, "int8 per_token (dynamic) x int8 per_channel")
    return model


def states(*shape):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(sum(shape)))


# --- the same results, compiled once ------------------------------------------------------------------------------


def llama(layers, quantized):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval()
    if quantized == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    else:
        fx_quant.quantize_(model, "int8 per_token (dynamic) x int8 per_channel")
    return model


@pytest.mark.parametrize("quantized", ["torchao", "fx_quant"])
def test_a_llama_in_pieces_is_the_whole_one_and_the_eager_one(compiles, quantized):
    model, ids = llama(3, quantized), torch.arange(12).reshape(2, 6)
    pieces = compiled(model)(ids, use_cache=False).logits
    torch._dynamo.reset()
    whole = torch.compile(model, backend="fx_quant")(ids, use_cache=False).logits
    assert torch.equal(pieces, whole)
    # A rounding on the way to a code may make it its neighbour, with plain Inductor too.
    assert_within(pieces, model(ids, use_cache=False).logits, Numerics.APPROXIMATE)
    in_pieces, in_one = compiles.reports[0], compiles.reports[-1]
    # Each site has its own name, though one artefact serves both layers.
    assert in_pieces.sites == in_one.sites and len(in_pieces.sites) == 22
    assert in_pieces.pieces == (PieceReport(0, 1, 3), PieceReport(1, 2, 7), PieceReport(3, 1, 5))
    assert in_pieces.how_cut() == "4 pieces, 3 compiled, 2 are the same as piece 1"


@pytest.mark.parametrize("layers", [3, 7])
def test_the_number_of_compilations_does_not_depend_on_the_depth(compiles, layers):
    model, x = blocks(layers), states(2, 5)
    assert torch.equal(compiled(model)(x), model(x))
    assert len(compiles.graphs) == 3
    assert len(compiles.reports[0].sites) == 2 * layers


def test_other_sizes_do_not_compile_again(compiles):
    model = blocks(3)
    run = compiled(model, dynamic=True)
    for batch, tokens in [(2, 5), (3, 5), (8, 7), (4, 33)]:
        x = states(batch, tokens)
        assert torch.equal(run(x), model(x))
    assert len(compiles.graphs) == 3


def test_a_shared_piece_sees_a_write_to_the_weights_of_each_layer(compiles):
    model, x = blocks(4), states(2, 5)
    run = compiled(model)
    run(x)
    for layer in (1, 2):
        codes = model[layer].out.weight
        codes.copy_(codes.flip(0))
        assert torch.equal(run(x), model(x))
    assert len(compiles.graphs) == 3


def test_flex_attention_begins_a_piece(compiles):
    """It is there to be compiled: run as it is, it would hold all scores."""
    model, x = blocks(4, Flex), states(2, 5)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert [row.count for row in compiles.reports[0].pieces] == [1, 3, 1]


def look_at(model, x, look):
    """What ``look`` makes of Dynamo's graph."""
    found = []

    def backend(gm, example_inputs):
        found.append(look(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    torch._dynamo.reset()
    return found[0]


def test_an_op_of_pytorchs_begins_a_piece_and_one_of_a_library_stands_alone():
    def cuts(gm, **how):
        parts = split(gm, [*ATTENTION, "fx_quant_tests::attend"], **how).parts
        return [part.is_cut for part in parts]

    x = states(2, 5)
    assert look_at(blocks(2), x, cuts) == [False, False, False]
    assert look_at(blocks(2), x, lambda gm: cuts(gm, apart=True)) == [False, True, False, True, False]
    assert look_at(blocks(2, Opaque), x, cuts) == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("modules", "counts"),
    [
        (["?"], [4]),  # the paths of the blocks are their numbers
        (["Block"], [4]),
        (["*.qkv", "1"], [2, 3, 2, 1, 1]),
        (["*.out"], [1, 4, 3, 1]),
    ],
)
def test_modules_are_pieces_by_path_or_class(compiles, modules, counts):
    model, x = blocks(4), states(2, 5)
    assert torch.equal(compiled(model, splitting_modules=modules)(x), model(x))
    assert [row.count for row in compiles.reports[0].pieces] == counts


def test_modules_and_ops_are_cut_at_together(compiles):
    model, x = blocks(4), states(2, 5)
    assert torch.equal(compiled(model, ops=ATTENTION, splitting_modules=["Block"])(x), model(x))
    assert [row.count for row in compiles.reports[0].pieces] == [4, 4]


def test_an_op_that_runs_as_it_is_gives_what_was_compiled_for(compiles):
    """Of ``attend`` Dynamo is told another layout than the op gives."""

    def look(gm):
        (part,) = [part for part in split(gm, ["fx_quant_tests::attend"]).parts if part.is_cut]
        return as_it_is(part)

    q = torch.randn(2, HEADS, 5, HIDDEN // HEADS)
    (result,) = look_at(blocks(1, Opaque), states(2, 5), look)(q, q, q)
    assert not attend(q, q, q).is_contiguous() and result.is_contiguous()
    assert torch.equal(result, attend(q, q, q))


# --- state, aliases and scalars -----------------------------------------------------------------------------------


class Cached(Block):
    """Keys and values go into a static cache, which is what attention reads."""

    def __init__(self, eps=1e-5):
        super().__init__(eps)
        self.register_buffer("keys", torch.zeros(1, HEADS, 8, HIDDEN // HEADS))
        self.register_buffer("values", torch.zeros(1, HEADS, 8, HIDDEN // HEADS))
        self.at = torch.arange(2)

    def attend(self, q, k, v):
        self.keys.index_copy_(2, self.at, k)
        self.values.index_copy_(2, self.at, v)
        return F.scaled_dot_product_attention(q, self.keys, self.values)


def test_a_cache_is_written_by_the_pieces(compiles):
    model, other, x = blocks(4, Cached), blocks(4, Cached), states(1, 2)
    run = compiled(model)
    for at in ([0, 1], [2, 3], [3, 7]):
        for block in (*model, *other):
            block.at.copy_(torch.tensor(at))
        assert torch.equal(run(x), other(x))
        for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    assert len(compiles.graphs) == 3
    assert compiles.reports[0].whole == ""


@pytest.mark.parametrize(
    ("kind", "op"), [(Opaque, "fx_quant_tests::attend"), (IntoBuffer, "fx_quant_tests.attend_into")]
)
def test_the_graph_is_cut_at_an_op_of_the_users(compiles, kind, op):
    model, x = blocks(4, kind), states(2, 5)
    assert torch.equal(compiled(model, ops=[op])(x), model(x))
    assert [row.count for row in compiles.reports[0].pieces] == [1, 3, 1]


class Scratch(nn.Module):
    """What ``step`` makes of ``x`` and of the attention over it, in one graph."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step(x, lambda y: F.scaled_dot_product_attention(y, y, y))


def written_view(x, attend):
    y = x + 1
    first = y[0]
    out = attend(y)
    first.add_(1)
    return out, y


def written_base(x, attend):
    y = x * 2
    tail = y[..., 1:]
    out = attend(y)
    y.mul_(3)
    return out + y, tail


def view_of_input(x, attend):
    tail = x[..., 1:]
    out = attend(x)
    x.add_(out)
    return attend(x) * 2, tail * 2


def writes_one_of_two_views(x, attend):
    y = x.repeat(1, 1, 2)
    first, second = y.chunk(2, -1)
    out = attend(first)
    first.mul_(out)
    return first + second


def reshaped_in_place(x, attend):
    y = x + 1
    out = attend(y)
    y.unsqueeze_(0)
    return out + y


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (written_view, "writes to memory that two of its inputs share"),
        (written_base, "writes to memory that getitem"),
        (view_of_input, "writes to memory that getitem"),
        (writes_one_of_two_views, "writes to memory that "),
        (reshaped_in_place, "changes what memory an input shows, in place"),
    ],
)
def test_a_write_to_what_another_piece_made_a_view_of_leaves_the_graph_whole(compiles, step, why):
    x = states(2, 5)
    ours, theirs = x.clone(), x.clone()
    expected = Scratch(step)(theirs)
    actual = compiled(Scratch(step))(ours)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # attention by other steps
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert why in compiles.reports[0].whole
    assert len(compiles.graphs) == 1


def writes_its_input(x, attend):
    x.mul_(2)
    out = attend(x)
    x.add_(out)
    return x, out


def returns_inputs_and_views(x, attend):
    y = x + 1
    out = attend(y)
    return x, y, y[0], x[0], out.transpose(0, 1), out


def returns_a_tuple_in_parts(x, attend):
    first, second = x.chunk(2, -1)
    out = attend(first)
    return out * second, x.shape[0]


def works_on_its_own_memory(x, attend):
    y = torch.zeros_like(x)
    y.add_(x)
    y[0].mul_(2)
    out = attend(y)
    z = out.clone()
    z[0] = 1
    return z


def attends_twice_at_once(x, attend):
    return attend(attend(x)) + attend(x)


@pytest.mark.parametrize(
    "step",
    [
        writes_its_input,
        returns_inputs_and_views,
        returns_a_tuple_in_parts,
        works_on_its_own_memory,
        attends_twice_at_once,
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_pieces_write_and_return_is_what_the_graph_does(compiles, step, dynamic):
    run = compiled(Scratch(step), dynamic=dynamic)
    for rows in (5, 7):
        x = states(2, rows)
        ours, theirs = x.clone(), x.clone()
        expected = Scratch(step)(theirs)
        actual = run(ours)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # attention by other steps
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for given, wanted in zip(actual, expected, strict=True):
            assert (given is ours) == (wanted is theirs)
    assert compiles.reports[0].whole == ""


def test_numbers_of_the_layers_are_their_own(compiles):
    """Two layers differ in a float: not one graph, whether Dynamo makes it an input or not."""
    model, x = blocks(4, eps=(1e-5, 0.5)), states(2, 5)
    run = compiled(model, dynamic=True)
    assert torch.equal(run(x), model(x))
    model[2].eps = 0.7
    assert torch.equal(run(x), model(x))
    assert [row.count for row in compiles.reports[0].pieces] == [1, 2, 1, 1]


class Scaled(Block):
    """Takes a number that is computed of the float that Dynamo makes an input, as GPT-2's activation does of pi."""

    def forward(self, x):
        return super().forward(x * math.sqrt(2.0 / self.eps)) * math.sqrt(2.0 / self.eps)


def test_a_number_made_of_a_float_is_one_in_each_piece(compiles):
    model, x = blocks(3, Scaled, eps=(0.5,)), states(2, 5)
    run = compiled(model, dynamic=True)
    torch.testing.assert_close(run(x), model(x))
    for block in model:
        block.eps = 0.25
    torch.testing.assert_close(run(x), model(x))
    assert [report.whole for report in compiles.reports] == ["", ""]


class Embedded(nn.Module):
    """Its embedding has floats of its own, which reach the graph as tensors whose ``item()`` is taken."""

    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(16, HIDDEN, max_norm=None), blocks(3)

    def forward(self, ids):
        return self.blocks(self.embedding(ids))


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_numbers_of_an_embedding_and_static_shapes_do_not_break_a_piece(compiles, dynamic):
    model = Embedded()
    run = compiled(model, dynamic=dynamic)
    for ids in (torch.arange(10).reshape(2, 5), torch.arange(12).reshape(3, 4)):
        torch.testing.assert_close(run(ids), model(ids))
    assert all(report.whole == "" for report in compiles.reports)
    assert len(compiles.graphs) == (3 if dynamic else 6)


def test_layers_of_another_shape_or_layout_are_another_graph(compiles):
    model, x = blocks(4), states(2, 5)
    weight = model[2].qkv.weight
    model[2].qkv.register_buffer("weight", weight.t().contiguous().t())
    model[3].out = nn.Linear(HIDDEN, HIDDEN, bias=False)
    assert torch.equal(compiled(model)(x), model(x))
    assert sum(row.count for row in compiles.reports[0].pieces) == 5
    assert len(compiles.reports[0].pieces) > 3


# --- left whole, and said so --------------------------------------------------------------------------------------


def test_a_graph_without_the_op_is_whole_and_says_so(compiles, caplog):
    model, x = blocks(2), states(2, 5)
    torch.testing.assert_close(compiled(model, ops=["nowhere::attend"])(x), model(x))
    report = compiles.reports[0]
    assert report.whole == "it calls none of nowhere::attend"
    assert "compiled whole, not in pieces: it calls none of nowhere::attend" in str(report)
    assert "compiled whole" in caplog.text
    assert len(compiles.graphs) == 1 and len(report.sites) == 4


def test_a_graph_to_be_differentiated_is_whole(compiles):
    model, x = blocks(2), states(2, 5).requires_grad_()
    with torch.enable_grad():
        compiled(model)(x)
    assert compiles.reports[0].whole == "it is to be differentiated; call it under torch.no_grad()"


@pytest.mark.parametrize("option", ["freezing", "triton.cudagraphs", "cpp_wrapper"])
def test_what_an_artefact_cannot_be_shared_under_leaves_the_graph_whole(compiles, monkeypatch, option):
    seen = []
    monkeypatch.setattr(backend, "_compile", lambda gm, inputs, *_: seen.append(gm) or gm.forward)
    compiled(blocks(2), **{option: True})(states(2, 5))
    assert len(seen) == 1
    assert compiles.reports[0].whole == backend._WHOLE[option]


# --- options and report -------------------------------------------------------------------------------------------


def test_options_are_read_and_in_the_key_of_caches():
    plain, cut = Options.parse({}), Options.parse({"piecewise": True})
    named = Options.parse({"piecewise": True, "splitting_ops": ["a::b"]})
    assert (cut.splitting_ops, named.splitting_ops) == (ATTENTION, ("a::b",))
    assert len({RewritePass(options).uuid() for options in (plain, cut, named)}) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"piecewise": 1}, "option 'piecewise' must be True or False, got 1"),
        ({"piecewise": True, "splitting_ops": "attend"}, "must be a list of names of ops, got 'attend'"),
        ({"splitting_ops": ["attend"]}, "needs 'piecewise': True beside it"),
        ({"splitting_modules": ["*.attn"]}, "option 'splitting_modules' needs 'piecewise': True beside it"),
        ({"piecewise": True, "splitting_modules": "attn"}, "must be a list of names of modules, got 'attn'"),
        ({"piecewise": True, "splitting_ops": 3}, "must be a list of names of ops, got 3"),
    ],
)
def test_options_that_cannot_be_say_why(given, says):
    with pytest.raises(FxQuantError, match=says):
        Options.parse(given)


def test_a_pass_for_another_set_up_is_not_in_pieces():
    with pytest.raises(FxQuantError, match="option 'piecewise' is the backend's"):
        fx_quant.inductor_pass(piecewise=True)


def test_pieces_survive_json():
    report = Report("x86", (), (), pieces=(PieceReport(0, 1, 3), PieceReport(1, 2, 7)), whole="")
    assert Report.from_json(report.to_json()) == report


def test_inductor_compiles_the_pieces_and_serves_all_layers():
    """The one that generates code; writes are counted."""
    torch._dynamo.reset()
    model, other, x = blocks(4, Cached), blocks(4, Cached), states(1, 2)
    with torch.no_grad():
        run = compiled(model)
        for at in ([0, 1], [2, 3], [3, 7]):
            for block in (*model, *other):
                block.at.copy_(torch.tensor(at))
            before = [block.keys._version for block in model]
            torch.testing.assert_close(run(x), other(x), rtol=1e-5, atol=1e-5)
            assert all(block.keys._version > old for block, old in zip(model, before, strict=True))
            torch.testing.assert_close(model[3].keys, other[3].keys, rtol=1e-5, atol=1e-5)
