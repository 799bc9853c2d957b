"""Pieces compiled for some numbers of rows by themselves: the same results for every m, and how often each is compiled."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import fx_quant
from fx_quant.backend import RewritePass
from fx_quant.config import ATTENTION, Options, PaddingPolicy
from fx_quant.errors import FxQuantError
from fx_quant.piecewise import compile as compile_module
from fx_quant.piecewise.compile import compile_in_pieces
from fx_quant.piecewise.sizes import Asked, Layout
from fx_quant.report import PieceReport, Report
from tests.test_piecewise import HIDDEN, Cached, IntoBuffer, Opaque, blocks, compiled, compiles  # noqa: F401

SIZES = (1, 2, 4, 16, 32)
EVERY_M = (2, 0, 1, 3, 15, 16, 17, 31, 32, 33, 128)


class Pieces:
    """Runs a model in pieces that are not compiled, and are particular about the layout of what they are given."""

    def __init__(self):
        self.compiled, self.reports = [], []

    def run(self, model, sizes=SIZES, padding="always", ops=ATTENTION, dynamic=None, deterministic=False):
        asked = Asked(tuple(sizes), PaddingPolicy(padding), deterministic)

        def backend(gm, example_inputs):
            run, report = compile_in_pieces(gm, example_inputs, ops, self.compile, asked=asked)
            self.reports.append(report)
            return run

        return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)

    def compile(self, piece, example_inputs):
        nodes = piece.graph.find_nodes(op="placeholder")
        self.compiled.append(piece)

        def run(*inputs):
            """As Inductor's code would: reads memory where the strides that were said put it."""
            known = {}
            for node, given in zip(nodes, inputs, strict=True):
                value = node.meta["example_value"]
                if isinstance(value, torch.Tensor):
                    for size, actual in zip(value.shape, given.shape, strict=True):
                        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                            known[size.node.expr] = actual
            for node, given in zip(nodes, inputs, strict=True):
                value = node.meta["example_value"]
                if isinstance(value, torch.Tensor):
                    if len(known) > 1 or not given.numel():
                        continue  # strides of nothing are nobody's concern
                    wanted = Layout.of(value)
                    for symbol, number in known.items():
                        wanted = wanted.at(symbol, number)
                    strides = zip(given.shape, given.stride(), wanted.stride, strict=True)
                    assert all(size == 1 or have == want for size, have, want in strides), (
                        node,
                        wanted,
                        given.stride(),
                    )
            return piece(*inputs)

        return run, Report("x86", (), ())

    @property
    def rows(self):
        return self.reports[0].pieces


@pytest.fixture
def pieces():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield Pieces()
    torch._dynamo.reset()


def rows(m, dim=1, other=1):
    """``[1, m, hidden]`` or ``[m, 3, hidden]``, different in each row."""
    shape = [other, other, HIDDEN]
    shape[dim] = m
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(m))
    if m > 1:
        torch._dynamo.mark_dynamic(x, dim)
    return x


# --- every m ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "dim", "other"), [("always", 1, 1), ("always", 1, 3), ("always", 0, 3), ("auto", 1, 1)]
)
def test_every_m_is_right_and_nothing_compiles_twice(pieces, padding, dim, other):
    model = blocks(3)
    run = pieces.run(model, padding=padding)
    for times in (1, 2):
        for m in EVERY_M:
            x = rows(m, dim, other) * times
            if m > 1:
                torch._dynamo.mark_dynamic(x, dim)
            assert torch.equal(run(x), model(x)), m
        # Dynamo has graphs of its own for 0 and 1 rows: three pieces of each, three for all m, three for each size used.
        assert counters["stats"]["unique_graphs"] == 3
        assert len(pieces.compiled) == 3 * (3 + {"always": 4, "auto": 3}[padding])


def test_sizes_are_compiled_on_their_first_use_and_once_for_all_layers(pieces):
    model = blocks(6)
    run = pieces.run(model)
    run(rows(40))
    assert len(pieces.compiled) == 3
    for m in (16, 16, 9, 12):
        x = rows(m)
        assert torch.equal(run(x), model(x))
        assert len(pieces.compiled) == 6
    run(rows(17))
    assert len(pieces.compiled) == 9
    assert [row.count for row in pieces.rows] == [1, 5, 1]


