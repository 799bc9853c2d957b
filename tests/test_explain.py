"""What explain, check and the command line tell a user."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fx_quant
from fx_quant.diagnose import isolation, timing
from fx_quant.diagnose.capture import run_eagerly
from fx_quant.diagnose.check import CheckReport, Error, SiteCheck, error_of
from fx_quant.errors import FxQuantError, NoKernelError, ToleranceError, UnknownNameError
from fx_quant.report import BreakReport, CallReport, MissReport, Report
from fx_quant.target import named_target
from tests import models


class TwoLayers(torch.nn.Module):
    """A quantized layer that is rewritten and one that is missed."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.first = models.POSITIVE["int8_int_mm"].build(dtype, True)
        codes, _ = models.int8_rows(models.float_weight(8, models.N, 0))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.linspace(0.01, 0.02, models.N, dtype=dtype))

    def forward(self, x):
        return self.first(x) @ (self.codes.to(x.dtype) * self.scale).t()


def build_two_layers():
    return TwoLayers(), (models.inputs(torch.bfloat16, 3),)


def build_reordered_scales():
    """Its rewrite rounds in another order, so it is not bit-equal."""
    return models.POSITIVE["int8_int_mm_scales_first"].build(torch.float32, True), models.inputs(torch.float32)


def build_named_inputs():
    return TwoLayers(), {"x": models.inputs(torch.bfloat16, 3)}


def test_explain_names_module_scheme_sizes_kernel_and_losers():
    report = fx_quant.explain(*_model_and_input(), target="x86_vnni")
    (site,) = report.sites
    assert (site.module, site.n, site.k, site.m) == ("first", models.N, models.K, "48")
    assert site.scheme == "int8 per_token (dynamic) x int8 per_channel"
    assert (site.kernel, site.numerics, site.padding) == ("cpu_int8_vnni", "exact", "none")
    assert site.losers["pytorch_int_mm"] == ["can run, lower priority"]
    assert "amax / 127 per_token" in site.quantize


def _model_and_input():
    model, (x,) = build_two_layers()
    return model, x


def test_explain_says_why_a_matmul_was_missed_and_where():
    (miss,) = fx_quant.explain(*_model_and_input()).misses
    assert miss.reason == "the scale of b varies along k, so it cannot leave the sum"
    assert miss.op == "aten.mm"
    assert miss.node
    assert "test_explain.py" in miss.source


def test_explain_for_another_target_needs_no_such_machine():
    report = fx_quant.explain(*_model_and_input(), target="sm90")
    assert [site.kernel for site in report.sites] == ["pytorch_int_mm_cuda"]
    assert report.target == "sm90"


def test_explain_says_in_one_line_what_a_compiler_would_give():
    target = named_target("x86_vnni")
    bare = replace(target, features=target.features - {"cpp_compiler"})
    report = fx_quant.explain(*_model_and_input(), target=bare)
    assert report.lost_to_compiler() == ["cpu_int8_vnni"]
    (line,) = [line for line in report.to_text(wide=True).splitlines() if "install g++ or clang++, or set CXX" in line]
    assert line.startswith("No C++ compiler was found, so cpu_int8_vnni cannot be used")
    assert "C++ compiler" not in str(fx_quant.explain(*_model_and_input(), target=target))


def test_explain_shows_the_padding_that_a_target_needs():
    model = models.POSITIVE["fp8_scaled_mm_tensor"].build(torch.bfloat16, True, k=60, n=30)
    (site,) = fx_quant.explain(model, models.inputs(torch.bfloat16, 2, k=60), target="sm90").sites
    assert site.padding == "n 30->32, k 60->64"


def test_scale_behind_an_op_with_several_results_is_dynamic():
    linear = models.POSITIVE["fp8_scaled_mm_row"].build(torch.bfloat16, True)
    (site,) = fx_quant.explain(lambda x: linear(x.sort(-1)[0]), models.inputs(torch.bfloat16)).sites
    assert site.scheme.startswith("float8_e4m3fn per_token (dynamic)")


