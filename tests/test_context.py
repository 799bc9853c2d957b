"""The compile context: what a policy pads in each mode, and rows that a graph pads for every number of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.decorators import mark_unbacked
from torch.fx import Graph, GraphModule

from fx_quant.backend import RewritePass
from fx_quant.compat import decompositions_without_matmul, static_input_indices
from fx_quant.config import Options, PaddingPolicy
from fx_quant.errors import FxQuantError, NoKernelError, UnknownNameError
from fx_quant.kernels import registry
from fx_quant.kernels.context import GRAPH, CompileContext, Mode
from fx_quant.kernels.padding import Padding, plan_padding
from fx_quant.kernels.registry import kernel, kernels
from fx_quant.kernels.select import select
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import Kind
from fx_quant.report import Report
from fx_quant.scheme import Numerics, Scheme
from fx_quant.target import named_target
from tests.graphs import calls, capture, run, trace
from tests.tolerances import assert_within

AUTO, NEVER, CONSTANTS, ALWAYS, VLLM = PaddingPolicy
FP8 = Scheme.parse("float8_e4m3fn per_tensor (dynamic) x float8_e4m3fn per_tensor")
FNUZ = Scheme.parse("float8_e4m3fnuz per_tensor (dynamic) x float8_e4m3fnuz per_tensor")
INT8 = Scheme.parse("int8 per_token (dynamic) x int8 per_channel")
ROWS = 17
ANY = SizeRange(1, None)


def asked(scheme: Scheme = FP8, n: int = 32, k: int = 64, m: SizeRange = ANY) -> Problem:
    return Problem(scheme, m, n, k, torch.bfloat16, None, constant_weight=True)


def rows_of(target: str, policy: PaddingPolicy, mode: Mode, m: SizeRange = ANY) -> int:
    problem = asked(FNUZ if target == "gfx942" else FP8, m=m)
    context = CompileContext(mode, policy)
    return select(problem, named_target(target), disabled=["triton"], context=context).padding.rows


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "eager", "graph"), [(AUTO, 17, 0), (NEVER, 0, 0), (CONSTANTS, 0, 0), (ALWAYS, 17, 17), (VLLM, 17, 17)]
)
@pytest.mark.parametrize("target", ["sm90", "sm100"])
def test_a_policy_pads_rows_of_scaled_mm_on_cuda_by_mode(target, policy, eager, graph):
    assert (rows_of(target, policy, Mode.EAGER), rows_of(target, policy, Mode.GRAPH)) == (eager, graph)
    assert rows_of(target, policy, Mode.PIECEWISE) == (0 if policy is VLLM else graph)


@pytest.mark.parametrize("policy", PaddingPolicy)
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("target", ["gfx942", "x86_vnni"])
def test_no_policy_pads_rows_on_rocm_or_a_cpu(target, mode, policy):
    assert rows_of(target, policy, mode) == 0


@pytest.mark.parametrize(("low", "rows"), [(0, 17), (1, 17), (16, 17), (17, 0), (32, 0)])
def test_rows_that_are_known_to_be_enough_are_not_padded(low, rows):
    assert rows_of("sm90", VLLM, Mode.GRAPH, SizeRange(low, None)) == rows


@pytest.mark.parametrize(
    "scaled_mm", [each for each in kernels() if each.op in ("pytorch_scaled_mm", "pytorch_channelwise")]
)
def test_vllms_rule_is_the_seeds(scaled_mm):
    """``17 if pad_output and not rocm else None``, ``pad_output`` below the piecewise mode; of every ``_scaled_mm``."""
    is_rocm = "rocm" in scaled_mm.requires.platforms
    for mode in Mode:
        pads = not is_rocm and mode is not Mode.PIECEWISE
        assert plan_padding(asked(), scaled_mm, CompileContext(mode, VLLM)).rows == (17 if pads else 0)


@pytest.mark.parametrize("policy", PaddingPolicy)
@pytest.mark.parametrize(("n", "k"), [(32, 64), (30, 64), (32, 60), (30, 60)])
def test_a_kernel_whose_padding_is_forbidden_is_not_chosen_for_its_alignment(policy, n, k):
    """Those that stay are padded no further than the policy lets them."""
    forbidden = {NEVER: n % 16 or k % 16, CONSTANTS: k % 16}.get(policy, 0)
    try:
        selection = select(
            asked(n=n, k=k), named_target("sm90"), disabled=["triton"], context=CompileContext(padding=policy)
        )
        verdicts = selection.verdicts
        assert (selection.padding == Padding(n, k)) or not forbidden
    except NoKernelError as error:
        verdicts = error.verdicts
    (unmet,) = [verdict.unmet for verdict in verdicts if verdict.kernel == "pytorch_scaled_mm"]
    assert [each.kind for each in unmet] == ([Kind.ALIGNMENT] if forbidden else [])
    assert all(f"padding='{policy}'" in each.text for each in unmet)


def test_constants_are_padded_only_where_the_weight_is_one():
    context = CompileContext(padding=CONSTANTS)
    ours = kernel("pytorch_scaled_mm")
    assert plan_padding(asked(n=30), ours, context) == Padding(32, 64)
    computed = replace(asked(n=30), constant_weight=False)
    with pytest.raises(NoKernelError, match="padding='constants' pads no weight that is computed"):
        select(computed, named_target("sm90"), force_kernel=ours.name, context=context)


def test_the_default_policy_is_auto_and_options_name_the_others():
    assert CompileContext.of(Options.parse({})) == GRAPH == CompileContext(Mode.GRAPH, AUTO, deterministic=False)
    given = {"padding": "vllm", "deterministic": True, "piecewise": True}
    assert CompileContext.of(Options.parse(given)) == CompileContext(Mode.PIECEWISE, VLLM, deterministic=True)
    assert CompileContext(padding="never") == CompileContext.of(Options.parse({"padding": NEVER}))
    for wrong in (lambda: Options.parse({"padding": "alway"}), lambda: CompileContext(padding="alway")):
        with pytest.raises(UnknownNameError, match="unknown padding policy 'alway'"):
            wrong()
    with pytest.raises(FxQuantError, match="'deterministic' must be True or False, got 1"):
        Options.parse({"deterministic": 1})


def test_each_context_has_its_own_artefacts():
    given = [{}, {"padding": "always"}, {"deterministic": True}]
    assert len({str(RewritePass(Options.parse(options), named_target("x86")).uuid()) for options in given}) == 3


# --- rows that a graph pads -------------------------------------------------------------------------------------------


@pytest.fixture
def padded_int_mm(monkeypatch):
    """``pytorch_int_mm`` as a kernel that few rows make slow."""
    chosen = replace(kernel("pytorch_int_mm"), least_rows=ROWS)
    monkeypatch.setitem(registry._KERNELS, chosen.name, chosen)
    return chosen.name


class Int8Linear(nn.Module):
    def __init__(self, n: int = 32, k: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator))
        self.register_buffer("scale", torch.rand(n, generator=generator) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
        codes = torch.round(x / scale).clamp(-128, 127).to(torch.int8)
        return torch._int_mm(codes, self.weight.t()).float() * scale * self.scale


def sample(m: int, k: int = 64) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


class Rewritten:
    """A backend that rewrites each graph, looks that this guards nothing, and runs it node by node."""

    def __init__(self, kernel: str, policy: str) -> None:
        self.options = Options.parse({"padding": policy, "force_kernel": kernel})
        self.guards = False
        self.graphs: list[Graph] = []
        self.reports: list[Report] = []

    def __call__(self, gm: GraphModule, inputs: list) -> object:
        def compiler(gm: GraphModule, _: list) -> GraphModule:
            values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
            (env,) = {id(x.node.shape_env): x.node.shape_env for x in values if isinstance(x, torch.SymInt)}.values()
            before = len(env.guards)
            report = rewrite_graph(gm.graph, named_target("x86_vnni"), self.options, static_input_indices(gm.graph))
            assert self.guards or len(env.guards) == before
            gm.graph.lint()
            gm.recompile()
            self.reports.append(report)
            self.graphs.append(gm.graph)
            return gm

        decompositions = decompositions_without_matmul()
        return aot_autograd(fw_compiler=compiler, decompositions=decompositions)(gm, inputs)


def sizes_of_rows(graph: Graph) -> list[torch.SymInt | int]:
    """Rows of what the one kernel of ``graph`` is given: the activation's, and its scale's unless that is one number."""
    (call,) = calls(graph, torch.ops.fx_quant.pytorch_int_mm.default)
    return [x.shape[0] for i in (0, 2) if (x := call.args[i].meta["val"]).dim()]


@pytest.mark.parametrize("k", [64, 60])
@pytest.mark.parametrize("policy", ["auto", "always"])
def test_a_graph_of_any_m_pads_its_rows_without_a_guard_or_a_recompile(padded_int_mm, policy, k):
    torch._dynamo.reset()
    model, backend = Int8Linear(k=k), Rewritten(padded_int_mm, policy)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for m in (2, 3, 15, 16, 17, 18, 31, 32, 33, 128):
            assert_within(compiled(sample(m, k)), model(sample(m, k)), Numerics.EXACT)
    (graph,) = backend.graphs
    (report,) = backend.reports
    padded = [str(size).startswith("s") and "Max(0, 17 - " in str(size) for size in sizes_of_rows(graph)]
    assert padded == [policy == "always"] * 2
    assert report.sites[0].padding == ("none" if policy == "auto" else "m <17->17")
    assert Report.from_json(report.to_json()).sites[0].padding == report.sites[0].padding


def test_rows_that_are_read_off_values_are_padded_without_a_guard_or_a_recompile(padded_int_mm):
    torch._dynamo.reset()
    model, backend = Int8Linear(), Rewritten(padded_int_mm, "always")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for m in (24, 0, 1, 2, 16, 17, 33):
            x = sample(m)
            mark_unbacked(x, 0)
            assert_within(compiled(x), model(x), Numerics.EXACT)
    (graph,) = backend.graphs
    assert all("Max(0, 17 - u" in str(size) for size in sizes_of_rows(graph))


@pytest.mark.parametrize(("m", "rows"), [(1, 17), (5, 17), (17, 17), (20, 20)])
def test_a_graph_of_one_m_pads_by_a_number(padded_int_mm, m, rows):
    model = Int8Linear()
    (captured,) = capture(model, sample(m), options={"padding": "always", "force_kernel": padded_int_mm})
    assert set(sizes_of_rows(captured.state.graph)) == {rows}
    assert captured.state.graph.find_nodes(op="call_function", target=torch.sym_max) == []
    (out,), *_ = run(captured.state.graph, *captured.inputs)
    assert_within(out, model(sample(m)), Numerics.EXACT)


def test_rows_that_a_guard_bounds_from_below_are_not_padded(padded_int_mm):
    torch._dynamo.reset()
    model, backend = Int8Linear(), Rewritten(padded_int_mm, "always")
    compiled = torch.compile(model, backend=backend)
    x = sample(32)
    torch._dynamo.mark_dynamic(x, 0, min=17, max=1024)
    with torch.no_grad():
        assert_within(compiled(x), model(x), Numerics.EXACT)
    assert not any("Max" in str(size) for size in sizes_of_rows(backend.graphs[0]))
    assert backend.reports[0].sites[0].padding == "none"


def test_inductor_compiles_rows_and_k_that_are_padded(padded_int_mm, monkeypatch):
    """The quantize writes its codes once, with the zeros behind them."""
    torch._dynamo.reset()
    aligned = replace(kernel(padded_int_mm), requires=replace(kernel(padded_int_mm).requires, align=16))
    monkeypatch.setitem(registry._KERNELS, aligned.name, aligned)
    model = Int8Linear(n=30, k=60)
    compiled = torch.compile(
        model, backend="fx_quant", dynamic=True, options={"padding": "always", "force_kernel": padded_int_mm}
    )
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for m in (2, 16, 17, 33):
            assert_within(compiled(sample(m, 60)), model(sample(m, 60)), Numerics.SAME_ACCUM)


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    codes = (x.float() / 0.1).clamp(-448, 448).to(torch.float8_e4m3fn)
    one = torch.full((), 0.1)
    return torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=scale, out_dtype=torch.bfloat16)


def padding_steps(graph: Graph) -> list[str]:
    """What pads, multiplies and cuts off in ``graph``, each with what it gives."""
    steps = []
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if name.startswith(("sub", "sym_max", "constant_pad", "slice", "pytorch_", "cpu_")):
            value = node.meta["val"]
            shown = list(value.shape) if isinstance(value, Tensor) else value
            steps.append(f"{name.removesuffix('.default')} {re.sub(r's[0-9]+', 'm', str(shown))}")
    return steps


PADDED = [
    "sub 17 - m",
    "sym_max Max(0, 17 - m)",
    "constant_pad_nd [m + Max(0, 17 - m), 64]",
    "pytorch_scaled_mm [m + Max(0, 17 - m), 32]",
    "slice.Tensor [m, 32]",
]


@pytest.mark.parametrize(
    ("target", "policy", "steps"),
    [
        *((target, policy, PADDED) for target in ("sm90", "sm100") for policy in ("always", "vllm")),
        *(("sm90", policy, ["pytorch_scaled_mm [m, 32]"]) for policy in ("auto", "never", "constants")),
        *(("gfx950", policy, ["pytorch_scaled_mm [m, 32]"]) for policy in ("auto", "always", "vllm")),
        *(("x86_vnni", policy, ["cpu_decoded_bf16 [m, 32]"]) for policy in ("auto", "always", "vllm")),
    ],
)
def test_a_float8_linear_of_any_m_is_padded_as_the_policy_says(target, policy, steps):
    weight = torch.ones(32, 64).to(torch.float8_e4m3fn)
    graph = trace(float8_linear, sample(20), weight, torch.tensor(0.5), dynamic=True)
    options = Options.parse({"padding": policy, "disabled_kernels": "triton"})
    report = rewrite_graph(graph, named_target(target), options, frozenset({1, 2}))
    assert report.sites[0].padding == ("m <17->17" if steps is PADDED else "none")
    assert padding_steps(graph) == steps
