"""Real architectures, quantized: a slice of ``make models``, and what its columns hold."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fx_quant.report import MissReport, Report, SiteReport, UnseenReport
from tests.model_matrix import __main__ as command
from tests.model_matrix import count, measure, rows
from tests.model_matrix.models import MODELS
from tests.model_matrix.outcome import Outcome, faults
from tests.model_matrix.table import page, reason_list, result_table, totals
from tests.model_matrix.ways import WAYS

# One of each kind of architecture and of each library that the development environment has.
SLICE = (
    "gpt2, torchao W8A8",
    "gpt2, quantize_ W4A16",
    "phi3, torchao 8da4w",
    "qwen3-moe, compressed-tensors W8A8",
    "vit, torchao int8 weights",
)


@pytest.mark.parametrize("name", SLICE)
def test_every_quantized_linear_is_rewritten_and_true(name):
    found = measure.measure(*rows.PAIRS[name], recompiles=name == SLICE[0])
    assert found.linears > 0 and not found.unavailable
    assert (found.rewritten, found.missed, found.outside) == (found.linears, 0, 0)
    assert faults(found) == []


def test_a_pass_that_says_nothing_is_seen(monkeypatch):
    """A report without sites is what a silent miss looks like."""
    monkeypatch.setattr("fx_quant.diagnose.explain.report_on", lambda state: Report("x86", (), ()))
    monkeypatch.setattr("fx_quant.diagnose.explain.unseen_modules", lambda *_: ())
    found = measure.measure(*rows.PAIRS["gpt2, torchao W8A8"])
    assert found.silent == found.linears > 0
    assert faults(found) == [f"{found.silent} silent"]


def test_a_site_that_computes_something_else_is_wrong(monkeypatch):
    real = measure.checking.run_passes

    def halved(graph, *args):
        state = real(graph, *args)
        for node in state.graph.nodes:
            if "fx_quant" in str(node.target) and "mm" in str(node.target):
                with state.graph.inserting_after(node):
                    half = state.graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.5))
                half.meta = dict(node.meta)
                node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)
        return state

    monkeypatch.setattr(measure.checking, "run_passes", halved)
    found = measure.measure(*rows.PAIRS["gpt2, torchao W8A8"])
    assert any(fault.startswith("wrong") for fault in faults(found))


def site(module):
    return SiteReport(module, "", "mm", "int8", "32", 8, 8, "float32", "cpu", "none", "exact", "", {})


def miss(module):
    return MissReport(module, "", "mm", "mm", "why")


@pytest.mark.parametrize(
    ("calls", "sites", "misses", "unseen", "expected"),
    [
        ({"a.q": 1, "a.k": 1}, ("a.q",), ("a.k",), (), (0, 0)),
        ({"a.q": 1, "a.k": 1}, ("a.q",), (), (), (0, 1)),
        ({"a.q": 1, "a.k": 1}, ("a.q",), (), ("a.k",), (1, 0)),
        # One that runs twice has two rows, and another's second row is none of it.
        ({"a.q": 2}, ("a.q",), (), (), (0, 1)),
        ({"a.q": 1, "a.k": 1}, ("a.q", "a.q"), (), (), (0, 1)),
        # A parent reads its child's weight; a sibling's name is no parent's.
        ({"a.q": 1, "a.k": 1}, ("a", "a"), (), (), (0, 0)),
        ({"ab": 1}, ("a",), (), (), (0, 1)),
        ({"a.q": 1}, ("a.q.inner",), (), (), (0, 0)),
        ({"a.q": 1}, ("",), (), (), (0, 0)),
    ],
)
def test_each_call_needs_a_row_of_its_own(calls, sites, misses, unseen, expected):
    report = Report(
        "x86",
        tuple(map(site, sites)),
        tuple(map(miss, misses)),
        unseen=tuple(UnseenReport(name, "Linear", False) for name in unseen),
    )
    assert count.untold(Counter(calls), report) == expected


def test_the_count_sees_a_weight_that_is_read_without_calling_its_module():
    torchao = WAYS[0]
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    model = torchao.quantize(model.eval().requires_grad_(False))
    model[2] = torch.nn.Linear(32, 32)
    x = torch.randn(4, 32)
    counts, result = count.quantized_calls(
        model, lambda: model[2](torch.nn.functional.linear(model[0](model[0](x)), model[1].weight))
    )
    assert counts == {"0": 2, "1": 1} and result.shape == (4, 32)


def test_what_a_compiler_computes_once_counts_once():
    model = WAYS[0].quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)).eval().requires_grad_(False))
    x = torch.randn(4, 32)
    counts, _ = count.quantized_calls(model, lambda: (model[0](x), model[0](x.clone()), model[0](x + 1)))
    assert counts == {"0": 2}


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, None),
        ({"missed": 1}, None),
        ({"silent": 1}, "1 silent"),
        ({"failed": "KeyError"}, "fails: KeyError"),
        ({"site_error": 2e-4}, "wrong: a site by 2.0e-04"),
        ({"site_error": 2e-4, "dtype": "bfloat16"}, None),
        ({"error": float("nan")}, "wrong: the output by nan"),
        ({"compiled": 0.05, "inductor": 1e-3}, None),
        ({"compiled": 0.3, "inductor": 0.1}, None),
        # What Inductor computes on some CPUs is no result, and excuses none.
        ({"compiled": 0.3, "inductor": 0.9}, "wrong: compiled by 3.0e-01, Inductor by 9.0e-01"),
        ({"graphs": 3, "plain_graphs": 2}, "compiles 3 graphs, Inductor 2"),
        ({"graphs": 2, "plain_graphs": 2}, None),
    ],
)
def test_what_is_a_fault(fields, fault):
    assert faults(Outcome("a", "b", **fields)) == ([fault] if fault else [])


def test_a_library_that_is_not_installed_is_named():
    model = SimpleNamespace(name="a", needs=("no-such-distribution",))
    found = measure.measure(model, WAYS[0])
    assert found.unavailable == "needs no-such-distribution"
    assert reason_list([found]) == "- needs no-such-distribution: torchao W8A8 (a)"
    assert "torchao W8A8" not in result_table([found])


def test_the_page_counts_every_row():
    found = [
        Outcome("a", "b", linears=2, rewritten=1, missed=1, reasons=("why",), graphs=3, plain_graphs=2),
        Outcome("c", "b", silent=1, linears=1),
        Outcome("d", "b", unavailable="needs e"),
    ]
    assert totals(found) == (
        "2 rows, 1 not here: 3 quantized linears, 1 rewritten, 0 recognised, 1 missed, 0 outside of graphs, 1 silent; "
        "0 rows wrong, 0 failed, 1 of 1 with more graphs than without fx_quant"
    )
    text = page(found, "today")
    assert (
        "- why: b (a)" in text and "compiles 3 graphs, Inductor 2" in text and "today; 0 minutes of one core." in text
    )


def test_rows_by_name_model_and_glob():
    assert len(rows.names()) == len(rows.PAIRS) + len(rows.BY_NAME) == len(set(rows.names()))
    assert len(rows.names(["bert"])) == len(WAYS)
    assert rows.names(["*, torchao W8A8"])[: len(MODELS)] == [f"{model.name}, torchao W8A8" for model in MODELS]
    assert set(rows.COMPILED) <= set(rows.PAIRS)
    with pytest.raises(LookupError, match="no row matches 'no-model'"):
        rows.names(["no-model"])


def test_the_command_ends_with_one_for_a_fault(monkeypatch, capsys):
    def in_workers(names, work, arguments, jobs, done, died):
        done(names[0], Outcome("a", "b", silent=1))
        died(names[1], RuntimeError("killed"))

    monkeypatch.setattr(command, "in_workers", in_workers)
    assert command.main(["llama, torchao [Wi]*", "--jobs", "1"]) == 1
    assert "a, b: 1 silent" in capsys.readouterr().err
    assert command.main(["no-model"]) == 2