def test_static_scale_is_static_for_dynamic_rows():
    model, x = models.POSITIVE["int8_int_mm_static"].build(torch.bfloat16, True), models.inputs(torch.bfloat16, 3)
    (site,) = fx_quant.explain(model, x, dynamic=True).sites
    assert site.scheme == "int8 per_tensor (static) x int8 per_channel"


def test_explain_leaves_the_model_as_it_was():
    model, x = _model_and_input()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    fx_quant.explain(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_explain_sees_through_a_compiled_model():
    model, x = _model_and_input()
    assert len(fx_quant.explain(torch.compile(model), x).sites) == 1


def test_a_place_that_breaks_for_a_reason_is_one_whatever_values_the_reason_tells_of(monkeypatch):
    at = SimpleNamespace(filename="model.py", lineno=7)
    reasons = [SimpleNamespace(user_stack=[at], reason=f"Data pointer comparison\n  value {i}") for i in range(3)]
    monkeypatch.setattr(isolation, "graph_break_reasons", reasons)
    monkeypatch.setattr(isolation, "counters", {"graph_break": {reason.reason: 1 for reason in reasons}})
    assert isolation.graph_breaks() == (BreakReport("model.py:7", "Data pointer comparison", 3, ("model.py:7",)),)


def test_explain_counts_graph_breaks():
    first = models.POSITIVE["int8_int_mm"].build(torch.float32, True)

    def broken(x):
        y = first(x)
        torch._dynamo.graph_break()
        return y + 1

    report = fx_quant.explain(broken, models.inputs(torch.float32))
    assert (report.graphs, report.graph_breaks, len(report.sites)) == (2, 1, 1)
    assert "matmuls outside the graphs are not seen" in report.to_text(wide=True)


def test_explain_raises_our_own_errors_unwrapped():
    model, x = _model_and_input()
    with pytest.raises(UnknownNameError, match="unknown target 'sm9'.*Did you mean"):
        fx_quant.explain(model, x, target="sm9")
    with pytest.raises(NoKernelError, match="forced kernel"):
        fx_quant.explain(model, x, options={"force_kernel": "cpu_float8_bf16"})


def test_report_is_json_and_text():
    report = fx_quant.explain(*_model_and_input())
    data = json.loads(report.to_json())
    assert [site["module"] for site in data["sites"]] == ["first"]
    assert len(data["misses"]) == 1
    text = str(report)
    assert text.startswith("fx_quant: 1 of 2 quantized matmuls rewritten on ")
    assert "missed:" in text


def test_numerics_option_caps_what_explain_proposes():
    model = models.POSITIVE["fp8_scaled_mm_row"].build(torch.bfloat16, True)
    report = fx_quant.explain(model, models.inputs(torch.bfloat16), options={"numerics": "exact"})
    assert not report.sites
    assert "same_accum" in report.misses[0].reason


class TwoDeep(torch.nn.Module):
    """The same layer twice."""

    def __init__(self, layer):
        super().__init__()
        self.layers = torch.nn.ModuleList([layer(), layer()])

    def forward(self, x):
        return [layer(x) for layer in self.layers]


class AnyName(torch.nn.Module):
    """Its forward does not call itself ``self``."""

    def __init__(self):
        super().__init__()
        self.proj = models.POSITIVE["int8_int_mm"].build(torch.float32, True)

    def forward(this, x):
        return this.proj(x)


def test_module_path_does_not_hold_the_name_of_self():
    (site,) = fx_quant.explain(AnyName(), models.inputs(torch.float32)).sites
    assert site.module == "proj"


def test_sites_of_repeated_layers_share_a_row():
    model = TwoDeep(lambda: models.POSITIVE["int8_int_mm"].build(torch.float32, True))
    report = fx_quant.explain(model, models.inputs(torch.float32))
    assert [site.module for site in report.sites] == ["layers.0", "layers.1"]
    (row,) = [line for line in str(report).splitlines() if line.startswith("layers")]
    assert row.split()[:2] == ["layers.*", "2"]


def test_misses_of_repeated_layers_share_a_line():
    report = fx_quant.explain(TwoDeep(TwoLayers), models.inputs(torch.bfloat16))
    assert len(report.misses) == 2
    (line,) = [line for line in report.to_text(wide=True).splitlines() if "left as it is" in line]
    assert line.strip().startswith("layers.*")
    assert " x 2: aten.mm" in line


def test_merged_reports_keep_order():
    miss = MissReport("m", "", "aten.mm", "mm", "r")
    merged = Report("x86", (), (miss,)).merged(Report("x86", (), ()))
    assert (merged.misses, merged.graphs) == ((miss,), 2)


def test_check_compares_each_site_with_the_source_graph():
    report = fx_quant.check(*_model_and_input())
    (site,) = report.sites
    assert site.module == "first"
    assert site.error.max_rel_err <= 2**-7
    assert (site.error.new_nan, site.error.new_inf) == (0, 0)
    assert 0 < site.saturated < 0.2
    assert len(report.misses) == 1
    assert report.raise_if(max_rel_err=2e-2) is report
    assert "model output" in str(report)
    assert json.loads(report.to_json())["sites"][0]["module"] == "first"


class BothAsymmetric(torch.nn.Module):
    """uint8 codes and a weight that both have zero points: the sum is corrected around the kernel."""

    def __init__(self):
        super().__init__()
        codes, scale = models.int8_rows(models.float_weight(24, models.K, 0))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.randint(-8, 8, (24, 1), dtype=torch.int32))

    def forward(self, x):
        codes = ((x / 0.03).round() + 120).clamp(0, 255).to(torch.uint8)
        weight = (self.codes.float() - self.zero_point) * self.scale[:, None]
        return ((codes.float() - 120) * 0.03) @ weight.t()


