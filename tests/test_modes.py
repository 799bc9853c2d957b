"""Every scheme on every kernel that runs here gives one answer in eager calls, whole graphs and pieces, padded or not."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fx_quant
from fx_quant.compat import decompositions_without_matmul
from fx_quant.config import Options, PaddingPolicy
from fx_quant.kernels import eager, registry
from fx_quant.kernels.context import CompileContext, Mode
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.registry import Kernel, kernel
from fx_quant.layers.linear_operands import linear_problem
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.passes.pipeline import run_passes
from fx_quant.passes.reporting import report_on
from fx_quant.scheme import Granularity, Numerics, Scheme
from tests.test_conformance import ALL_SCHEMES, HERE, RUN_HERE, problem
from tests.tolerances import assert_within

ROWS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 128)
ALIGNED, RAGGED = (64, 128), (70, 36)
LEAST_ROWS = 17


@pytest.fixture(autouse=True)
def nothing_remembered():
    yield
    clear_packed_weights()
    eager._remembered.cache_clear()


# --- linears side by side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One linear: ``n`` and ``k``, the dtype of its input, and whether its author pads its rows."""

    scheme: Scheme
    n: int
    k: int
    dtype: torch.dtype
    author_pads: bool


def cases_of(chosen: Kernel) -> list[Case]:
    """Each scheme that ``chosen`` runs here of both sizes, of which one is as it is and one has a pad of its author's."""
    cases = []
    schemes = [scheme for scheme in ALL_SCHEMES if not scheme.weight.offset]  # which no layer has
    for i, (scheme, (n, k)) in enumerate(itertools.product(schemes, (ALIGNED, RAGGED))):
        dtypes = (scheme.activation.dtype,) if scheme.weight_only else (torch.float32, torch.bfloat16)
        for dtype in dtypes:
            if not chosen.requires.unmet(problem(scheme, n, k, dtype, dtype, 1), HERE):
                cases.append(Case(scheme, n, k, dtype, author_pads=i % 4 in (1, 2)))
                break
    return cases