def test_what_is_compiled_for_a_size_has_no_other(pieces):
    """So that selection is for exactly that m."""
    pieces.run(blocks(2))(rows(16))
    for piece in pieces.compiled[3:]:
        assert not any(
            isinstance(n.meta["example_value"], torch.SymInt) for n in piece.graph.find_nodes(op="placeholder")
        )


@pytest.mark.parametrize(
    ("kind", "op"), [(Opaque, "fx_quant_tests::attend"), (IntoBuffer, "fx_quant_tests.attend_into")]
)
def test_ops_of_the_users_between_padded_pieces(pieces, kind, op):
    model = blocks(4, kind)
    run = pieces.run(model, ops=[op])
    for m in (40, 7, 16, 3):
        x = rows(m)
        assert torch.equal(run(x), model(x))
    assert [row.unpadded for row in pieces.rows] == ["", "", ""]


def test_static_shapes_have_no_sizes(pieces):
    model, x = blocks(2), torch.randn(1, 5, HIDDEN)
    assert torch.equal(pieces.run(model, dynamic=False)(x), model(x))
    assert {row.unsized for row in pieces.rows} == {"no size is dynamic: it is compiled for its own"}
    assert len(pieces.compiled) == 3


def test_two_dynamic_dims_have_no_sizes(pieces):
    model = blocks(2)
    run = pieces.run(model, dynamic=True)
    for shape in ((2, 5), (3, 16), (16, 4)):
        x = torch.randn(*shape, HIDDEN)
        assert torch.equal(run(x), model(x))
    assert all(row.unsized.startswith("2 sizes are dynamic: ") for row in pieces.rows)
    assert len(pieces.compiled) == 3


def test_one_plan_for_all_m_has_no_sizes(pieces):
    pieces.run(blocks(2), deterministic=True)(rows(7))
    assert {row.unsized for row in pieces.rows} == {"deterministic=True has one plan for all numbers of rows"}


def test_a_number_that_changes_from_call_to_call_is_no_size(pieces):
    model = blocks(1)
    run = pieces.run(lambda x, number: model(x * number) + number)
    x = torch.randn(1, 3, HIDDEN)
    for number in (3, 4, -5, 7):
        assert torch.equal(run(x, number), model(x * number) + number)
    unsized = {row.unsized.partition(" ")[2] for report in pieces.reports[1:] for row in report.pieces}
    assert "is a number and no tensor's size" in unsized


def test_a_piece_that_is_given_nothing_but_a_size_leaves_it_dynamic(pieces):
    model = blocks(1)

    def with_numbers(x):
        numbers = torch.arange(x.shape[1])  # all there is before the first cut
        return F.scaled_dot_product_attention(x, x, x) + model(x) * numbers[:, None]

    run = pieces.run(with_numbers)
    for m in (7, 5, 4):
        x = rows(m)
        assert torch.equal(run(x), with_numbers(x)), m
    assert counters["stats"]["unique_graphs"] == 1


def test_the_largest_size_may_be_the_least_number_of_rows(pieces):
    model = blocks(1)
    run = pieces.run(model, sizes=(4, 16))
    for m in (20, 16, 17):
        x = torch.randn(1, m, HIDDEN)
        torch._dynamo.mark_dynamic(x, 1, min=16, max=64)
        assert torch.equal(run(x), model(x)), m
    assert [(row.sizes, row.unpadded) for row in pieces.rows] == [((16,), "")] * 2