def test_check_compares_what_a_corrected_sum_becomes():
    report = fx_quant.check(BothAsymmetric(), models.inputs(torch.float32))
    (site,) = report.sites
    assert site.error.max_rel_err < 1e-5
    assert site.saturated < 0.2


@pytest.mark.parametrize("dynamic", [False, True])
def test_check_takes_each_site_on_its_own_inputs(dynamic):
    """An inexact site before does not show in the error of an exact one."""
    layers = [models.POSITIVE[name].build(torch.float32, True) for name in ("int8_int_mm_scales_first", "int8_int_mm")]
    model = torch.nn.Sequential(layers[0], torch.nn.Linear(models.N, models.K), torch.nn.GELU(), layers[1])
    report = fx_quant.check(model, models.inputs(torch.float32), dynamic=dynamic)
    first, second = report.sites
    assert first.numerics == "same_accum"
    assert 0 < first.error.max_rel_err < 1e-5
    assert second.numerics == "exact"
    assert second.error.max_rel_err == 0


def test_check_prints_the_worst_of_repeated_layers():
    errors = [Error(1e-7, 140.0, 0, 0), Error(1e-3, 60.0, 1, 0)]
    sites = tuple(SiteCheck(f"layers.{i}.proj", "kernel", "exact", e, i / 2) for i, e in enumerate(errors))
    report = CheckReport(sites, (), errors[0])
    (row,) = [line for line in report.to_text(wide=True).splitlines() if line.startswith("layers")]
    assert row.split() == ["layers.*.proj", "2", "kernel", "exact", "1.00e-03", "60.0", "1", "0", "50.00%"]


def test_check_raises_for_the_worst_site():
    with pytest.raises(ToleranceError, match=r"cpu_int8_\w+: SQNR must be >= 1000 dB, got"):
        fx_quant.check(*build_reordered_scales()).raise_if(min_sqnr_db=1000)


def test_check_of_a_model_without_sites_compares_its_output():
    report = fx_quant.check(torch.nn.Linear(4, 4), torch.randn(2, 4))
    assert not report.sites
    assert report.outputs.max_rel_err == 0


@pytest.mark.parametrize(
    ("value", "reference", "nan", "inf"),
    [([1.0, torch.nan], [1.0, 2.0], 1, 0), ([torch.inf, 1.0], [1.0, 1.0], 0, 1), ([torch.nan], [torch.nan], 0, 0)],
)
def test_error_counts_what_the_reference_has_not(value, reference, nan, inf):
    error = error_of(torch.tensor(value), torch.tensor(reference))
    assert (error.new_nan, error.new_inf) == (nan, inf)


