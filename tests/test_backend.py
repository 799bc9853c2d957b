"""The backend: options, scoping, chaining, caches and fallback."""

from __future__ import annotations

import logging

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.overrides import TorchFunctionMode

import fx_quant
from fx_quant.backend import HOOK, Chain, RewritePass, compile_with, config_patches, source_digest, split_options
from fx_quant.config import Options
from fx_quant.diagnose.capture import run_eagerly
from fx_quant.errors import FxQuantError, MissError, NoKernelError, UnknownNameError
from fx_quant.passes import pipeline
from fx_quant.scheme import Numerics
from fx_quant.target import named_target
from tests import models


@pytest.fixture(autouse=True)
def no_caches(uncached):
    """No cache of graphs, which would skip the passes; code that was compiled before may be loaded."""
    with torch.no_grad():
        yield


def int8_linear(dtype=torch.float32, bias=True):
    return models.POSITIVE["int8_int_mm"].build(dtype, bias)


def compiled(model, **options):
    return torch.compile(model, backend="fx_quant", options=options or None)


def cause(error: pytest.ExceptionInfo) -> BaseException:
    return error.value.inner_exception


def test_compiled_module_equals_eager_and_counts_its_rewrites():
    model, x = int8_linear(), models.inputs(torch.float32, 3)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert counters["fx_quant"] == {"rewritten": 1, "recognised": 0, "missed": 0}


def test_backend_is_found_by_name_with_nothing_imported(printed):
    printed(
        "import os, sys, torch\n"
        "os.chdir('/')\n"
        "assert not any(name.startswith('fx_quant') for name in sys.modules)\n"
        "assert 'fx_quant' in torch._dynamo.list_backends()\n"
        "f = torch.compile(lambda x: x @ x, backend='fx_quant')\n"  # no C++ to compile
        "assert f(torch.ones(3, 3)).sum() == 27\n"
    )


@pytest.mark.slow
def test_the_cpp_wrapper_takes_native_kernels_of_several_kinds():
    """It puts all kernels of a graph into one file."""
    schemes = (
        "float32 x uint4 per_group(32) asymmetric",
        "int8 per_token (dynamic) x int8 per_channel",
        "float32 x float8_e4m3fn per_channel",
        "int8 per_token (dynamic) x int8 per_channel",
    )
    layers = [
        fx_quant.QuantizedLinear.from_float(torch.nn.Linear(64 + i, 65 + i), each) for i, each in enumerate(schemes)
    ]

    class FirstAndLast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = layers[0], torch.nn.Sequential(*layers[1:])

        def forward(self, x):
            first = self.first(x)
            return first, self.rest(first)

    model, x = FirstAndLast(), torch.randn(5, 64)
    run = compiled(model, cpp_wrapper=True)
    for _ in range(2):
        (first, last), (expected_first, expected_last) = run(x), model(x)
        torch.testing.assert_close(first, expected_first, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, expected_last, rtol=2e-2, atol=2e-2)


def test_the_body_of_prepack_is_called_without_the_dispatcher():
    _, (code, *_) = run_and_get_code(compiled(int8_linear()), models.inputs(torch.float32))
    assert "fx_quant_prepack([" in code
    assert "torch.ops.fx_quant.prepack.default([" not in code


def test_unknown_option_names_near_matches():
    with pytest.raises(BackendCompilerFailed, match="unknown option 'numeric'.*Did you mean 'numerics'") as error:
        compiled(int8_linear(), numeric="exact")(models.inputs(torch.float32))
    assert isinstance(cause(error), UnknownNameError)


def test_unknown_numerics_class_names_the_classes():
    with pytest.raises(UnknownNameError, match="Known: approximate, exact, reassociated, same_accum"):
        split_options({"numerics": "precise"})


@pytest.mark.parametrize("options", [{"strict": "yes"}, {"force_kernel": 3}])
def test_option_of_the_wrong_type_is_one_clear_line(options):
    with pytest.raises(FxQuantError, match="must be .*, got"):
        split_options(options)


def test_inductor_options_pass_through():
    ours, inductors = split_options({"numerics": "exact", "max_autotune": True})
    assert ours == Options(numerics=Numerics.EXACT)
    assert inductors == {"max_autotune": True}


def test_unknown_kernel_names_near_matches():
    with pytest.raises(BackendCompilerFailed, match="unknown kernel 'cpu_int8_vni'.*Did you mean 'cpu_int8_vnni'"):
        compiled(int8_linear(), force_kernel="cpu_int8_vni")(models.inputs(torch.float32))


def test_forced_kernel_that_cannot_run_raises_with_its_reasons():
    with pytest.raises(
        BackendCompilerFailed, match="forced kernel 'pytorch_int_mm_cuda' cannot run.*platform cuda"
    ) as e:
        compiled(int8_linear(), force_kernel="pytorch_int_mm_cuda")(models.inputs(torch.float32))
    assert isinstance(cause(e), NoKernelError)


