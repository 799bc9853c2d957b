"""What the tuner decides from given times, what it does with its budget, and its command. Nothing here is timed."""

from __future__ import annotations

import json
import re

import pytest
import torch

import fx_quant
from fx_quant.__main__ import main
from fx_quant.errors import FxQuantError
from fx_quant.kernels.cpu import candidates, tuner
from fx_quant.kernels.cpu import plans as tuning
from fx_quant.kernels.cpu.candidates import Timer, TunedKernel
from fx_quant.kernels.cpu.native import INT8_VNNI
from fx_quant.kernels.cpu.plans import DEFAULT, Plan
from fx_quant.kernels.cpu.tuner import Step, decide_all, steps
from fx_quant.tuning.search import Budget, choose

KERNEL = TunedKernel("kind", "vnni", torch.int8, torch.int8, INT8_VNNI)
SHAPES = ((64, 64), (128, 128))
CANDIDATES = (0, 4096, 8192, 16384)
STEP = Step(KERNEL, 4, "ahead", CANDIDATES, SHAPES)


def decide(times):
    """``(value, gain)`` of ``STEP`` under the default plans."""
    ((decision,), _) = decide_all([STEP], times, Budget(1e6, times.clock))
    return decision.chosen, decision.gain


class Times:
    """A ``Measure`` of known times that moves a clock.

    Args:
        of: ``(call, shape, plan)`` to seconds; the call counts from 0.
        each: seconds by which the clock moves for each call.
    """

    def __init__(self, of, each=1.0):
        self.of, self.each, self.now, self.calls = of, each, 0.0, []

    def __call__(self, kernel, rows, shape, tables):
        plans = [table.plan_for(rows) for table in tables]
        found = [self.of(len(self.calls), shape, plan) for plan in plans]
        self.calls.append((kernel.kind, rows, shape, plans))
        self.now += self.each
        return found

    def clock(self):
        return self.now