def test_error_is_relative_to_the_peak_of_the_reference():
    error = error_of(torch.tensor([10.5, 1.0]), torch.tensor([10.0, 1.0]))
    assert error.max_rel_err == pytest.approx(0.05)
    assert error.sqnr_db == pytest.approx(26.06, abs=0.01)


def test_error_of_an_empty_tensor_is_none():
    assert error_of(torch.empty(0), torch.empty(0)).max_rel_err == 0


def test_depyf_dump_holds_our_graphs(tmp_path):
    depyf = pytest.importorskip("depyf", reason="the debug extra is not installed")
    model, x = models.POSITIVE["int8_int_mm"].build(torch.float32, True), models.inputs(torch.float32)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), depyf.prepare_debug(str(tmp_path)):
        torch.compile(model, backend="fx_quant")(x)
    dumped = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix == ".py"}
    kernel = re.compile(r"fx_quant\.(cpu_int8_\w+|pytorch_int_mm)")
    assert any("fx_quant.scaled_mm" in text or kernel.search(text) for text in dumped.values())
    before = next(text for name, text in dumped.items() if "FX_QUANT_BEFORE" in name)
    after = next(text for name, text in dumped.items() if "FX_QUANT_AFTER" in name)
    assert "_int_mm" in before
    assert kernel.search(after)
    written = next(text for name, text in dumped.items() if "WRITE_CANONICAL_OPS" in name)
    assert "fx_quant.scaled_mm" in written and not kernel.search(written)


# --- measured times ---------------------------------------------------------------------------------------------------


@pytest.fixture
def parts_op_by_op(monkeypatch, op_by_op):
    """What is timed runs op by op: that it compiles is the claim of others."""
    for name in ("compile_graph", "compile_plainly"):
        monkeypatch.setattr(timing, name, lambda gm, inputs, **_: run_eagerly(gm, inputs))


def test_time_measures_each_kind_of_matmul_beside_inductor_and_the_call(monkeypatch, parts_op_by_op):
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    counted = []
    compiled = timing._compiled
    monkeypatch.setattr(timing, "_compiled", lambda *args: counted.append(args) or compiled(*args))
    model = TwoDeep(lambda: models.POSITIVE["int8_int_mm"].build(torch.float32, True))
    report = fx_quant.explain(model, models.inputs(torch.float32), time=True)
    assert len(counted) == 2  # alike layers are compiled once by each way
    assert min(report.call.seconds, report.call.inductor_seconds) > 0
    for site in report.sites:
        assert min(site.time.seconds, site.time.inductor_seconds) > 0
        assert site.time.share == pytest.approx(site.time.seconds / report.call.seconds)
    assert "Inductor us" in str(report) and "a call takes" in str(report)
    assert fx_quant.Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "name",
    ["int8_int_mm", "int8_int_mm_static", "int8_int_mm_scales_first", "fp8_scaled_mm_row", "fp8_scaled_mm_tensor"],
)
def test_what_is_timed_of_inductor_computes_what_ours_does(name, parts_op_by_op, monkeypatch):
    results = []

    def compare(group, kept):
        values = [kept[name] for name in group.inputs[0]]
        with torch._C.DisableTorchFunction():
            results.append((group.ours(list(values))[0], group.plain(list(values))[0]))
        return dict.fromkeys(group.members, (1.0, 1.0))

    monkeypatch.setattr(timing, "_measured", compare)
    monkeypatch.setattr("fx_quant.diagnose.explain.call_times", lambda *_: CallReport(1.0, 1.0))
    fx_quant.explain(models.POSITIVE[name].build(torch.float32, True), models.inputs(torch.float32), time=True)
    assert results
    for ours, plain in results:
        assert ours.shape == plain.shape
        assert error_of(ours, plain).sqnr_db > 25


def test_time_is_of_this_machine_only():
    with pytest.raises(FxQuantError, match="no target may be given"):
        fx_quant.explain(torch.nn.Linear(4, 4), torch.zeros(1, 4), target="sm90", time=True)
