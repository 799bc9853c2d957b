"""Ranges of m, proven or declared: they choose kernels and drop pads, and what they are chosen for is checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.decorators import mark_unbacked

from fx_quant.backend import RewritePass
from fx_quant.config import Options
from fx_quant.errors import FxQuantError, NoKernelError
from fx_quant.kernels import registry
from fx_quant.kernels.context import CompileContext
from fx_quant.kernels.padding import unmet_by_context
from fx_quant.kernels.registry import by_rows, kernel, register_op
from fx_quant.kernels.select import select
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import Kind
from fx_quant.scheme import Numerics, Scheme
from fx_quant.target import named_target
from tests.graphs import calls
from tests.test_context import Int8Linear, Rewritten, sample
from tests.tolerances import assert_within

X86 = named_target("x86_vnni")
INT8 = Scheme.parse("int8 per_token (dynamic) x int8 per_channel")
MS = (2, 3, 15, 16, 17, 18, 33, 128)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """``few_int8``, before all other kernels, for up to 16 rows."""
    base = kernel("pytorch_int_mm")
    chosen = replace(base, name="few_int8", requires=replace(base.requires, rows=SizeRange(0, 16)))
    monkeypatch.setitem(registry._KERNELS, chosen.name, chosen)
    monkeypatch.setitem(registry._PRIORITY, chosen.name, 1000)
    return chosen


@pytest.mark.parametrize(
    ("low", "high", "fits"), [(0, 16, True), (3, 3, True), (1, 17, False), (17, 17, False), (2, None, False)]
)
def test_a_kernel_for_few_rows_is_chosen_where_all_rows_are_few(low, high, fits):
    asked = Problem(INT8, SizeRange(low, high), 32, 64, torch.float32, None, constant_weight=True)
    selection = select(asked, X86)
    assert (selection.kernel.name == "few_int8") == fits
    (unmet,) = [verdict.unmet for verdict in selection.verdicts if verdict.kernel == "few_int8"]
    assert [each.kind for each in unmet] == ([] if fits else [Kind.ROWS])
    if not fits:
        with pytest.raises(NoKernelError, match=rf"runs 0\.\.16 rows, got m={asked.m}"):
            select(asked, X86, force_kernel="few_int8")


def test_a_kernel_for_few_rows_is_no_kernel_for_all(few_rows):
    asked = Problem(INT8, SizeRange(1, 4), 32, 64, torch.float32, None, constant_weight=True)
    context = CompileContext(deterministic=True)
    assert select(asked, X86, context=context).kernel.name != "few_int8"
    assert [each.kind for each in unmet_by_context(asked, few_rows, context)] == [Kind.DETERMINISTIC]


def run_all(model, backend, ms, *, mark=None, k=64):
    """The kernel of each graph that calls with ``ms`` rows compile, in order; each call gives what eager does."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for m in ms:
            x = sample(m, k)
            if mark is not None:
                mark(x)
            assert_within(compiled(x), model(x), Numerics.EXACT)
    return [report.sites[0].kernel for report in backend.reports]


class Chosen(Rewritten):
    """As ``Rewritten``, with the kernel that is chosen, and guards where the options ask for some."""

    def __init__(self, **options) -> None:
        self.options = Options.parse(options)
        self.graphs, self.reports = [], []
        self.guards = bool(options.get("ranges"))


@pytest.mark.parametrize(("low", "high", "few"), [(2, 16, True), (2, 17, False), (17, 64, False)])
def test_rows_that_are_marked_with_their_bounds_choose_the_kernel(low, high, few):
    def mark(x):
        torch._dynamo.mark_dynamic(x, 0, min=low, max=high)

    chosen = run_all(Int8Linear(), Chosen(), (low, high), mark=mark)
    assert [name == "few_int8" for name in chosen] == [few]


def test_rows_that_are_checked_in_the_model_choose_the_kernel():
    class Checked(Int8Linear):
        def forward(self, x):
            torch._check(x.shape[0] <= 16)
            return super().forward(x)

    assert run_all(Checked(), Chosen(), (2, 9, 16)) == ["few_int8"]


def test_each_declared_range_is_compiled_once_for_itself():
    backend = Chosen(ranges=["..16", "17..64"])
    chosen = run_all(Int8Linear(), backend, MS)
    # The last, 128, is in no range: one graph for the rest.
    assert [name == "few_int8" for name in chosen] == [True, False, False]
    assert [report.sites[0].m for report in backend.reports] == ["2..16", "17..64", "2.."]