def test_a_graph_of_nothing_but_its_cut_is_whole_and_says_so(pieces):
    run = pieces.run(F.scaled_dot_product_attention)
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    assert torch.equal(run(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert pieces.reports[0].whole == "there is nothing to compile before, between or after its cuts"


def test_a_range_that_is_marked_bounds_the_sizes(pieces):
    model, x = blocks(2), torch.randn(1, 8, HIDDEN)
    torch._dynamo.mark_dynamic(x, 1, min=4, max=20)
    run = pieces.run(model)
    assert torch.equal(run(x), model(x))
    assert [row.sizes for row in pieces.rows] == [(4, 16)] * 3
    y = torch.randn(1, 18, HIDDEN)
    assert torch.equal(run(y), model(y))


# --- what is given and returned -----------------------------------------------------------------------------------


class Step(nn.Module):
    """What ``step`` makes of ``x`` and of the attention over it."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.register_buffer("table", torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("seen", torch.zeros(HIDDEN))

    def forward(self, x):
        return self.step(self, x, lambda y: F.scaled_dot_product_attention(y, y, y))


def returns_sizes(self, x, attend):
    y = attend(x * 2)
    return y.reshape(y.shape[0], -1) + 1, x.shape[1], 3 * x.shape[1] + 1


def sizes_across_a_cut(self, x, attend):
    m = x.shape[1]
    y = attend(x + 1)
    return attend(y.reshape(-1, HIDDEN).sin().reshape(1, m, HIDDEN)) + 1


def expands(self, x, attend):
    y = attend(x + 1)
    return attend((y[..., :1]).expand(-1, -1, HIDDEN) * 2) * 3


def tokens(self, x, attend):
    return attend(F.embedding((x[..., 0] * 0).long() + 63, self.table)) + x


def views(self, x, attend):
    q, k = (x @ self.table.t()).chunk(2, -1)
    return attend(q) + k, attend(k.transpose(0, 1).sin()).transpose(0, 1) * 2


def constants(self, x, attend):
    return attend(x + self.table[0]) * 2, self.table * 2


def many_layouts(self, x, attend):
    y = attend((x + 1).transpose(-1, -2).contiguous().transpose(-1, -2))
    return (y * 2).transpose(0, 1), (y + 1).transpose(-1, -2)


@pytest.mark.parametrize(
    "step",
    [returns_sizes, sizes_across_a_cut, expands, tokens, views, constants, many_layouts],
    ids=lambda s: s.__name__,
)
@pytest.mark.parametrize(("dim", "other"), [(1, 1), (1, 3)])
def test_padded_results_are_those_of_the_rows(pieces, step, dim, other):
    if step is sizes_across_a_cut and other == 3:
        pytest.skip("is for a batch of one")
    model = Step(step)
    run = pieces.run(model)
    for m in (40, 7, 16, 3, 2, 31):
        x = rows(m, dim, other)
        actual, expected = run(x), model(x)
        # A BLAS sums the products of a float matmul in another order for another number of rows.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(*(o if isinstance(o, tuple) else (o,) for o in (actual, expected)), strict=True):
            if isinstance(ours, torch.Tensor):
                assert ours.shape == theirs.shape
            else:
                assert type(ours) is int
    assert any(row.sizes and not row.unpadded for row in pieces.rows)


def softmax_over_rows(self, x, attend):
    return attend(x * 2) * x.softmax(1)


def per_tensor_scale(self, x, attend):
    y = attend(x * 2)
    return (y / y.abs().amax()).round()


def last_token(self, x, attend):
    return attend(x * 2).sin()[:, -1]


def writes_a_buffer(self, x, attend):
    self.seen.add_(1)
    return attend(x * 2) + self.seen


def writes_its_input(self, x, attend):
    y = attend(x * 2)
    return x.add_(y)


def returns_its_input(self, x, attend):
    return x, x[:, :, 1:], attend(x * 2)


def returns_views(self, x, attend):
    y = x * 2
    part = y[..., :2]
    return attend(y), y, part


def positions(self, x, attend):
    return attend(x + F.embedding(torch.arange(x.shape[1]), self.table[:41])) * 2


def mean_of_rows(self, x, attend):
    return attend(x - x.mean(1, keepdim=True)) * 2


def batch_norm_in_training(self, x, attend):
    return attend(F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)) * 2


def divided_by_rows(self, x, attend):
    return attend(x / x.shape[1]) * 2


def masked(self, x, attend):
    return attend(x * (torch.ones(x.shape[1], x.shape[1]).triu().sum(0) / 64)[:, None]) * 2


def rolled(self, x, attend):
    return attend(x.roll(1, 1)) * 2


def flipped(self, x, attend):
    return attend(x.flip(1)) * 2


def sorted_rows(self, x, attend):
    return attend(x.sort(1).values) * 2


def gathered(self, x, attend):
    return attend(x.gather(1, x.argsort(1))) * 2


def joined(self, x, attend):
    return attend(torch.cat([x, x], 1)) * 2


def summed_so_far(self, x, attend):
    return attend(x.cumsum(1)) * 2


MIXING = {
    softmax_over_rows: "aten._softmax works along dim 1, in which the rows are, at _softmax",
    per_tensor_scale: "aten.amax reduces all dims, the rows with them, at amax",
    last_token: "aten.select.int takes some of dim 1, in which the rows are, at select",
    writes_a_buffer: "it writes to its input ",
    writes_its_input: "it writes to its input ",
    returns_its_input: "is memory of an input",
    returns_views: "the graph returns ",
    positions: "aten.embedding reads at the number of a row, which padding may put out of range",
    mean_of_rows: "aten.mean.dim reduces dim 1, in which the rows are, at mean",
    batch_norm_in_training: "takes mean and variance of all rows",
    divided_by_rows: "aten.div.Tensor takes the number of rows as a value, at div",
    masked: "rows",
    rolled: "aten.roll works along dim 1",
    flipped: "aten.flip works along dim 1",
    sorted_rows: "aten.sort works along dim 1",
    gathered: "works along dim 1",
    joined: "aten.cat joins tensors along dim 1",
    summed_so_far: "aten.cumsum works along dim 1",
}

# One that is found at an op, one at an input, one at an output and one at a size: ``explain`` traces each once more.
EXPLAINED = (softmax_over_rows, writes_a_buffer, returns_views, divided_by_rows)


@pytest.mark.parametrize("step", MIXING, ids=lambda step: step.__name__)
def test_what_mixes_rows_is_not_padded_and_says_why(pieces, step):
    ours, theirs = Step(step), Step(step)
    run = pieces.run(ours)
    for m in (40, 7, 16):  # larger than all sizes, between two, and one of them
        x, y = rows(m), rows(m)
        torch.testing.assert_close(run(x), theirs(y), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x, y)
        assert torch.equal(ours.seen, theirs.seen)
    report = pieces.reports[0]
    assert report.whole == ""
    assert any(MIXING[step] in row.unpadded for row in report.pieces), [row.unpadded for row in report.pieces]
    assert MIXING[step] in " ".join(str(report).split())
    if step in EXPLAINED:
        options = {"piecewise": True, "compile_sizes": SIZES, "padding": "always"}
        told = fx_quant.explain(Step(step), rows(7), options=options)
        assert [row.unpadded for row in told.pieces] == [row.unpadded for row in report.pieces]
        assert any(MIXING[step] in row["unpadded"] for row in json.loads(told.to_json())["pieces"])


def test_a_cache_is_written_by_pieces_that_are_not_padded(pieces):
    model, other = blocks(3, Cached), blocks(3, Cached)
    run = pieces.run(model, [2, 4, 8])
    for m in (5, 4, 3, 8, 2):
        for block in (*model, *other):
            block.at = torch.arange(m)
            torch._dynamo.mark_dynamic(block.at, 0)
        x = rows(m)
        assert torch.equal(run(x), other(x))
        for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
            assert torch.equal(mine, theirs)


def test_padding_repeats_the_last_row_so_that_no_index_is_out_of_range(pieces):
    """A row of zeros would read the table at 63, which it has not."""

    class FromTheEnd(Step):
        def forward(self, ids):
            y = F.embedding(63 - ids, self.table[:40])
            return F.scaled_dot_product_attention(y, y, y) * 2

    model = FromTheEnd(None)
    run = pieces.run(model)
    for m in (40, 7, 3):
        ids = torch.arange(m)[None] % 30 + 30
        torch._dynamo.mark_dynamic(ids, 1)
        torch.testing.assert_close(run(ids), model(ids))
    assert [row.unpadded for row in pieces.rows] == ["", ""]


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_size_that_cannot_be_compiled_runs_as_any_other_and_warns_once(pieces, monkeypatch):
    model = blocks(2)
    run = pieces.run(model)
    run(rows(40))

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(compile_module, "specialised", fail)
    x = rows(16)
    with pytest.warns(UserWarning, match=r"could not be compiled for m = 16, .* RuntimeError\('no'\)"):
        assert torch.equal(run(x), model(x))
    assert torch.equal(run(x), model(x))
    assert torch.equal(run(rows(9)), model(rows(9)))


def test_an_error_of_ours_is_for_the_caller(pieces, monkeypatch):
    run = pieces.run(blocks(1))
    run(rows(40))

    def fail(*_):
        raise FxQuantError("as asked")

    monkeypatch.setattr(compile_module, "specialised", fail)
    with pytest.raises(FxQuantError, match="as asked"):
        run(rows(16))


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_sizes_are_compiled_as_the_call_runs(compiles, context):  # noqa: F811
    model = blocks(1)
    run = compiled(model, compile_sizes=SIZES, padding="always")
    with context():
        for m in (40, 7, 16):
            x = rows(m)
            torch.testing.assert_close(run(x), model(x), rtol=2e-2, atol=2e-2)
    assert len(compiles.graphs) == 4


# --- options and report ---------------------------------------------------------------------------------


def test_sizes_are_read_and_in_the_key_of_caches():
    plain = Options.parse({"piecewise": True})
    some = Options.parse({"piecewise": True, "compile_sizes": [8, 1, np.int64(2), 2]})
    assert (plain.compile_sizes, some.compile_sizes) == ((), (1, 2, 8))
    assert RewritePass(plain).uuid() != RewritePass(some).uuid()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"piecewise": True, "compile_sizes": 8}, "must be a list of numbers of rows, 1 or more, got 8"),
        ({"piecewise": True, "compile_sizes": [1, 0]}, r"1 or more, got \[1, 0\]"),
        ({"piecewise": True, "compile_sizes": [True]}, r"1 or more, got \[True\]"),
        ({"piecewise": True, "compile_sizes": "12"}, "1 or more, got '12'"),
        ({"compile_sizes": [1]}, "needs 'piecewise': True beside it"),
    ],
)
def test_sizes_that_cannot_be_say_why(given, says):
    with pytest.raises(FxQuantError, match=says):
        Options.parse(given)


def test_a_model_in_sizes_is_the_eager_one_and_reported(compiles, caplog):  # noqa: F811
    caplog.set_level("INFO", "fx_quant")
    model = blocks(3)
    run = compiled(model, compile_sizes=[4, 8], padding="always")
    for m in (9, 5, 8, 3):
        x = rows(m)
        assert torch.equal(run(x), model(x))
    assert len(compiles.graphs) == 9
    assert caplog.text.count("compiled a piece for m = 8: cpu") == 3
    report = compiles.reports[0]
    assert report.pieces == (
        PieceReport(0, 1, 1, (4, 8)),
        PieceReport(1, 2, 2, (4, 8)),
        PieceReport(3, 1, 1, (4, 8)),
    )
    assert "piece 1 x 2: for m = 4, 8; other m: padded to the next" in str(report)
    assert Report.from_json(report.to_json()) == report
    told = fx_quant.explain(model, rows(5), options={"piecewise": True, "compile_sizes": [4, 8], "padding": "always"})
    assert told.pieces == tuple(replace(row, sites=None) for row in report.pieces)


def test_the_report_says_that_a_cpu_pads_nothing_by_itself(pieces):
    pieces.run(blocks(2), padding="auto")(rows(5))
    assert "other m: not padded, as padding='auto' pads no rows on a cpu" in " ".join(str(pieces.reports[0]).split())


@pytest.mark.slow
def test_inductor_compiles_sizes_and_pads_to_them():
    """The one that generates code."""
    torch._dynamo.reset()
    model = blocks(1)
    with torch.no_grad():
        run = compiled(model, compile_sizes=[16], padding="always")
        for m in (20, 9, 16):
            x = rows(m)
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
