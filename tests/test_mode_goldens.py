"""One site in an eager call, a whole graph and a piece, side by side, on machines that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fx_quant.config import Options
from fx_quant.kernels.context import CompileContext, Mode
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.registry import kernel
from fx_quant.kernels.select import Selection, select, verdicts
from fx_quant.layers.activation import quantize_activation
from fx_quant.passes.pipeline import run_passes
from fx_quant.passes.reporting import report_on
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Scheme, dtype_name
from fx_quant.target import named_target
from tests.graphs import trace
from tests.printer import print_graph
from tests.test_goldens import assert_golden
from tests.test_realise import VIEWS, Recorded

GOLDENS = Path(__file__).parent / "goldens" / "modes"
N, K = 30, 60  # neither in multiples of 16
TARGETS = ("sm90", "sm100", "gfx942", "x86_vnni")
POLICIES = ("auto", "vllm")
ONLY = {
    "disabled_kernels": "triton,cutlass,flashinfer,rocm,aiter"
}  # the kernels of PyTorch, and on a CPU those of ours


def scheme_on(target: str) -> Scheme:
    dtype = "float8_e4m3fnuz" if target == "gfx942" else "float8_e4m3fn"
    return Scheme.parse(f"{dtype} per_token (dynamic) x {dtype} per_channel")


def operands(scheme: Scheme, m: int) -> tuple[Tensor, ...]:
    """``x``, the weight ``[n, k]``, its scale and a bias."""
    dtype = scheme.weight.dtype
    return torch.ones(m, K, dtype=torch.bfloat16), torch.ones(N, K).to(dtype), torch.ones(N), torch.ones(N).bfloat16()


def eager_lines(selection: Selection, m: int) -> list[str]:
    """The calls of ops of an eager linear of ``m`` rows, from the codes on."""

    scheme, pad = selection.problem.scheme, selection.padding.k - K
    with FakeTensorMode(), Recorded() as recorded:
        x, weight, scale, bias = operands(scheme, m)
        recorded.calls.clear()
        codes, a_scale, _ = quantize_activation(x, scheme.activation, pad=pad)
        run_kernel(selection, codes, weight, a_scale, scale, bias)
    return [
        f"{name.removesuffix('.default')}({', '.join(map(_shown, args[:-1]))}) -> {_shown(args[-1])}"
        for name, args, _ in recorded.calls
        if name not in VIEWS
    ]


def _shown(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{dtype_name(x.dtype)}{list(x.shape)}"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_shown, x))}]"
    return dtype_name(x) if isinstance(x, torch.dtype) else str(x)


def graph_text(target: str, context: CompileContext) -> tuple[str, str]:
    """The graph of the linear for any number of rows as ``context`` has it, and what the report says of its padding."""
    scheme = scheme_on(target)

    def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        codes, a_scale, _ = quantize_activation(x, scheme.activation)
        return torch.ops.fx_quant.scaled_mm(codes, weight.t(), a_scale, scale, bias, torch.bfloat16)

    graph = trace(linear, *operands(scheme, 20), dynamic=True)
    state = run_passes(graph, named_target(target), Options.parse(ONLY), frozenset({1, 2, 3}), context)
    text = str(report_on(state))
    _, found, said = text.partition("padding by mode:")
    return print_graph(state.graph), (found + said).partition("\n\n")[0] or "padding by mode: none"


def golden_text(target: str, policy: str) -> str:
    scheme, machine = scheme_on(target), named_target(target)
    asked = Problem(scheme, SizeRange(2, None), N, K, torch.bfloat16, torch.bfloat16, constant_weight=True)
    disabled = ONLY["disabled_kernels"].split(",")
    selection = select(asked, machine, disabled=disabled, context=CompileContext(Mode.EAGER, policy))
    parts = {"problem": f"{asked}\nkernel {selection.kernel.name}\n"}
    for m in (5, 20):
        parts[f"eager, m = {m}"] = "".join(f"{line}\n" for line in eager_lines(selection, m))
    said = ""
    for mode, title in ((Mode.GRAPH, "whole graph, any m"), (Mode.PIECEWISE, "piecewise, any m")):
        parts[title], said = graph_text(target, CompileContext(mode, policy))
    parts["explain"] = f"{said}\n"
    return "\n".join(f"=== {title}\n{text}" for title, text in parts.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_site_in_each_mode_is_as_its_golden_says(target, policy):
    assert_golden(f"{target}_{policy}", golden_text(target, policy), GOLDENS)


def test_no_golden_is_left_over():
    assert {path.name for path in GOLDENS.glob("*")} == {f"{t}_{p}.txt" for t in TARGETS for p in POLICIES}


@pytest.mark.parametrize("target", TARGETS)
def test_the_goldens_pad_rows_where_vllm_does(target):
    """To 17 below its piecewise mode, none on ROCm, none on a CPU."""
    text = (GOLDENS / f"{target}_vllm.txt").read_text()
    parts = dict(part.split("\n", 1) for part in text.split("=== ")[1:])
    padded = {title for title, part in parts.items() if "17" in part and title not in ("problem", "explain")}
    on_cuda = {"eager, m = 5", "whole graph, any m"} if target.startswith("sm") else set()
    assert padded == on_cuda


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("target", TARGETS)
def test_what_may_not_be_padded_has_no_kernel_that_wants_it(target, mode):
    asked = Problem(scheme_on(target), SizeRange(2, None), N, K, torch.bfloat16, None, constant_weight=True)
    judged = verdicts(asked, named_target(target), ONLY["disabled_kernels"].split(","), CompileContext(mode, "never"))
    assert all(kernel(each.kernel).requires.align == 1 for each in judged if each.can_run)
