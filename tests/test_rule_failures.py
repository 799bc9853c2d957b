"""An exception costs one matmul, never the graph; and no constant, however odd, raises one or gives a wrong result."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the ops of PT2E
from torch import Tensor
from torch.fx import Graph

import fx_quant
from fx_quant.config import Options
from fx_quant.errors import MissError, NoKernelError
from fx_quant.passes import annotate, assign, pipeline, rulebook, sites
from fx_quant.passes import rewrite as rewrite_pass
from fx_quant.passes.failures import Failure
from fx_quant.passes.pipeline import rewrite_graph, to_kernels
from fx_quant.target import named_target
from tests.graphs import calls, copy_of, rewrite, run, trace

aten, pt2e = torch.ops.aten, torch.ops.quantized_decomposed
X86 = named_target("x86_vnni")
M, K, N = 4, 64, 64


def given() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator)
    weight = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    return [x, weight, torch.rand(N, generator=generator) * 0.1, torch.randn(N, generator=generator)]


def quantized(x: Tensor, lo: Any = -128, hi: Any = 127, divisor: Any = 127, floor: Any = 1e-5) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / divisor).clamp(min=floor)
    return torch.round(x / scale).clamp(lo, hi).to(torch.int8), scale


def linear(x: Tensor, w: Tensor, s: Tensor, *arguments: Any) -> Tensor:
    codes, scale = quantized(x, *arguments)
    return torch._int_mm(codes, w.t()).float() * scale * s


def weight_only(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return x @ (w * s[:, None]).t()


# --- exceptions -------------------------------------------------------------------------------------------------


def three(x: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Tensor:
    y = linear(x, w, s)
    y = linear(torch.erf(y), w, s)
    return linear(torch.sin(y), w, s)


def one_in_three(calls_until: int, function: Callable) -> Callable:
    """``function``, which raises when called for the ``calls_until``-th time."""
    seen = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        if len(seen) == calls_until:
            raise OverflowError("cannot convert float infinity to integer")
        return function(*args, **kwargs)

    return wrapped


REASON = "failed with OverflowError: cannot convert float infinity to integer"


def raise_in_rule(monkeypatch):
    rule = rulebook._RULES[aten._int_mm.default]
    monkeypatch.setitem(rulebook._RULES, aten._int_mm.default, named(one_in_three(2, rule), rule))
    return f"the rule matmuls._matmul of aten._int_mm {REASON}"


def named(wrapped, rule):
    wrapped.__name__, wrapped.__module__ = rule.__name__, rule.__module__
    return wrapped


def raise_in_find(monkeypatch):
    monkeypatch.setattr(sites, "_site", one_in_three(2, sites._site))
    return f"finding what aten._int_mm.default multiplies {REASON}"


def raise_in_choice(monkeypatch):
    choose = pipeline._choose
    monkeypatch.setattr(pipeline.functools, "cache", lambda function: one_in_three(2, function))
    assert choose is pipeline._choose
    return f"choosing a kernel {REASON}"


def raise_in_canonicalize(monkeypatch):
    monkeypatch.setattr(pipeline, "canonicalize", one_in_three(2, pipeline.canonicalize))
    return f"writing the canonical op {REASON}"


def raise_in_assign(monkeypatch):
    monkeypatch.setattr(assign, "_assign", one_in_three(2, assign._assign))
    return f"calling the kernel {REASON}"


STEPS = [raise_in_rule, raise_in_find, raise_in_choice, raise_in_canonicalize, raise_in_assign]


@pytest.mark.parametrize("step", STEPS)
def test_an_exception_at_one_matmul_is_one_miss_with_its_reason(step, monkeypatch):
    graph = trace(three, *given())
    after = copy_of(graph)
    reason = step(monkeypatch)
    report = rewrite_graph(after, X86, Options(), frozenset({1, 2, 3}))
    monkeypatch.undo()
    assert [miss.reason for miss in report.misses] == [reason]
    assert len(report.sites) == 2
    assert len(calls(after, aten._int_mm.default)) == 1
    for new, old in zip(run(after, *given())[0], run(graph, *given())[0], strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("face", [fx_quant.explain, fx_quant.check])
def test_explain_and_check_count_a_failure_to_call_a_kernel(face, monkeypatch):
    reason = raise_in_assign(monkeypatch)
    report = face(three, *given())
    assert [miss.reason for miss in report.misses] == [reason]
    assert len(report.sites) == 2


@pytest.mark.parametrize("step", STEPS)
def test_strict_lists_the_exception(step, monkeypatch):
    graph = trace(three, *given())
    step(monkeypatch)
    with pytest.raises(MissError, match="1 quantized matmuls were missed") as raised:
        rewrite_graph(graph, X86, Options(strict=True), frozenset({1, 2, 3}))
    assert "OverflowError: cannot convert float infinity to integer" in " ".join(str(raised.value).split())


@pytest.mark.parametrize("name", ["recognise_quantizer", "_rewrite_quantizer"])
def test_an_exception_at_a_quantize_leaves_the_quantize_as_it_was(name, monkeypatch):
    graph = trace(three, *given())
    after = copy_of(graph)
    monkeypatch.setattr(rewrite_pass, name, one_in_three(2, getattr(rewrite_pass, name)))
    report = rewrite_graph(after, X86, Options(), frozenset({1, 2, 3}))
    assert (len(report.sites), report.misses) == (3, ())
    assert sum(REASON in site.quantize for site in report.sites) == 1
    assert len(calls(after, torch.ops.fx_quant.quantize.dynamic)) == 2
    for new, old in zip(run(after, *given())[0], run(graph, *given())[0], strict=True):
        torch.testing.assert_close(new, old)


def test_a_rule_s_exception_is_in_the_debug_log(monkeypatch, caplog):
    raise_in_rule(monkeypatch)
    with caplog.at_level(logging.DEBUG, logger="fx_quant"):
        rewrite(trace(three, *given()))
    (record,) = [r for r in caplog.records if r.name == "fx_quant.passes.failures"]
    assert record.exc_info[0] is OverflowError


def test_a_forced_kernel_that_cannot_run_is_still_an_error():
    with pytest.raises(NoKernelError):
        rewrite(trace(three, *given()), force_kernel="pytorch_scaled_mm")


# --- constants --------------------------------------------------------------------------------------------------


def gated(x: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """As Mamba 2 bounds its time steps."""
    dt = torch.nn.functional.softplus(linear(x, w, s) + b).clamp(0.0, math.inf)
    return linear(dt, w, s)


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (-math.inf, 3), (math.nan, 1.0)])
def test_a_clamp_without_bounds_is_no_fake_quantization(bounds):
    state = rewrite(trace(lambda x, w, s, b: linear(torch.round(linear(x, w, s)).clamp(*bounds), w, s), *given()))
    assert (len(state.rows), state.misses) == (2, [])


def test_a_model_that_clamps_to_infinity_is_rewritten_whole():
    state = rewrite(trace(gated, *given()))
    assert (len(state.rows), state.misses) == (2, [])


F32 = torch.float32
# A graph for each place where a rule, a recogniser or an emitter reads a constant.
READ: dict[str, Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "clamp": lambda c, x, w, s, b: linear(linear(x, w, s).clamp(0.0, c), w, s),
    "clamp_of_round": lambda c, x, w, s, b: x @ (torch.round(w * s[:, None]).clamp(c, 127) * 0.1).t(),
    "scale": lambda c, x, w, s, b: x @ (w.float() * c).t(),
    "inverse_scale": lambda c, x, w, s, b: x @ (w.float() / c).t(),
    "scale_tensor": lambda c, x, w, s, b: x @ (w.float() * torch.full((N, 1), c, dtype=F32)).t(),
    "zero_point": lambda c, x, w, s, b: x @ ((w.float() - c) * s[:, None]).t(),
    "added_zero_point": lambda c, x, w, s, b: x @ ((w.float() + c) * s[:, None]).t(),
    "integer_zero_point": lambda c, x, w, s, b: x @ ((w.int() - c) * s[:, None]).t(),
    "long_zero_point": lambda c, x, w, s, b: x @ ((w.long() - c).float() * s[:, None]).t(),
    "zero_point_tensor": lambda c, x, w, s, b: x @ ((w.float() - torch.full((), c, dtype=F32)) * s[:, None]).t(),
    "zero_point_of_joined": lambda c, x, w, s, b: x @ ((torch.cat([w[:8], w[8:]]).float() - c) * s[:, None]).t(),
    "multiplied_zero_point": lambda c, x, w, s, b: x @ (torch.sub(w.float(), 2, alpha=c) * s[:, None]).t(),
    "sum_scale": lambda c, x, w, s, b: torch._int_mm(quantized(x)[0], w.t()).float() * c,
    "sum_divisor": lambda c, x, w, s, b: torch._int_mm(quantized(x)[0], w.t()) / c,
    "sum_shift": lambda c, x, w, s, b: (torch._int_mm(quantized(x)[0], w.t()) + c).float() * s,
    "sum_correction": lambda c, x, w, s, b: (
        (torch._int_mm(quantized(x)[0], w.t()) - c * w.sum(1, dtype=torch.int32)).float() * s
    ),
    "result_scale": lambda c, x, w, s, b: linear(x, w, s) * c,
    "result_divisor": lambda c, x, w, s, b: linear(x, w, s) / c,
    "bias": lambda c, x, w, s, b: linear(x, w, s) + c,
    "multiplied_bias": lambda c, x, w, s, b: torch.add(linear(x, w, s), b, alpha=c),
    "addmm_alpha": lambda c, x, w, s, b: torch.addmm(b, x, (w * s[:, None]).t(), alpha=c),
    "addmm_beta": lambda c, x, w, s, b: torch.addmm(b, x, (w * s[:, None]).t(), beta=c),
    "mask": lambda c, x, w, s, b: weight_only(x, w & c, s),
    "right_shift": lambda c, x, w, s, b: weight_only(x, w.view(torch.uint8) >> c, s),
    "lowest": lambda c, x, w, s, b: linear(x, w, s, c),
    "highest": lambda c, x, w, s, b: linear(x, w, s, -128, c),
    "divisor": lambda c, x, w, s, b: linear(x, w, s, -128, 127, c),
    "floor": lambda c, x, w, s, b: linear(x, w, s, -128, 127, 127, c),
    "identity": lambda c, x, w, s, b: linear((x * c) + c, w, s),
    "pt2e_scale": lambda c, x, w, s, b: x @ pt2e.dequantize_per_tensor(w, c, 0, -128, 127, torch.int8).t(),
    "pt2e_zero_point": lambda c, x, w, s, b: x @ pt2e.dequantize_per_tensor(w, 0.1, c, -128, 127, torch.int8).t(),
    "float8_scale": lambda c, x, w, s, b: torch._scaled_mm(
        x.to(torch.float8_e4m3fn),
        w.to(torch.float8_e4m3fn).t(),
        torch.full((), c, dtype=F32),
        torch.ones(()),
        out_dtype=F32,
    ),
}
CONSTANTS = [math.inf, -math.inf, math.nan, -0.0, True, 1e300, 2**31, -(2**63), 200, 3.5, 16777217]
SYMBOLIC = [lambda x: x.shape[0], lambda x: x.shape[0] * 0.5]


def traced(name: str, constant: Any) -> Graph | None:
    """The graph, None where PyTorch itself refuses the constant, when traced or when run."""

    def function(x, w, s, b):
        return READ[name](constant(x) if callable(constant) else constant, x, w, s, b)

    try:
        graph = trace(function, *given(), dynamic=callable(constant))
        run(graph, *given())
    except (RuntimeError, TypeError, OverflowError, AssertionError, NotImplementedError):
        return None
    return graph


@pytest.mark.parametrize("name", READ)
def test_no_constant_raises_in_a_rule_or_changes_a_result(name, monkeypatch):
    def unguarded(step: Callable, *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except LookupError as error:
            if type(error) is LookupError:
                return Failure(error)
            raise

    for module in (annotate, sites, pipeline, rewrite_pass, assign):
        monkeypatch.setattr(module, "attempt", unguarded)
    ran = 0
    for constant in [*CONSTANTS, *SYMBOLIC]:
        graph = traced(name, constant)
        if graph is None:
            continue
        ran += 1
        ((old,), _) = run(graph, *given())
        state = rewrite(graph, numerics="approximate")
        if state.rows:
            to_kernels(state)
        ((new,), _) = run(state.graph, *given())
        finite = old.isfinite()
        assert torch.equal(old.isnan(), new.isnan()), constant
        assert torch.equal(old[~finite].nan_to_num(), new[~finite].nan_to_num()), constant
        if finite.any():
            allowed = 2e-2 * old[finite].abs().max().item()
            torch.testing.assert_close(
                new[finite], old[finite], rtol=2e-2, atol=allowed, msg=lambda m, constant=constant: f"{constant}: {m}"
            )
    assert ran


@pytest.mark.parametrize("shift", [8, 256 + 1, 2**31, -1])
def test_a_shift_by_no_number_of_bits_of_a_byte_is_within_what_is_proven(shift):
    graph = trace(lambda x, w, s, b: weight_only(x, w.view(torch.uint8) & 255, s), *given())
    (mask,) = calls(graph, aten.bitwise_and.Scalar) or calls(graph, aten.__and__.Scalar)
    with graph.inserting_after(mask):
        node = graph.call_function(aten.__rshift__.Scalar, (mask, shift))
    node.meta["val"] = mask.meta["val"]
    found = annotate.Annotation(graph).value(node)
    with contextlib.suppress(RuntimeError, OverflowError):  # what PyTorch refuses has no values
        values = torch.arange(256).to(torch.uint8) >> shift
        assert (
            found is None
            or found.bounds is None
            or (found.bounds[0] <= values.min() and values.max() <= found.bounds[1])
        )