class GroupedInt8(nn.Module):
    """A linear of int8 codes in groups, which no layer quantizes to."""

    def __init__(self, scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.force_kernel = scheme, None
        weight = quantize_weight(torch.randn(n, k) / 8, scheme.weight)
        self.register_buffer("weight", weight.codes)
        self.register_buffer("weight_scale", weight.scale)
        self.bias = nn.Parameter(torch.randn(n, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        (_, group), k = self.scheme.weight.block, x.shape[1]
        groups = F.pad(x.float(), (0, -k % group)).unflatten(-1, (-1, group))
        scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
        codes = (groups / scale).round().clamp(-128, 127).to(torch.int8).flatten(1)[:, :k].contiguous()
        given = (scale.squeeze(-1), self.weight_scale, self.bias)
        if torch.compiler.is_compiling():
            block = self.scheme.weight.block
            return torch.ops.fx_quant.scaled_mm(codes, self.weight.t(), *given, x.dtype, block=block)
        asked = linear_problem(self.scheme, tuple(self.weight.shape), x.dtype, x.dtype, self.bias)
        return eager.run_kernel(eager.eager_selection(asked, HERE, self.force_kernel), codes, self.weight, *given)


@cache
def layer_of(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(zlib.crc32(f"{scheme}{n}{k}".encode()))
    if scheme.activation.dtype is torch.int8 and scheme.activation.group is not None:
        return GroupedInt8(scheme, n, k, dtype)
    static = not scheme.weight_only and not scheme.activation.dynamic
    return fx_quant.QuantizedLinear.from_float(
        nn.Linear(k, n, dtype=dtype),
        scheme,
        input_scale=torch.tensor(0.03) if static else None,
        input_zero_point=torch.tensor(5) if static and not scheme.activation.symmetric else None,
    )


class Linears(nn.Module):
    """Linears side by side, each of the first columns of one activation."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases
        each = [layer_of(case.scheme, case.n, case.k, case.dtype) for case in cases]
        self.layers = nn.ModuleList(dict.fromkeys(each))
        self.of_case = [list(self.layers).index(layer) for layer in each]

    def forward(self, x: Tensor) -> list[Tensor]:
        m, results = x.shape[0], []
        for i, case in enumerate(self.cases):
            layer = self.layers[self.of_case[i]]
            # An activation of its own, as one padded tensor is padded for all that read it, or for none.
            part = (x[:, : case.k] * (1 + i / 64)).to(case.dtype)
            if case.author_pads:
                padded = F.pad(part, (0, 0, 0, torch.sym_max(LEAST_ROWS - m, 0)))
                results.append(layer(padded).narrow(0, 0, m))
            else:
                results.append(layer(part))
        return results


def sample(m: int, k: int = 128) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


@cache
def graph_of(cases: tuple[Case, ...]) -> tuple[Graph, list[Tensor]]:
    """What ``traced`` gives for any rows: canonical ops, whatever kernel is to run them."""
    return traced(Linears(list(cases)), None)


def traced(model: Linears, rows: int | None) -> tuple[Graph, list[Tensor]]:
    """The graph of ``model`` for that many rows, or for any, and its parameters: the inputs behind the first."""
    params = dict(model.named_parameters()) | dict(model.named_buffers())
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(x, static_shapes=True) for x in params.values()]

    def call(x: Tensor, *given: Tensor) -> list[Tensor]:
        return torch.func.functional_call(model, dict(zip(params, given, strict=True)), (x,))

    with mode, torch.no_grad(), enable_python_dispatcher(), pytest.MonkeyPatch.context() as patch:
        # As Dynamo has it: layers are traced to canonical ops.
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        m = mode.shape_env.create_unbacked_symint() if rows is None else rows
        if rows is None:
            torch._check(m >= 0)
            mode.shape_env.pending_fresh_unbacked_symbols.clear()  # it comes with the input
        x = torch.empty(m, 128)
        graph = make_fx(call, decomposition_table=decompositions_without_matmul(), tracing_mode="real")(x, *fakes).graph
    return graph, list(params.values())


def rewritten(graph: Graph, params: list[Tensor], chosen: str, context: CompileContext):
    """The function of the rows that ``graph`` computes for ``context``, and its report."""
    options = Options.parse({"force_kernel": chosen, "padding": context.padding})
    state = run_passes(graph, HERE, options, frozenset(range(1, len(params) + 1)), context)
    module = GraphModule(nn.Module(), state.graph)
    return lambda x: list(module(x, *params)), report_on(state)


def largest_terms(layer: nn.Module, x: Tensor) -> float:
    """The largest term of the sums of a linear: what cancels leaves its rounding."""
    scale = layer.weight_scale.max().item() * 256
    return max(x.abs().max().item() * scale if x.numel() else 0.0, layer.bias.float().abs().max().item())


def assert_one_answer(outs: list[Tensor], expected: list[Tensor], model: Linears, x: Tensor, chosen: Kernel) -> None:
    for i, (case, out, wanted) in enumerate(zip(model.cases, outs, expected, strict=True)):
        layer = model.layers[model.of_case[i]]
        terms = largest_terms(layer, x) if case.scheme.weight_only else 0.0
        try:
            assert_within(out, wanted, chosen.numerics, terms)
        except AssertionError as error:
            raise AssertionError(f"{chosen.name}, {case}, m={x.shape[0]}: {error}") from None


def has_scale_of_all(case: Case) -> bool:
    """Whether no rows at all have no scale: a graph of no rows is one of its own, which knows."""
    activation = case.scheme.activation
    return not case.scheme.weight_only and activation.dynamic and activation.granularity == Granularity.PER_TENSOR


def padding_twin(chosen: Kernel) -> Kernel:
    """``chosen`` as a kernel that few rows make slow, and that wants n and k in multiples of 16 if they can be padded.

    What is packed is in a layout of its own, which pads as it needs.
    """
    align = max(16, chosen.requires.align) if chosen.layout is None and chosen.requires.paddable else 1
    return replace(chosen, requires=replace(chosen.requires, align=align), least_rows=LEAST_ROWS)


# --- every scheme x kernel x m x size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [each.name for each in RUN_HERE])
def test_eager_calls_whole_graphs_and_pieces_give_one_answer(name, monkeypatch):
    """By vLLM's rule, eager calls and whole graphs are padded and pieces are not; the reference pads nothing."""
    chosen = kernel(name)
    model = Linears(cases_of(chosen))
    for layer in model.layers:
        monkeypatch.setattr(layer, "force_kernel", name)
    with torch.no_grad():
        plain = {m: model(sample(m)) for m in ROWS}
        monkeypatch.setitem(registry._KERNELS, name, padding_twin(chosen))
        eager._remembered.cache_clear()
        source = graph_of(tuple(model.cases))
        graph, of_graph = rewritten(*source, name, CompileContext(Mode.GRAPH, PaddingPolicy.VLLM))
        piece, of_piece = rewritten(*source, name, CompileContext(Mode.PIECEWISE, PaddingPolicy.VLLM))
        for report, rows in ((of_graph, True), (of_piece, False)):
            assert len(report.sites) == len(model.cases)
            for case, site in zip(model.cases, report.sites, strict=True):
                kept = case.author_pads and has_scale_of_all(case)  # a scale of no rows at all is another
                assert ("m <17->17" in site.padding) == (rows and not kept)
                assert case.author_pads == any("m to 17" in note for note in site.notes)
                assert kept == any("kept" in note for note in site.notes), (case, site.notes)
        for m in ROWS:
            x, expected = sample(m), plain[m]
            with fx_quant.mode(padding="vllm"):
                assert_one_answer(model(x), expected, model, x, chosen)
            if m or not any(map(has_scale_of_all, model.cases)):
                for compiled in (graph, piece):
                    assert_one_answer(compiled(x), expected, model, x, chosen)


# --- hypothesis -------------------------------------------------------------------------------------------------------


PADS_ROWS = (PaddingPolicy.AUTO, PaddingPolicy.ALWAYS, PaddingPolicy.VLLM)


@st.composite
def drawn(draw):
    """A kernel, linears of any sizes that it runs, and the policies of the modes."""
    chosen = kernel(draw(st.sampled_from([each.name for each in RUN_HERE])))
    cases = []
    for _ in range(draw(st.integers(1, 3))):
        case = draw(st.sampled_from(cases_of(chosen)))
        pairs = case.scheme.weight.codes_per_element
        n, k = draw(st.integers(1, 100)), draw(st.integers(1, 128 // pairs)) * pairs
        if not chosen.requires.unmet(problem(case.scheme, n, k, case.dtype, case.dtype, 1), HERE):
            case = replace(case, n=n, k=k)
        cases.append(replace(case, author_pads=draw(st.booleans())))
    return chosen, cases, [draw(st.sampled_from(PADS_ROWS)) for _ in Mode]


@settings(max_examples=12, deadline=None)
@given(drawn=drawn(), rows=st.lists(st.integers(0, 40), min_size=1, max_size=3), pads=st.booleans())
def test_any_linears_of_any_sizes_give_one_answer_in_every_mode(drawn, rows, pads):
    chosen, cases, (of_calls, of_graphs, of_pieces) = drawn
    model = Linears(cases)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for layer in model.layers:
            patch.setattr(layer, "force_kernel", chosen.name)
        plain = {m: model(sample(m)) for m in rows}
        if pads:
            patch.setitem(registry._KERNELS, chosen.name, padding_twin(chosen))
            eager._remembered.cache_clear()
        source = traced(model, None)
        graph, _ = rewritten(*source, chosen.name, CompileContext(Mode.GRAPH, of_graphs))
        piece, _ = rewritten(*source, chosen.name, CompileContext(Mode.PIECEWISE, of_pieces))
        for m, expected in plain.items():
            x = sample(m)
            with fx_quant.mode(padding=of_calls):
                assert_one_answer(model(x), expected, model, x, chosen)
            if m or not any(map(has_scale_of_all, cases)):
                for compiled in (graph, piece):
                    assert_one_answer(compiled(x), expected, model, x, chosen)
    clear_packed_weights()
    eager._remembered.cache_clear()


# --- no rows at all, and Inductor -------------------------------------------------------------------------------------


def test_a_graph_of_no_rows_gives_what_an_eager_call_does():
    """One scale of no rows at all is that of zeros, which a graph that is compiled for them knows."""
    for chosen in ("cpu_int8_portable", "cpu_float8_float32"):
        cases = [case for case in cases_of(kernel(chosen)) if has_scale_of_all(case)]
        model = Linears(cases)
        with torch.no_grad():
            expected, source = model(sample(0)), traced(model, 0)
            for mode in (Mode.GRAPH, Mode.PIECEWISE):
                compiled, _ = rewritten(*source, chosen, CompileContext(mode))
                assert_one_answer(compiled(sample(0)), expected, model, sample(0), kernel(chosen))


def test_inductor_gives_that_answer_too_compiled_once():
    """Pieces are those around a call of an op that is named; whole graph and pieces are compiled for any m."""
    schemes = ("int8 per_token (dynamic) x int8 per_channel", "bfloat16 x int4 per_group(32)")
    layers = [fx_quant.QuantizedLinear.from_float(nn.Linear(128, 128).bfloat16(), text) for text in schemes]
    model = nn.Sequential(layers[0], Cut(), layers[1])
    for options in ({}, {"piecewise": True, "splitting_ops": ["fx_quant_tests::cut"]}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="fx_quant", dynamic=True, options=options)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for m in ROWS[2:]:
                x = sample(m).bfloat16()
                expected = model(x)
                assert_within(compiled(x), expected, Numerics.REASSOCIATED, expected.abs().max().item())


@torch.library.custom_op("fx_quant_tests::cut", mutates_args=())
def cut(x: Tensor) -> Tensor:
    return x.clone()


@cut.register_fake
def _(x):
    return torch.empty_like(x)


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return cut(x)