def test_forced_kernel_runs():
    model, x = int8_linear(), models.inputs(torch.float32)
    report = fx_quant.explain(model, x, options={"force_kernel": "pytorch_int_mm"})
    assert [site.kernel for site in report.sites] == ["pytorch_int_mm"]
    torch.testing.assert_close(compiled(model, force_kernel="pytorch_int_mm")(x), model(x))


def test_disabled_provider_is_not_chosen():
    report = fx_quant.explain(int8_linear(), models.inputs(torch.float32), options={"disabled_kernels": "cpu"})
    assert [site.kernel for site in report.sites] == ["pytorch_int_mm"]
    assert report.sites[0].losers["cpu_int8_vnni"][0] == "is disabled"


def test_nothing_global_is_changed():
    before = inductor_config.save_config_portable()
    compiled(int8_linear())(models.inputs(torch.float32))
    assert inductor_config.save_config_portable() == before


class Marker(CustomGraphPass):
    """A user's pass that counts its calls."""

    def __init__(self, key):
        self.key, self.calls = key, 0

    def __call__(self, graph):
        self.calls += 1

    def uuid(self):
        return self.key


def test_a_users_own_pass_is_chained_not_replaced():
    marker = Marker("mine")
    with inductor_config.patch({HOOK: marker}):
        compiled(int8_linear())(models.inputs(torch.float32))
    assert marker.calls == 1
    assert counters["fx_quant"]["rewritten"] == 1


def test_inductor_pass_works_inside_someone_elses_setup():
    marker, model, x = Marker("mine"), int8_linear(), models.inputs(torch.float32)
    with inductor_config.patch({HOOK: fx_quant.inductor_pass(chain=marker)}):
        y = torch.compile(model)(x)
    torch.testing.assert_close(y, model(x))
    assert (marker.calls, counters["fx_quant"]["rewritten"]) == (1, 1)


def test_chain_without_a_uuid_bypasses_caches():
    assert Chain([Marker(None), Marker("b")]).uuid() is None
    assert Chain([Marker("a"), Marker("b")]).uuid() == ("a", "b")


def test_uuid_tells_options_and_targets_apart():
    base = RewritePass(Options(), named_target("x86"))
    assert base.uuid() == RewritePass(Options(), named_target("x86")).uuid()
    assert base.uuid() != RewritePass(Options(strict=True), named_target("x86")).uuid()
    assert base.uuid() != RewritePass(Options(), named_target("x86_vnni")).uuid()
    assert source_digest() in base.uuid()


def test_disabling_a_kernel_by_environment_changes_the_uuid(monkeypatch):
    base = RewritePass(Options(), named_target("x86"))
    before = base.uuid()
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", "cpu")
    assert base.uuid() != before


def fail(*_):
    raise RuntimeError("broken on purpose")


def test_an_exception_in_a_pass_compiles_the_original_graph_with_one_warning(monkeypatch, op_by_op):
    monkeypatch.setattr(pipeline, "to_kernels", fail)
    model, x = int8_linear(), models.inputs(torch.float32)
    with pytest.warns(UserWarning, match="a pass failed with RuntimeError") as caught:
        y = compiled(model)(x)
    torch.testing.assert_close(y, model(x))
    assert len([w for w in caught if "fx_quant" in str(w.message)]) == 1
    assert counters["fx_quant"] == {"rewritten": 0, "recognised": 0, "missed": 1}


def test_an_exception_in_a_pass_is_an_error_when_strict(monkeypatch):
    monkeypatch.setattr(pipeline, "to_kernels", fail)
    with pytest.raises(BackendCompilerFailed, match="strict=True and a pass of fx_quant failed") as error:
        compiled(int8_linear(), strict=True)(models.inputs(torch.float32))
    assert isinstance(cause(error), MissError)


class ScaledAlongK(torch.nn.Module):
    """A miss: one scale for each k cannot leave the sum."""

    def __init__(self):
        super().__init__()
        codes, _ = models.int8_rows(models.float_weight(48, 64, 0))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.linspace(0.01, 0.02, 64))

    def forward(self, x):
        return x @ (self.codes.float() * self.scale).t()


def test_a_miss_is_logged_and_compiles_as_it_was(caplog, op_by_op):
    model, x = ScaledAlongK(), models.inputs(torch.float32)
    with caplog.at_level(logging.WARNING, logger="fx_quant"):
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert "varies along k" in " ".join(caplog.text.split())
    assert counters["fx_quant"] == {"rewritten": 0, "recognised": 0, "missed": 1}


