"""The developers' flows on ``x86_vnni``: each is as expected, and its graphs before and after are as their goldens say.

``EXPECTTEST_ACCEPT=1 pytest tests/test_dialects.py`` writes the goldens anew; read every line before you keep it.
``python -m tests.dialects`` shows every flow in every variant, whole models too.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config

from fx_quant.compat import row_scales_on_cpu
from fx_quant.report import MissReport, Report, SiteReport
from tests.dialects.__main__ import main
from tests.dialects.capture import built, capture, compiled, inductor_config_restored, relative_error
from tests.dialects.codes import collecting, fraction_changed
from tests.dialects.outcome import Outcome, Verdict, as_expected, judged
from tests.dialects.registry import FLOWS, Flow, flow, load, matching
from tests.dialects.table import is_as_expected, reason_list, result_table, summary, wrong
from tests.dialects.variants import ALL, FEW, Variant
from tests.dialects.weights import HandLinear, float_bias, float_weight
from tests.graphs import capture as captured_graphs
from tests.test_goldens import assert_golden, golden_text

GOLDENS = Path(__file__).parent / "goldens" / "dialects"
TARGET = "x86_vnni"

LINEARS = [each for each in matching(group="developers") if not each.whole_model]
CASES = [(each, variant) for each in LINEARS for variant in each.variants("few")]
HAND = [
    each
    for each in load().values()
    if isinstance(each.build, type) and issubclass(each.build, HandLinear) and not each.gpu_only
]

# How far quantization itself is from the float linear, as a fraction of its norm: what was measured and a little more.
NOISE = {
    "hand": 0.013,
    "hand_float8": 0.04,
    "pt2e": 0.04,
    "vllm": 0.04,
    "gptq": 0.09,
    "gguf": 0.1,
    "hqq": 0.1,
    "microscaling": 0.15,
}


def case_id(value):
    return value.name if isinstance(value, Flow) else str(value)


def skip_unless_available(each: Flow) -> None:
    if each.missing():
        pytest.skip(f"needs {', '.join(each.missing())}")


@pytest.mark.parametrize(
    ("each", "variant"),
    # One variant and the other in turns: the golden of each has all its sites and misses.
    [(each, of_each[i % len(of_each)]) for i, each in enumerate(LINEARS) for of_each in [each.variants("few")]],
    ids=case_id,
)
def test_developers_flow_is_as_expected(each, variant):
    skip_unless_available(each)
    outcome = capture(each, variant, target=TARGET)
    assert outcome.expected, f"{outcome.verdict}, not {each.expected}: {outcome.reasons}"


@pytest.mark.parametrize(("each", "variant"), CASES, ids=case_id)
def test_developers_flow_is_rewritten_as_its_golden_says(each, variant):
    skip_unless_available(each)
    (x,), _ = each.inputs(variant)
    with inductor_config_restored():
        graphs = captured_graphs(built(each, variant), x, dynamic_rows=variant.dynamic, target=TARGET)
    assert_golden(f"{each.name}_{variant}", "\n".join(map(golden_text, graphs)), GOLDENS)


def test_no_golden_is_left_over():
    expected = {f"{each.name}_{variant}.txt" for each, variant in CASES}
    assert {path.name for path in GOLDENS.glob("*.txt")} == expected


@pytest.mark.parametrize("each", HAND, ids=case_id)
@pytest.mark.parametrize("variant", FEW, ids=str)
def test_hand_written_flow_is_its_float_linear_up_to_quantization(each, variant):
    (x,), _ = each.inputs(variant)
    with torch.no_grad(), row_scales_on_cpu():
        actual = each.build(variant.dtype, variant.bias)(x)
    exact = x.double() @ float_weight().double().t()
    exact = exact + float_bias(variant.dtype).double() if variant.bias else exact
    assert actual.dtype is variant.dtype
    assert actual.shape == exact.shape
    assert (actual.double() - exact).norm() / exact.norm() < NOISE[each.build.__module__.rpartition(".")[2]]


# Configurations of torchao's that no flow has, and why. ``naive_intNwo`` raises whatever it is given.
NO_FLOW = {
    **dict.fromkeys(("SmoothQuantConfig", "AWQConfig", "GPTQConfig"), "scales a base configuration that has a flow"),
    **dict.fromkeys(("FqnToConfig", "WorkflowFooConfig"), "names a configuration for each module"),
    **dict.fromkeys(("NF4WeightOnlyConfig", "IntNWeightOnlyConfig"), "that of a flow by another name, or raises"),
    **dict.fromkeys(
        ("Int8MixedPrecisionTrainingConfig", "Float8BlockwiseLinearConfig"), "of training: weights are float"
    ),
    **dict.fromkeys(("TrainingOpBaseConfig", "NVFP4TrainingConfig"), "of training: weights are float"),
    **dict.fromkeys(("IntXQuantizationAwareTrainingConfig", "FromIntXQuantizationAwareTrainingConfig"), "is QATConfig"),
}


def test_every_configuration_of_torchao_has_a_flow():
    pytest.importorskip("torchao")
    root = Path(importlib.util.find_spec("torchao").origin).parent
    sources = "".join(path.read_text() for path in sorted(root.rglob("*.py")))
    names = set(re.findall(r"^ *class (\w+)\(AOBaseConfig\)", sources, re.MULTILINE))
    said = {word for each in load().values() for word in re.findall(r"\w+", each.what)}
    assert len(names) > 30
    assert names - said == NO_FLOW.keys() & names
    assert NO_FLOW.keys() <= names


def test_every_packing_of_torchao_has_a_flow():
    workflows = pytest.importorskip("torchao.quantization.quantize_.workflows")
    said = {word for each in load().values() for word in re.findall(r"\w+", each.what)}
    defaults = {"PLAIN", "UNPACKED_TO_INT8", "TILE_PACKED_TO_4D"}
    for formats in (workflows.Int4PackingFormat, workflows.IntxPackingFormat, workflows.Float8PackingFormat):
        assert set(formats.__members__) - said <= defaults


# --- what the table says ----------------------------------------------------------------------------------------


SITE = SiteReport("", "", "aten._int_mm", "", "32", 8, 8, "float32", "cpu", "none", "exact", "", {})
MISS = MissReport("", "", "aten.mm", "mm", "why")


def a_flow(**fields):
    return Flow("a", lambda dtype, bias: torch.nn.Identity(), "", **fields)


def a_report(sites=0, misses=0, breaks=0):
    return Report("x86", (SITE,) * sites, (MISS,) * misses, graph_breaks=breaks)


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (a_report(sites=2), Verdict.REWRITTEN),
        (a_report(sites=1, misses=1), Verdict.MISSED),
        (a_report(sites=1), Verdict.SILENT),
        (a_report(sites=1, breaks=1), Verdict.BROKEN),
        (a_report(sites=2, breaks=1), Verdict.REWRITTEN),
        (a_report(), Verdict.SILENT),
    ],
)
def test_a_matmul_that_is_not_in_the_report_is_silent_or_outside_the_graphs(report, verdict):
    assert judged(a_flow(matmuls=2), report) is verdict


def test_a_recognised_row_is_better_than_a_miss_and_worse_than_a_site():
    recognised = SimpleNamespace(sites=(SITE,), misses=(), recognised=(MISS,), graph_breaks=0)
    missed = SimpleNamespace(sites=(), misses=(MISS,), recognised=(MISS,), graph_breaks=0)
    assert judged(a_flow(matmuls=2), recognised) is Verdict.RECOGNISED
    assert judged(a_flow(matmuls=2), missed) is Verdict.MISSED
    assert not as_expected(a_flow(), Verdict.RECOGNISED)
    assert as_expected(a_flow(expected="recognised", why="because"), Verdict.RECOGNISED)


@pytest.mark.parametrize("expected", ["recognised", "prepare", "unsupported"])
def test_rewritten_satisfies_every_expectation_and_silence_none(expected):
    each = a_flow(expected=expected, why="because")
    assert as_expected(each, Verdict.REWRITTEN)
    assert not as_expected(each, Verdict.SILENT)
    assert not as_expected(each, Verdict.FAILED)


def an_outcome(verdict, expected, **fields):
    return Outcome("a", "v", verdict, expected, **fields)


@pytest.mark.parametrize(
    ("group", "verdict", "is_wrong"),
    [
        ("developers", Verdict.MISSED, True),
        ("further", Verdict.MISSED, False),
        ("further", Verdict.SILENT, True),
        ("developers", Verdict.REWRITTEN, False),
        # Nothing was shown of a flow whose every variant fails without us too.
        ("developers", Verdict.UNCOMPILABLE, True),
    ],
)
def test_the_command_fails_for_developers_flows_and_for_silence(group, verdict, is_wrong):
    each = a_flow(group=group)
    outcomes = {"a": [an_outcome(verdict, as_expected(each, verdict))]}
    assert wrong([each], outcomes) == (["a"] if is_wrong else [])


def test_a_variant_that_nothing_compiles_is_not_counted():
    outcomes = [an_outcome(Verdict.REWRITTEN, True), an_outcome(Verdict.UNCOMPILABLE, True)]
    assert summary(outcomes) == "1/1 rewritten, 1 not compilable"
    assert is_as_expected(a_flow(), outcomes)


def test_a_reason_is_said_once_for_all_flows():
    outcomes = {name: [an_outcome(Verdict.MISSED, False, reasons=("why", "why"))] * 2 for name in "ab"}
    flows = [Flow(name, torch.nn.Identity, "") for name in "ab"]
    assert reason_list(flows, outcomes) == "missed: why\n    a (2), b (2)"


def test_a_missing_library_makes_its_flows_unavailable_and_not_wrong():
    each = a_flow(group="developers", needs=("no-such-distribution",))
    assert each.missing() == ("no-such-distribution",)
    assert "unavailable: needs no-such-distribution" in result_table([each], {"a": []})
    assert wrong([each], {"a": []}) == []


def test_a_silent_flow_makes_the_command_fail(capsys, monkeypatch):
    monkeypatch.setitem(FLOWS, "a_float_linear", Flow("a_float_linear", _float_linear, "", "further"))
    outcome = capture(FLOWS["a_float_linear"], FEW[1], target=TARGET)
    assert outcome.verdict is Verdict.SILENT
    monkeypatch.setattr("tests.dialects.__main__.run", lambda *args: {"a_float_linear": [outcome]})
    assert main(["a_float_linear"]) == 1
    assert "not as expected: a_float_linear" in capsys.readouterr().out


def _float_linear(dtype, bias):
    return torch.nn.Linear(256, 384, bias=bias).to(dtype).eval()


@pytest.mark.slow
def test_the_command_runs_flows_in_processes_and_writes_json(capsys, tmp_path):
    path = tmp_path / "outcomes.json"
    assert main(["hand_fp8_static_tt", "--target", TARGET, "--jobs", "1", "--json", str(path)]) == 0
    (written,) = json.loads(path.read_text())
    assert [each["verdict"] for each in written["outcomes"]] == ["rewritten", "rewritten"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 of 1 flows as expected")


def test_an_unknown_name_ends_with_two_and_lists_the_flows(capsys):
    assert main(["no_such_flow"]) == 2
    assert "hand_i8_intmm_tok" in capsys.readouterr().err


def test_list_names_every_flow(capsys):
    assert main(["--list", "--group", "all"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(load())


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        flow("hand_i8_intmm_tok")(torch.nn.Identity)


def test_an_expectation_below_rewritten_says_why():
    with pytest.raises(ValueError, match="say why"):
        a_flow(expected="unsupported")


def test_variants_take_both_values_of_every_axis():
    for variants in (ALL, FEW):
        for axis in ("dtype", "ndim", "dynamic", "bias"):
            assert len({getattr(variant, axis) for variant in variants}) == 2
    assert len({str(variant) for variant in ALL}) == len(ALL)
    assert {variant.mode for variant in ALL} == {"no_grad", "inference_mode", "grad", "freezing"}


def test_plain_parameters_require_a_gradient_in_grad_mode_only():
    for mode, requires in (("grad", True), ("no_grad", False)):
        model = built(FLOWS["hand_i8_intmm_tok"], Variant(torch.float32, 2, False, True, mode))
        assert [parameter.requires_grad for parameter in model.parameters()] == [requires]


def test_numbers_blame_the_pass_that_changed_codes_and_result():
    """A pass that halves each divisor changes the codes and the result; the source graph and Inductor change none."""
    each, variant = FLOWS["hand_i8_intmm_tok"], FEW[1]
    before, halved = [], []

    def halve_divisors(graph):
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor):
            node.args = (node.args[0], 63.5) if node.args[1] == 127 else node.args

    with torch.no_grad():
        model = built(each, variant)
        (x,), _ = each.inputs(variant)
        eager = model(x)
        source = compiled(each, model, variant, lambda graph: None, collecting(before))
        changed = compiled(each, model, variant, halve_divisors, collecting(halved))
    assert relative_error(source, eager) == 0.0
    assert relative_error(changed, eager) > 1e-3
    assert fraction_changed(before, before) == 0.0
    assert fraction_changed(before, halved) > 0.5
    assert fraction_changed(before, []) is None


def test_inductors_options_are_put_back():
    config = torch._inductor.config
    before = config.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    with inductor_config_restored():
        config.coordinate_descent_tuning = not before[0]
        torch.set_float32_matmul_precision("high" if before[1] != "high" else "highest")
    assert (config.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.25),
        (torch.tensor([torch.nan, 2.0]), torch.tensor([torch.nan, 2.0]), 0.0),
        (torch.tensor([torch.inf, 2.0]), torch.tensor([torch.inf, 2.0]), 0.0),
        (torch.tensor([torch.inf, 2.0]), torch.tensor([1.0, 2.0]), torch.inf),
        (torch.tensor([torch.nan, 2.0]), torch.tensor([1.0, 2.0]), torch.inf),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), torch.inf),
        (torch.tensor([[1.0]]), torch.tensor([1.0]), torch.inf),
    ],
)
def test_relative_error_counts_what_is_not_finite_or_has_another_type(actual, expected, error):
    assert relative_error(actual, expected) == error