def by_ahead(seconds):
    return lambda call, shape, plan: seconds.get(plan.ahead, 1.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for plans."""
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path / "plans"))
    tuning.PLANS.forget()
    yield tmp_path / "plans"
    tuning.PLANS.forget()


@pytest.fixture
def given_times(folder, monkeypatch):
    """The tuner with one kernel of known times: 4096 bytes ahead is a tenth faster."""
    times = Times(by_ahead({4096: 0.9}))
    monkeypatch.setattr(tuner, "tuned_kernels", lambda *_: (KERNEL,))
    monkeypatch.setattr(tuner, "supported_kernels", lambda: (KERNEL,))
    monkeypatch.setattr(tuner, "Timer", lambda *_: times)
    return times


# --- one decision -------------------------------------------------------------------------------------------------


def test_the_fastest_candidate_is_chosen_after_a_second_round():
    times = Times(by_ahead({0: 0.95, 4096: 0.8, 16384: 1.2}))
    chosen, gain = decide(times)
    assert (chosen, pytest.approx(gain)) == (4096, 0.25)
    assert [[plan.ahead for plan in plans] for *_, plans in times.calls] == [
        *[[8192, 0, 4096, 16384, 8192]] * 2,
        *[[8192, 4096, 8192, 4096]] * 2,
    ]


@pytest.mark.parametrize(("seconds", "chosen"), [(1 / 1.031, 4096), (1 / 1.029, 8192), (1.0, 8192), (1.5, 8192)])
def test_three_percent_is_what_it_takes(seconds, chosen):
    assert decide(Times(by_ahead({4096: seconds})))[0] == chosen


def test_a_gain_that_is_not_confirmed_is_none():
    times = Times(lambda call, shape, plan: 0.7 if plan.ahead == 4096 and call < 2 else 1.0)
    assert decide(times) == (8192, 0.0)
    assert len(times.calls) == 4


def test_a_candidate_that_slows_one_shape_is_not_chosen():
    times = Times(lambda call, shape, plan: {64: 0.5, 128: 1.05}[shape[0]] if plan.ahead == 4096 else 1.0)
    assert decide(times) == (8192, 0.0)


def test_what_the_default_differs_from_itself_is_no_gain():
    class Burst(Times):
        """The first table of each call is slow, whatever it is."""

        def __call__(self, *arguments):
            first, *rest = super().__call__(*arguments)
            return [first * 1.3, *rest]

    assert decide(Burst(by_ahead({}))) == (8192, 0.0)


def test_a_candidate_that_is_only_sometimes_faster_is_not_chosen():
    class Unsteady(Times):
        """The last table of a second round is slower than it was at first."""

        def __call__(self, *arguments):
            *others, last = super().__call__(*arguments)
            return [*others, last * 1.2 if len(self.calls) > 2 else last]

    assert decide(Unsteady(by_ahead({4096: 0.9}))) == (8192, 0.0)


def test_where_nothing_else_can_be_tried_the_default_stays():
    choice = choose(["default"], [lambda values: [2.0 for _ in values]])
    assert (choice.index, choice.gain, choice.seconds) == (0, 0.0, (2.0, 2.0))


def test_only_the_range_of_the_step_changes():
    times = Times(by_ahead({4096: 0.8}))
    decisions, tables = decide_all([STEP], times, Budget(100.0, times.clock))
    assert tables["kind"] == DEFAULT.replaced(4, ahead=4096)
    (decision,) = decisions
    assert (decision.rows, decision.default, decision.chosen) == ("3..6", 8192, 4096)


def test_a_later_parameter_is_tried_under_what_was_chosen_before():
    times = Times(by_ahead({4096: 0.8}))
    second = Step(KERNEL, 4, "alone", (0, 2**15), SHAPES)
    decide_all([STEP, second], times, Budget(100.0, times.clock))
    assert all(plan.ahead == 4096 for *_, plans in times.calls[4:] for plan in plans)


# --- the budget ---------------------------------------------------------------------------------------------------


def test_compiling_takes_half_of_the_budget_at_most(monkeypatch):
    compiled = []
    supported = tuple(TunedKernel(str(i), "vnni", torch.int8, torch.int8, INT8_VNNI) for i in range(9))
    now = [0.0]

    def runs(kernel):
        compiled.append(kernel)
        now[0] += 4.0
        return True

    monkeypatch.setattr(candidates, "supported_kernels", lambda: supported)
    monkeypatch.setattr(candidates, "_runs", runs)
    monkeypatch.setattr(candidates.time, "perf_counter", lambda: now[0])
    assert candidates.tuned_kernels(Budget(20.0, lambda: now[0])) == supported[:2]
    assert candidates.tuned_kernels() == supported
    assert candidates.tuned_kernels(Budget(1.0, lambda: now[0])) == supported[:1]


@pytest.mark.parametrize(("budget", "calls", "decided"), [(3.5, 3, 0), (4.0, 4, 1), (7.9, 7, 1), (0.0, 0, 0)])
def test_no_measurement_begins_that_would_end_after_the_budget(budget, calls, decided):
    times = Times(by_ahead({4096: 0.9}))
    steps_ = [Step(KERNEL, rows, "ahead", CANDIDATES, SHAPES) for rows in (4, 16, 64)]
    decisions, tables = decide_all(steps_, times, Budget(budget, times.clock))
    assert (len(times.calls), len(decisions)) == (calls, decided)
    assert [plan.ahead for _, plan in tables["kind"].ranges] == [8192] + [4096] * decided + [8192] * (4 - decided)


def test_time_spent_before_the_first_step_counts():
    times = Times(by_ahead({}))
    budget = Budget(5.0, times.clock)
    times.now = 6.0
    assert decide_all([STEP], times, budget)[0] == []


def test_steps_go_from_few_rows_to_many_and_ask_what_matters():
    decodes = TunedKernel("decodes", "columns", torch.float32, torch.int8)
    found = [(step.rows, step.kernel.kind, step.parameter) for step in steps((KERNEL, decodes), SHAPES, 2)]
    assert [rows for rows, *_ in found] == sorted(rows for rows, *_ in found)
    assert {parameter for rows, kind, parameter in found if (rows, kind) == (1, "kind")} == {"alone"}
    assert {parameter for rows, kind, parameter in found if (rows, kind) == (1, "decodes")} == {"ahead", "alone"}
    assert {parameter for rows, kind, parameter in found if (rows, kind) == (16, "kind")} == {
        "next_panel",
        "chunk_k",
        "alone",
    }
    assert not [step for step in steps((KERNEL, decodes), SHAPES, 1) if step.parameter == "alone"]


# --- all of it ----------------------------------------------------------------------------------------------------


def test_what_was_decided_is_saved_and_in_force(given_times, folder):
    report = fx_quant.tune(SHAPES, budget_seconds=1e6)
    assert [(d.rows, d.chosen) for d in report.decisions if d.chosen != d.default] == [("3..6", 4096)]
    assert report.unreached == ()
    assert report.path is not None and report.path.parent == folder
    assert tuning.table("kind") == DEFAULT.replaced(4, ahead=4096)
    assert {shape for *_, shape, _ in given_times.calls} >= set(SHAPES)


def test_nothing_is_written_where_the_defaults_are_fastest(given_times, folder):
    given_times.of = by_ahead({})
    assert fx_quant.tune(SHAPES, budget_seconds=1e6).path is None
    assert not folder.exists()


def test_measuring_again_takes_back_what_is_no_longer_faster(given_times, folder):
    fx_quant.tune(SHAPES, budget_seconds=1e6)
    given_times.of = by_ahead({})
    assert fx_quant.tune(SHAPES, budget_seconds=1e6).path is None
    assert list(folder.iterdir()) == []
    assert tuning.table("kind") is DEFAULT


def test_what_is_not_reached_stays_as_it_was(given_times, monkeypatch):
    path = tuning.PLANS.save({"kind": DEFAULT.replaced(256, next_panel=False)}, tuning.this_machine())
    real = decide_all
    monkeypatch.setattr(
        tuner, "decide_all", lambda plan, measure, _: real(plan, measure, Budget(18.5, given_times.clock))
    )
    report = fx_quant.tune(SHAPES, budget_seconds=18.5)
    assert report.unreached and "kind 256 next_panel" in report.unreached
    assert tuning.table("kind") == DEFAULT.replaced(256, next_panel=False).replaced(4, ahead=4096)
    assert report.path == path
    assert "not reached within the budget" in str(report)


def test_nothing_reached_writes_nothing(given_times, folder, monkeypatch):
    monkeypatch.setattr(tuner, "decide_all", lambda plan, *_: ([], {"kind": DEFAULT}))
    report = fx_quant.tune(SHAPES)
    assert report.path is None and not folder.exists()
    assert "nothing was decided" in str(report)


def test_threads_are_those_asked_for_and_then_as_before(given_times, folder):
    before = torch.get_num_threads()
    seen = []
    given_times.of = lambda call, shape, plan: seen.append(torch.get_num_threads()) or by_ahead({4096: 0.9})(0, 0, plan)
    report = fx_quant.tune(SHAPES, budget_seconds=1e6, threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    assert report.machine.threads == before + 1
    assert tuning.table("kind") is DEFAULT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": [(0, 64)]}, r"a shape must be \(n, k\)"),
        ({"shapes": [(64,)]}, r"a shape must be \(n, k\)"),
        ({"budget_seconds": 0}, "budget must be a positive number"),
        ({"budget_seconds": float("nan")}, "budget must be a positive number"),
        ({"threads": 0}, "threads must be 1 or more"),
    ],
)
def test_bad_arguments_are_errors(arguments, message, given_times):
    with pytest.raises(FxQuantError, match=message):
        fx_quant.tune(**arguments)
    assert given_times.calls == []


def test_without_a_native_kernel_there_is_nothing_to_tune(folder, monkeypatch):
    monkeypatch.setattr(tuner, "tuned_kernels", lambda *_: ())
    with pytest.raises(FxQuantError, match="none; see `python -m fx_quant doctor`"):
        fx_quant.tune()


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_measured(given_times, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(FxQuantError, match="set FX_QUANT_CACHE_DIR"):
        fx_quant.tune(SHAPES)
    assert given_times.calls == []


# --- what is timed ------------------------------------------------------------------------------------------------

HERE = candidates.supported_kernels()


@pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.kind)
def test_every_kernel_here_runs_under_given_plans(kernel, monkeypatch):
    monkeypatch.setattr(candidates, "cache_bytes", lambda: 2**16)
    tables = (DEFAULT, DEFAULT.replaced(3, ahead=0), DEFAULT.replaced(3, chunk_k=64))
    times = Timer((kernel,), ((70, 256),))(kernel, 3, (70, 256), tables)
    assert len(times) == 3 and all(seconds > 0 for seconds in times)


def test_weights_go_by_twice_the_cache(monkeypatch):
    monkeypatch.setattr(candidates, "cache_bytes", lambda: 2**20)
    weights = Timer((KERNEL,), ((256, 256),))._weights(KERNEL, (256, 256))
    assert sum(each.nbytes for each in weights) == 2**21
    assert len({each.data_ptr() for each in weights}) == 32


@pytest.mark.parametrize("kernel", [kernel for kernel in HERE if kernel.kind in ("int8_vnni", "float32_decoded_int8")])
def test_a_plan_that_changes_a_result_is_an_error(kernel, monkeypatch):
    name = "decoded_matmul" if kernel.decodes else "matmul"
    real = getattr(candidates, name)
    wrong = Plan(ahead=64)

    def broken(*arguments):
        out = real(*arguments)
        if arguments[-1].plan_for(3) == wrong:
            out[0, 0] += 1 + out.abs().max() // 100
        return out

    monkeypatch.setattr(candidates, name, broken)
    monkeypatch.setattr(candidates, "cache_bytes", lambda: 2**16)
    with pytest.raises(FxQuantError, match="a plan must not change results"):
        Timer((kernel,), ((70, 256),))(kernel, 3, (70, 256), (DEFAULT, DEFAULT.replaced(3, ahead=64)))


# --- the command --------------------------------------------------------------------------------------------------


def test_tune_command_prints_what_changed(given_times, capsys):
    assert main(["tune", "--budget", "1e6", "--shapes", "64x64", "128x128"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"kind +3\.\.6 +ahead +8192 +4096 +\+11\.1%", out)
    assert "1 of " in out and "saved in" in out
    assert {shape for *_, shape, _ in given_times.calls} >= {(64, 64), (128, 128)}


def test_tune_command_prints_json(given_times, capsys):
    assert main(["tune", "--budget", "1e6", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [d["chosen"] for d in data["decisions"] if d["chosen"] != d["default"]] == [4096]
    assert data["unreached"] == [] and data["machine"]["torch"] == torch.__version__


def test_show_and_reset(given_times, folder, capsys):
    assert main(["tune", "--show"]) == 0
    assert "nothing was measured, the defaults are in force" in capsys.readouterr().out
    path = tuning.PLANS.save({"kind": DEFAULT.replaced(4, ahead=4096)}, tuning.this_machine())
    assert main(["tune", "--show"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"kind +measured +6 +4096", out) and str(path) in out
    assert main(["tune", "--show", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kernels"]["kind"]["measured"] and data["path"] == str(path)
    assert main(["tune", "--reset"]) == 0
    assert f"deleted {path}" in capsys.readouterr().out
    assert main(["tune", "--reset", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": None}
    assert given_times.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "a shape must be NxK, such as 4096x4096, got '4096'"),
        (["--shapes", "64x64", "x64"], "got 'x64'"),
        (["--shapes", "0x64"], "both 1 or more, got (0, 64)"),
        (["--budget", "-1"], "budget must be a positive number of seconds, got -1.0"),
        (["--budget", "inf"], "budget must be a positive number"),
    ],
)
def test_bad_input_is_one_line_and_status_two(arguments, message, given_times, capsys):
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert given_times.calls == []