def test_a_declared_range_is_one_of_all_rows_of_a_batch():
    class Batched(Int8Linear):
        def forward(self, x):
            return super().forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    torch._dynamo.reset()
    model, backend = Batched(), Chosen(ranges=[(1, 16)])
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch, tokens in ((2, 3), (4, 4), (2, 8), (3, 7), (16, 16)):
            x = sample(batch * tokens).reshape(batch, tokens, 64)
            assert_within(compiled(x), model(x), Numerics.EXACT)
    assert [report.sites[0].kernel == "few_int8" for report in backend.reports] == [True, False]


def test_a_declared_range_of_enough_rows_pads_none(monkeypatch):
    padded = replace(kernel("pytorch_int_mm"), least_rows=17)
    monkeypatch.setitem(registry._KERNELS, padded.name, padded)
    backend = Chosen(ranges=["..16", "17.."], padding="always", force_kernel="pytorch_int_mm")
    run_all(Int8Linear(), backend, MS)
    assert [report.sites[0].padding for report in backend.reports] == ["m <17->17", "none"]
    assert [len(calls(graph, torch.sym_max)) for graph in backend.graphs] == [1, 0]


@pytest.mark.parametrize("mark", [lambda x: torch._dynamo.mark_dynamic(x, 0), lambda x: mark_unbacked(x, 0)])
def test_rows_of_which_no_guard_may_be_asked_are_planned_for_all(mark):
    backend = Chosen(ranges=["..16", "17.."])
    backend.guards = False
    (chosen,) = run_all(Int8Linear(), backend, MS, mark=mark)
    assert chosen != "few_int8"


WAYS: list[tuple[str, int]] = []


def _way(name):
    def body(*given, **more):
        WAYS.append((name, given[0].shape[0]))
        return torch.ops.fx_quant.pytorch_int_mm(*given, **more)

    return body


register_op("rows_test", by_rows(16, _way("few"), _way("many")))


def test_one_op_of_two_ways_is_one_graph_for_all_rows(monkeypatch):
    both = replace(kernel("pytorch_int_mm"), name="rows_test", op="rows_test")
    monkeypatch.setitem(registry._KERNELS, both.name, both)
    monkeypatch.setitem(registry._PRIORITY, both.name, 2000)
    WAYS.clear()
    assert run_all(Int8Linear(), Chosen(), MS) == ["rows_test"]
    assert [("few" if m <= 16 else "many", m) for m in MS] == WAYS


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["..16", "17.."], [(None, 16), (17, None)], [SizeRange(0, 16), "17.."]])
def test_ranges_are_read_however_they_are_written(given):
    expected = (SizeRange(0, 16), SizeRange(17, None))
    assert Options.parse({"ranges": given}).ranges == expected
    assert CompileContext.of(Options.parse({"ranges": given})) == CompileContext(ranges=expected)


@pytest.mark.parametrize(
    "wrong", ["..16", 16, ["16"], ["a..b"], [(1, 2, 3)], [(3, 1)], ["3..1"], [(-1, 2)], [(1.0, 2)]]
)
def test_what_is_no_range_is_refused(wrong):
    with pytest.raises(FxQuantError, match="'ranges' must be"):
        Options.parse({"ranges": wrong})


def test_ranges_are_part_of_the_key_of_artefacts():
    keys = {repr(RewritePass(Options.parse({"ranges": r}), X86).uuid()) for r in ([], ["..16"], ["..17"])}
    assert len(keys) == 3


def test_sizes_that_are_marked_are_part_of_the_key_of_artefacts():
    """An artefact of a size without a mark has a guard on it, which a size with a mark refuses."""
    keys = []

    def backend(gm, _):
        keys.append(repr(RewritePass(Options.parse({"ranges": ["..16"]}), X86).uuid()))
        return gm

    marks = torch._dynamo.maybe_mark_dynamic, torch._dynamo.mark_dynamic
    for mark in (*marks, *marks):
        torch._dynamo.reset()
        x = sample(5)
        mark(x, 0)
        torch.compile(torch.sin, backend=backend)(x)
    assert keys[:2] == keys[2:]
    assert keys[0] != keys[1]