def test_an_option_of_inductor_may_go_by_its_alias():
    model, x = models.build("int8_int_mm"), models.inputs()
    torch.testing.assert_close(compiled(model, force_disable_caches=True)(x), model(x))


def test_a_miss_is_an_error_when_strict():
    with pytest.raises(BackendCompilerFailed, match="strict=True and 1 quantized matmul.*missed") as error:
        compiled(ScaledAlongK(), strict=True)(models.inputs(torch.float32))
    assert isinstance(cause(error), MissError)


def test_model_without_quantized_matmul_compiles_and_explain_says_so():
    model, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert "no quantized matmul found" in str(fx_quant.explain(model, x))


def test_dynamic_rows_compile_once():
    model = int8_linear()
    run = torch.compile(model, backend="fx_quant", dynamic=True)
    counters["stats"].clear()
    for rows in (5, 9, 17, 64):
        x = models.inputs(torch.float32, 2, rows)
        torch.testing.assert_close(run(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_equal_eager(rows):
    linear = int8_linear()
    x = models.inputs(torch.float32, 2, 1)[:rows]
    torch.testing.assert_close(compiled(linear.rows)(x), linear.rows(x))
    assert counters["fx_quant"]["rewritten" if rows else "recognised"] == 1


@pytest.mark.parametrize("scaled", [0.01, [[0.01], [0.02]]])
def test_a_weight_that_is_a_literal_in_the_code_is_right_and_missed(scaled, op_by_op):
    def literal(x):
        return torch.nn.functional.linear(x, torch.tensor([[1, 2] * 32, [3, -4] * 32], dtype=torch.int8).float() * by())

    def by():
        return torch.tensor(scaled)

    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(literal)(x), literal(x))
    assert counters["fx_quant"]["missed"] == 1


def test_a_weight_that_is_chosen_by_a_number_of_the_call_is_right(op_by_op):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randint(-128, 128, (4, 8, 64), dtype=torch.int8))

        def forward(self, x, i):
            return torch.nn.functional.linear(x, torch.stack(list(self.w))[i].float() * 0.01)

    model, x = Experts(), torch.randn(3, 64)
    run = compiled(model)
    for i in (0, 1, 2, 3):
        torch.testing.assert_close(run(x, i), model(x, i))


def test_in_place_update_of_a_weight_is_seen():
    model, x = int8_linear(), models.inputs(torch.float32)
    run = compiled(model)
    run(x)
    model.weight.neg_()
    torch.testing.assert_close(run(x), model(x))


def test_reduced_mode_is_honoured():
    patches = config_patches("max-autotune-no-cudagraphs", {}, RewritePass(Options()))
    assert patches["max_autotune"] is True


def test_training_graph_keeps_its_gradients():
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.enable_grad():
        compiled(linear)(x).sum().backward()
        expected = linear.weight.sum(0).expand(4, 8)
    torch.testing.assert_close(x.grad, expected)


class Words(nn.Module):
    """AWQ's form in small: int32 words along n, unpacked by a vector of shifts; the bias is trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("words", torch.randint(-(2**31), 2**31 - 1, (16, 2), dtype=torch.int32))
        self.register_buffer("shifts", torch.arange(0, 32, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.rand(1, 16) + 0.5)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x):
        codes = torch.bitwise_and(self.words[:, :, None] >> self.shifts, 15).flatten(1)
        return x @ ((codes - 8) * self.scales) + self.bias


def test_a_packed_weight_is_known_where_something_is_trained():
    """AOTAutograd says only after the passes which inputs of a joint graph are buffers."""
    torch._dynamo.reset()
    model, x = Words(), torch.randn(4, 16)
    rewrite = RewritePass(Options())

    def backend(gm, inputs):
        return compile_with(gm, inputs, rewrite, None, {"force_disable_caches": True}, inner_compile=run_eagerly)

    with torch.enable_grad():
        torch.compile(model, backend=backend)(x)
    (report,) = rewrite.reports
    assert len(report.sites) + len(report.misses) + len(report.recognised) == 1


class DecodesParameters(TorchFunctionMode):
    """What NNCF's hooks do: an op that takes a parameter is given what it decodes to."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        coded = [isinstance(x, nn.Parameter) and x.dtype is torch.int8 for x in args]
        given = [x.to(torch.bfloat16) * 0.01 if is_coded else x for x, is_coded in zip(args, coded, strict=True)]
        return func(*given, **(kwargs or {}))


class HookedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-128, 128, (64, models.K), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_no_op_of_a_compiled_graph_is_seen_by_a_mode_that_decodes_what_it_takes():
    model, x = HookedLinear(), models.inputs(torch.bfloat16, 2)
    with DecodesParameters():
        found, wanted = compiled(model)(x).float(), model(x).float()
    assert counters["fx_quant"]["rewritten"] == 1
    assert (found - wanted).norm() < 0.01 * wanted.norm()
