"""The passes as a whole: one transaction, nothing twice, every outcome reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from fx_quant.backend import RewritePass
from fx_quant.config import Options
from fx_quant.errors import MissError, NoKernelError, UnknownNameError
from fx_quant.kernels import registry
from fx_quant.passes import assign as assign_module
from fx_quant.passes import pipeline
from fx_quant.passes.pipeline import PASSES, rewrite_graph, to_kernels
from fx_quant.passes.reporting import report_on
from fx_quant.passes.rewriting import Rewriting
from fx_quant.passes.rulebook import is_matmul
from fx_quant.passes.verify import VerificationError, verify
from fx_quant.report import Report
from fx_quant.scheme import Numerics
from fx_quant.target import named_target
from tests.graphs import calls, capture, clones, copy_of, rewrite, run, run_in_float64, trace
from tests.models import ADVERSARIAL, Int8Linear, build, inputs
from tests.printer import print_graph

ops = torch.ops.fx_quant
X86 = named_target("x86_vnni")
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
M, K, N = 4, 16, 6


def quantize(x: Tensor, lo: float = -128, hi: float = 127) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-5)
    return torch.round(x.float() / scale).clamp(lo, hi).to(torch.int8), scale


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    codes, x_scale = quantize(x)
    y = torch._int_mm(codes, weight.t()).float() * x_scale * scale
    return (y if bias is None else y + bias).to(x.dtype)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def weight(n: int = N, k: int = K, seed: int = 1) -> Tensor:
    return torch.randint(-128, 128, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


SCALE, BIAS = torch.linspace(0.01, 0.1, N), torch.linspace(-1, 1, N)


def one_linear(*, dynamic: bool = False) -> Graph:
    return trace(linear, sample(M, K), weight(), SCALE, BIAS, dynamic=dynamic)


def rewritten(graph: Graph, **options: object) -> Report:
    static = frozenset(range(1, len(graph.find_nodes(op="placeholder"))))
    return rewrite_graph(graph, X86, Options.parse(options), static)


def assert_same_bits(before: Graph, after: Graph, *given: Tensor) -> None:
    for new, old in zip(run(after, *given)[0], run(before, *given)[0], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


# --- a transaction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [linear, lambda x, w, s, b: x @ w.t().to(BF16)], ids=["site", "miss"])
def test_a_second_run_changes_nothing(function):
    graph = trace(function, sample(M, K), weight(), SCALE, BIAS)
    first = rewritten(graph)
    text, nodes = print_graph(graph), list(graph.nodes)
    second = rewritten(graph)
    assert print_graph(graph) == text
    assert list(graph.nodes) == nodes
    assert (second.sites, second.misses) == ((), first.misses)


@pytest.mark.parametrize("name", ["fp8_vllm_channelwise", "torchao_int8", "qkv_shared"])
def test_a_second_run_on_a_library_s_graph_finds_nothing(name):
    (graph,) = capture(build(name), inputs(BF16, 3))
    after = graph.state.graph
    text = print_graph(after)
    report = rewrite_graph(after, X86, Options(), graph.static)
    assert (report.sites, report.misses, print_graph(after)) == ((), (), text)


UNQUANTIZED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "float_linear": (lambda x, w: F.linear(x, w).relu() * 1 + 0, (sample(M, K), sample(N, K))),
    "mask": (lambda x, w, mask: (x * mask.to(BF16)) @ w.t(), (sample(M, K), sample(N, K), weight(1, K)[0])),
    "image": (lambda x, w: (x.float() / 255) @ w.t().float(), (weight(M, K).to(torch.uint8), sample(N, K))),
    "codes_without_matmul": (lambda x, w: quantize(x)[0], (sample(M, K), sample(N, K))),
}


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_a_graph_without_a_quantized_matmul_is_left_byte_for_byte(name):
    function, given = UNQUANTIZED[name]
    graph = trace(function, *given)
    text, nodes = print_graph(graph), list(graph.nodes)
    report = rewritten(graph)
    assert (report.sites, report.misses) == ((), ())
    assert print_graph(graph) == text
    assert all(new is old for new, old in zip(graph.nodes, nodes, strict=True))


def test_a_graph_with_misses_only_is_left_byte_for_byte():
    graph = trace(lambda x, w: decoded(x) @ w.t(), sample(M, K), sample(N, K))
    nodes = list(graph.nodes)
    assert rewritten(graph).misses
    assert all(new is old for new, old in zip(graph.nodes, nodes, strict=True))


PARTS = ["rewrite_quantizers", "merge_duplicates", "assign", "verify"]


def explode(*_: object, **__: object) -> None:
    raise ValueError("broken on purpose")


@pytest.mark.parametrize("name", PARTS)
def test_an_exception_in_a_pass_leaves_the_graph_as_it_was(name, monkeypatch):
    graph = one_linear()
    text, nodes = print_graph(graph), list(graph.nodes)
    monkeypatch.setattr(pipeline, name, explode)
    with pytest.raises(ValueError, match="broken on purpose"):
        rewritten(graph)
    assert print_graph(graph) == text
    assert all(new is old for new, old in zip(graph.nodes, nodes, strict=True))


def test_an_exception_in_a_pass_is_one_warning_and_one_miss(monkeypatch):
    reports: list[Report] = []
    monkeypatch.setattr(pipeline, "assign", explode)
    with pytest.warns(UserWarning, match="broken on purpose"):
        RewritePass(Options(), X86, reports.append)(one_linear())
    assert [miss.reason for miss in reports[0].misses] == ["a pass failed with ValueError('broken on purpose')"]


def test_a_provider_that_cannot_be_loaded_is_one_warning_and_one_miss(monkeypatch):
    """It is loaded where the machine is detected, whose libraries are those that providers require."""
    monkeypatch.setattr(registry, "_load_providers", explode)
    graph, reports = one_linear(), []
    text = print_graph(graph)
    with pytest.warns(UserWarning, match="broken on purpose"):
        RewritePass(Options(), None, reports.append)(graph)
    assert [miss.reason for miss in reports[0].misses] == ["a pass failed with ValueError('broken on purpose')"]
    assert (reports[0].target, print_graph(graph)) == ("cpu", text)


def test_strict_turns_an_exception_in_a_pass_into_an_error(monkeypatch):
    monkeypatch.setattr(pipeline, "assign", explode)
    with pytest.raises(MissError, match="broken on purpose"):
        RewritePass(Options(strict=True), X86)(one_linear())


def test_the_graph_after_each_pass_is_dumped_under_its_name(monkeypatch):
    dumped: dict[str, str] = {}
    monkeypatch.setattr(pipeline, "dump_graph", lambda name, graph: dumped.setdefault(name, print_graph(graph)))
    rewritten(one_linear())
    assert [name[12:].lower() for name in dumped] == [step.__name__ for step in PASSES]
    assert [name[9:11] for name in dumped] == [f"{number:02}" for number in range(1, len(PASSES) + 1)]
    after = {name[12:]: text for name, text in dumped.items()}
    assert "scaled_mm" not in after["CHOOSE_KERNELS"]
    assert "fx_quant.scaled_mm" in after["WRITE_CANONICAL_OPS"]
    assert "fx_quant.cpu_int8_vnni" in after["ASSIGN_KERNELS"]


def test_a_graph_without_a_site_goes_no_further_than_the_choice_of_kernels(monkeypatch):
    dumped = []
    monkeypatch.setattr(pipeline, "dump_graph", lambda name, graph: dumped.append(name))
    rewritten(trace(lambda x, w: decoded(x) @ w.t(), sample(M, K), sample(N, K)))
    assert dumped[-1] == "FX_QUANT_06_CHOOSE_KERNELS"


def test_verify_refuses_a_canonical_op_without_a_kernel():
    state = rewrite(one_linear())
    with pytest.raises(VerificationError, match="must all be assigned a kernel"):
        verify(state.graph, state.before)


def test_verify_refuses_a_weight_only_op_without_a_kernel():
    state = rewrite(trace(lambda x, w, s: x @ (w.float() * s).t().to(BF16), sample(M, K), weight(), torch.tensor(0.1)))
    assert calls(state.graph, ops.weight_only_mm.default)
    with pytest.raises(VerificationError, match="must all be assigned a kernel"):
        verify(state.graph, state.before)


def test_verify_refuses_an_op_of_the_source_that_has_a_kernel_and_is_still_there():
    graph = trace(lambda a, w: ops.scaled_mm(a, w.t(), None, None, None, torch.int32), weight(M), weight())
    (op,) = calls(graph, ops.scaled_mm.default)
    verify(graph, copy_of(graph))
    with pytest.raises(VerificationError, match=r"must all be assigned a kernel, found \[scaled_mm"):
        verify(graph, copy_of(graph), assigned=[op.name])


def _unsigned(x, w, scale, a):
    return ops.scaled_mm(a, w.t(), None, None, None, torch.float32), linear(x, w, scale)


def _symbolic(a, w, scale, x):
    return ops.scaled_mm(w, a.t(), None, None, None, torch.float32), linear(x, w, scale)


def _symbolic_weight_only(a, w, scale, x):
    return ops.weight_only_mm(x, a.t(), scale[:1], None, None, BF16), linear(x, w, scale)


@pytest.mark.parametrize(
    ("function", "first", "last", "reason"),
    [
        (_unsigned, sample(M, K), weight(M).to(torch.uint8), "no kernel can run uint8"),
        (_symbolic, weight(5), sample(M, K), "n and k must be static"),
        (_symbolic_weight_only, weight(5), sample(M, K), "n and k must be static"),
    ],
)
def test_a_missed_canonical_op_of_the_source_leaves_the_rewrites_beside_it(function, first, last, reason):
    given = (first, weight(), SCALE, last)
    graph = trace(function, *given, dynamic=True)
    before = copy_of(graph)
    report = rewrite_graph(graph, X86, Options(), frozenset({1, 2}))
    assert [miss.reason.startswith(reason) for miss in report.misses] == [True]
    assert len(report.sites) == 1 and not calls(graph, torch.ops.aten._int_mm.default)
    assert len(calls(graph, ops.cpu_int8_vnni.default)) == 1
    assert_same_bits(before, graph, *given)


def test_a_canonical_op_of_the_source_whose_kernel_cannot_be_called_leaves_the_rewrites_beside_it(monkeypatch):
    def assigned(emitter, node, *rest):
        if node.name == op.name:
            raise ValueError("broken on purpose")
        return inner(emitter, node, *rest)

    inner = assign_module._assign
    monkeypatch.setattr(assign_module, "_assign", assigned)
    given = (weight(M), weight(), SCALE, sample(M, K))
    graph = trace(
        lambda a, w, scale, x: (ops.scaled_mm(a, w.t(), None, None, None, torch.int32), linear(x, w, scale)), *given
    )
    (op,) = calls(graph, ops.scaled_mm.default)
    report = rewrite_graph(graph, X86, Options(), frozenset({1, 2}))
    assert ["broken on purpose" in miss.reason for miss in report.misses] == [True]
    assert len(report.sites) == 1 and len(calls(graph, ops.scaled_mm.default)) == 1


def test_verify_refuses_an_output_of_another_dtype():
    before = one_linear()
    after = trace(lambda *given: linear(*given).float(), sample(M, K), weight(), SCALE, BIAS)
    with pytest.raises(VerificationError, match=r"was torch.bfloat16\[4, 6\] on cpu, became torch.float32"):
        verify(after, before)


def test_verify_refuses_an_output_of_another_shape():
    before = one_linear()
    after = trace(lambda *given: linear(*given).t(), sample(M, K), weight(), SCALE, BIAS)
    with pytest.raises(VerificationError, match=r"became torch.bfloat16\[6, 4\]"):
        verify(after, before)


# --- nothing twice ----------------------------------------------------------------------------------------------


def test_q_k_and_v_share_one_quantize():
    (graph,) = capture(build("qkv_shared"), inputs(BF16, 3))
    assert len(calls(graph.state.graph, ops.quantize.dynamic)) == 1


def test_q_k_and_v_are_packed_by_one_call():
    (graph,) = capture(build("qkv_shared"), inputs(BF16, 3))
    (prepack,) = calls(graph.state.graph, ops.prepack.default)
    assert (len(prepack.args[0]), prepack.args[1]) == (3, ["vnni"] * 3)


def test_tied_weights_are_packed_once():
    def tied(x, w, s):
        return linear(linear(x, w, s).relu(), w, s)

    state = rewrite(trace(tied, sample(M, K), weight(K, K), torch.rand(K)))
    to_kernels(state)
    (prepack,) = calls(state.graph, ops.prepack.default)
    assert (len(state.rows), len(prepack.args[0])) == (2, 1)


def test_codes_shared_by_float8_linears_are_widened_once():
    (graph,) = capture(build("qkv_shared_fp8"), inputs(BF16, 2))
    casts = calls(graph.state.graph, torch.ops.prims.convert_element_type.default)
    assert [node.meta["val"].dtype for node in casts].count(BF16) == 1


def two_linears(x: Tensor, w: Tensor, s: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return linear(linear(x, w, s), v, t)


TWO = (sample(M, K), weight(K, K), torch.rand(K) * 0.01, weight(N, K, 2), SCALE)


def test_a_linear_that_feeds_another_leaves_nothing_of_itself_behind():
    state = rewrite(trace(two_linears, *TWO))
    names = {str(node.target) for node in state.graph.nodes if node.op == "call_function"}
    assert names == {
        "fx_quant.quantize.dynamic",
        "fx_quant.scaled_mm.default",
        "aten.permute.default",
        "<built-in function getitem>",
    }


def test_a_linear_that_feeds_another_gives_the_same_bits():
    source = trace(two_linears, *TWO)
    assert_same_bits(source, rewrite(source).graph, *TWO)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_used_twice_is_packed_once_however_it_lies(transposed):
    def function(x, w, s):
        w = w.t() if transposed else w
        return linear(x, w, s) + linear(x * 2, w, s)

    state = rewrite(trace(function, sample(M, K), weight(K, K), torch.rand(K)))
    to_kernels(state)
    (prepack,) = calls(state.graph, ops.prepack.default)
    assert len(prepack.args[0]) == 1


def test_a_residual_of_one_row_is_not_computed_twice():
    """With one row a residual looks like a bias, and this one is the output of another site."""

    def function(x, w, s):
        y = linear(x, w, s)
        return torch._int_mm(quantize(y)[0], w.t()) * s + y

    given = (sample(1, K).float(), weight(K, K), torch.rand(K) * 0.01)
    source = trace(function, *given)
    state = rewrite(source)
    assert len(state.rows) == 2
    assert not [node for node in state.graph.nodes if is_matmul(node)]
    assert_same_bits(source, rewrite(source, numerics="exact").graph, *given)


def scaled_float8(x: Tensor, w: Tensor) -> Tensor:
    one = torch.ones(())
    return torch._scaled_mm(x.to(torch.float8_e4m3fn), w.t(), scale_a=one, scale_b=one, out_dtype=BF16)


NOT_WORTH_IT = {
    "a_class": (lambda x, w, b: torch._int_mm(x.to(torch.int8), w.t()) + b.to(BF16), torch.int8),
    "a_rounding": (lambda x, w, b: scaled_float8(x, w) + b.to(BF16), torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", NOT_WORTH_IT)
def test_a_bias_is_not_worth(name):
    """It joins the epilogue of any kernel anyway."""
    function, dtype = NOT_WORTH_IT[name]
    (gemm,) = calls(rewrite(trace(function, sample(M, K), weight().to(dtype), BIAS)).graph, ops.scaled_mm.default)
    assert gemm.args[4] is None


def test_equal_outputs_stay_two_tensors():
    """Merged, a later write to one would change the other."""

    def function(x, w, s):
        return linear(x, w, s), x * 2, x * 2

    graph = trace(function, sample(M, K), weight(), SCALE)
    (output,) = rewrite(graph).graph.find_nodes(op="output")
    assert output.args[0][1] is not output.args[0][2]


def test_zero_and_minus_zero_are_two_scales():
    def function(x, w):
        codes, _ = quantize(x)
        return torch._int_mm(codes, w.t()).float() * 0.0, torch._int_mm(codes, w.t() * 1).float() * -0.0

    given = (sample(M, K), weight())
    source = trace(function, *given)
    expected, actual = run(source, *given)[0], run(rewrite(source).graph, *given)[0]
    assert all(torch.equal(new.signbit(), old.signbit()) for new, old in zip(actual, expected, strict=True))


def test_one_scale_for_two_ranges_is_two_quantizes():
    def function(x, w, s):
        narrow, _ = quantize(x, -64, 63)
        wide, scale = quantize(x)
        y, z = torch._int_mm(narrow, w.t()), torch._int_mm(wide, w.t())
        return y.float() * scale * s, z.float() * scale * s

    given = (sample(M, K), weight(), SCALE)
    source = trace(function, *given)
    state = rewrite(source)
    assert [node.kwargs["lo"] for node in calls(state.graph, ops.quantize.dynamic)] == [-64.0, -128.0]
    assert_same_bits(source, state.graph, *given)


def test_the_same_scale_is_reshaped_once():
    def function(x, w, v, s, t):
        a = x.to(torch.float8_e4m3fn)
        y, z = (torch._scaled_mm(a, b.t(), scale_a=s, scale_b=t, out_dtype=BF16) for b in (w, v))
        return y, z

    weights = [weight(seed=seed).to(torch.float8_e4m3fn) for seed in (1, 2)]
    state = rewrite(trace(function, sample(M, K), *weights, torch.ones(1), torch.ones(1)))
    assert len(calls(state.graph, torch.ops.aten.reshape.default)) == 2


def test_a_view_of_x_after_its_scale_does_not_stop_the_rewrite():
    def function(x, w, s):
        scale = (x.abs().amax().float() / 127).clamp(min=1e-5)
        rows = x.reshape(-1, K)
        codes = torch.round(rows.float() / scale).clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(codes, w.t()).float() * scale * s).view(*x.shape[:-1], N)

    given = (sample(2, M, K), weight(), SCALE)
    source = trace(function, *given)
    state = rewrite(source)
    assert calls(state.graph, ops.quantize.dynamic)
    assert_same_bits(source, state.graph, *given)
    to_kernels(state)


def test_a_view_of_x_that_cuts_its_rows_is_quantized_with_the_given_scale():
    def function(x, w, s):
        scale = (x.abs().amax().float() / 127).clamp(min=1e-5)
        rows = x.reshape(-1, K)
        codes = torch.round(rows.float() / scale).clamp(-128, 127).to(torch.int8)
        return torch._int_mm(codes, w.t()).float() * scale * s

    given = (sample(M, 2 * K), weight(), SCALE)
    source = trace(function, *given)
    state = rewrite(source)
    assert calls(state.graph, ops.quantize.default)
    assert_same_bits(source, state.graph, *given)
    to_kernels(state)


def test_a_weight_that_is_a_constant_of_the_graph_is_packed():
    """It may stand anywhere in the graph, and the call that packs stands at the head."""
    graph = one_linear()
    placeholder = graph.find_nodes(op="placeholder")[1]
    constant = next(iter(placeholder.users))
    with graph.inserting_before(constant):
        attribute = graph.create_node("get_attr", "weight")
    attribute.meta["val"] = graph.owning_module.weight = placeholder.meta["val"]
    placeholder.replace_all_uses_with(attribute)
    state = rewrite(graph)
    to_kernels(state)
    assert len(calls(state.graph, ops.prepack.default)) == 1


def test_adding_zero_is_dropped_only_where_the_sign_of_zero_is_lost():
    def function(x, w, s):
        codes, scale = quantize(x)
        y = torch._int_mm(codes, w.t()).float() * scale * s
        return y, torch.round(x) + 0

    given = (-sample(M, K).abs() * 0.1, weight(), SCALE)
    source = trace(function, *given)
    after = run(rewrite(source).graph, *given)[0][1]
    assert torch.equal(after.signbit(), run(source, *given)[0][1].signbit())


# --- scales and biases of every shape ---------------------------------------------------------------------------


EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda y: y * torch.arange(1, M + 1)[:, None].to(torch.float32),
    "one_row_per_batch": lambda y: y * torch.arange(1, 3)[:, None, None].to(torch.float32),
    "column": lambda y: y * torch.arange(1, N + 1).to(torch.float32),
    "column_of_ones_before": lambda y: y * torch.arange(1, N + 1)[None, None].to(torch.float32),
    "divided": lambda y: y / torch.arange(1, N + 1).to(torch.float32),
    "divided_row": lambda y: y / torch.arange(1, M + 1)[:, None].to(torch.float32),
    "number": lambda y: y * 0.37,
    "divided_by_a_number": lambda y: y / 0.37,
    "one": lambda y: y * torch.arange(3, 4).to(torch.float32),
    "bias_of_one": lambda y: y + torch.arange(3, 4).to(torch.float32),
    "bias_of_a_number": lambda y: y + 0.37,
    "bias_of_ones_before": lambda y: y + torch.arange(N)[None, None].to(torch.float32),
}


NEED_A_BATCH = ("one_row_per_batch", "column_of_ones_before", "bias_of_ones_before")


@pytest.mark.parametrize(
    ("name", "ndim"), [(name, ndim) for name in EPILOGUES for ndim in (2, 3) if ndim == 3 or name not in NEED_A_BATCH]
)
def test_a_factor_of_any_shape_is_folded_right(name, ndim):
    def function(x, w):
        acc = torch._int_mm(x.reshape(-1, K).to(torch.int8), w.t()).float()
        return EPILOGUES[name](acc.view(*x.shape[:-1], N))

    given = ((sample(2, M, K) if ndim == 3 else sample(M, K)) * 10, weight())
    source = trace(function, *given)
    state = rewrite(source)
    (gemm,) = calls(state.graph, ops.scaled_mm.default)
    assert any(gemm.args[2:5])
    (expected,), (actual,) = run_in_float64(source, *given)[0], run_in_float64(state.graph, *given)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- dequantized operands ---------------------------------------------------------------------------------------


def decoded(x: Tensor) -> Tensor:
    codes, scale = quantize(x)
    return (codes.float() * scale).to(x.dtype)


def decoded_weight(w: Tensor, s: Tensor, dtype: torch.dtype = BF16) -> Tensor:
    return (w.float() * s[:, None]).to(dtype)


DECODED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "mm": (lambda x, w, s, b: decoded(x) @ decoded_weight(w, s).t(), (M, K)),
    "mm_bias": (lambda x, w, s, b: decoded(x) @ decoded_weight(w, s).t() + b.to(BF16), (M, K)),
    "addmm": (lambda x, w, s, b: torch.addmm(b.to(BF16), decoded(x), decoded_weight(w, s).t()), (M, K)),
    "linear": (lambda x, w, s, b: F.linear(decoded(x), decoded_weight(w, s), b.to(BF16)), (M, K)),
    "linear_3d": (lambda x, w, s, b: F.linear(decoded(x), decoded_weight(w, s), b.to(BF16)), (2, M, K)),
    "matmul_3d": (lambda x, w, s, b: decoded(x) @ decoded_weight(w, s).t(), (2, M, K)),
    "bmm": (
        lambda x, w, s, b: torch.bmm(decoded(x), decoded_weight(w, s).t().unsqueeze(0).expand(2, K, N)),
        (2, M, K),
    ),
    "float32": (lambda x, w, s, b: decoded(x.float()) @ decoded_weight(w, s, torch.float32).t() + b, (M, K)),
    "float8": (
        lambda x, w, s, b: (
            (x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.5)
            @ decoded_weight(w.to(torch.float8_e4m3fn), s, torch.float32).t()
        ),
        (M, K),
    ),
}


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_float_matmul_of_dequantized_operands_is_rewritten_as_reassociated(name, dynamic):
    function, shape = DECODED[name]
    codes = weight().to(torch.float8_e4m3fn) if name == "float8" else weight()
    state = rewrite(trace(function, sample(*shape), codes, SCALE, BIAS, dynamic=dynamic))
    assert state.misses == []
    assert [site.product.numerics for site in state.rows] == [Numerics.REASSOCIATED]
    assert [site.problem.constant_weight for site in state.rows] == [True]


@pytest.mark.parametrize("cap", ["exact", "same_accum"])
def test_a_lower_cap_leaves_dequantized_operands_as_they_are(cap):
    function, shape = DECODED["mm"]
    graph = trace(function, sample(*shape), weight(), SCALE, BIAS)
    report = rewritten(graph, numerics=cap)
    assert report.sites == ()
    assert [miss.reason for miss in report.misses] == [
        f"the rewrite is of class reassociated, and numerics={cap} does not allow that"
    ]


def test_weight_only_is_rewritten_to_the_weight_only_op():
    graph = trace(lambda x, w, s: F.linear(x, decoded_weight(w, s)), sample(M, K), weight(), SCALE)
    state = rewrite(graph)
    (site,) = state.rows
    assert str(site.scheme) == "bfloat16 x int8 per_channel"
    assert len(calls(state.graph, ops.weight_only_mm.default)) == 1


def test_weight_only_without_a_kernel_is_recognised_and_left():
    graph = trace(lambda x, w, s: F.linear(x, decoded_weight(w, s)), sample(M, K), weight().to(E4M3), SCALE)
    text = print_graph(graph)
    report = rewritten(graph, disabled_kernels=["cpu"])
    assert (report.sites, report.misses) == ((), ())
    assert "no kernel of x86_vnni runs this scheme" in report.recognised[0].reason
    assert print_graph(graph) == text


def test_a_quantized_tensor_that_changes_from_call_to_call_is_no_weight():
    graph = trace(lambda x, w, s: F.linear(x, decoded_weight(w, s)), sample(M, K), weight(), SCALE)
    report = rewrite(graph, static=(2,))
    assert [miss.rule for miss in report.misses] == [
        "the dequantized operand changes from call to call; only weights are rewritten"
    ]


def test_activation_only_is_a_miss_that_says_so():
    graph = trace(lambda x, w: decoded(x) @ w.t(), sample(M, K), sample(N, K))
    report = rewritten(graph)
    assert [miss.reason for miss in report.misses] == ["only the activation is quantized; the weight is floating point"]


def test_codes_of_symbolic_parts_in_another_order_are_a_miss_that_says_so():
    def swapped(x: Tensor, w: Tensor) -> Tensor:
        codes, _ = quantize(x.reshape(-1, K))
        return F.linear(codes.view(x.shape).transpose(0, 1).float(), w.float())

    state = rewrite(trace(swapped, sample(2, 3, K).float(), weight(), dynamic=True))
    (miss,) = state.misses
    assert "of symbolic sizes, in another order than its own" in miss.rule


# --- what stands beside a quantized matmul ----------------------------------------------------------------------


class WithLora(nn.Module):
    """A quantized base and a float low-rank branch beside it, as adapters are served."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Int8Linear(BF16, True)
        n, k = self.base.weight.shape
        self.down = nn.Linear(k, 4, bias=False, dtype=BF16)
        self.up = nn.Linear(4, n, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_low_rank_branch_beside_a_quantized_base_is_left_alone(ndim):
    model, x = WithLora().eval().requires_grad_(False), inputs(BF16, ndim)
    (graph,) = capture(model, x)
    assert (len(graph.state.rows), graph.state.misses, graph.state.recognised) == (1, [], [])
    floats = [node for node in graph.state.graph.nodes if is_matmul(node)]
    assert len(floats) == 2
    (expected, *_), _ = run(graph.source, *graph.inputs)
    (actual, *_), _ = run(graph.state.graph, *graph.inputs)
    assert torch.equal(actual, expected)


class Chain(nn.Module):
    """Two quantized linears with an activation between: dequantize, gelu, quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Int8Linear(BF16, True)
        n, _ = self.first.weight.shape
        self.second = Int8Linear(BF16, True, k=n, n=24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def test_what_stands_between_two_matmuls_stays_where_inductor_fuses_it():
    (graph,) = capture(Chain().eval(), inputs(BF16, 2))
    targets = [node.target for node in graph.state.graph.nodes if node.op == "call_function"]
    assert targets.count(ops.cpu_int8_vnni.default) == 2
    between = targets[targets.index(ops.cpu_int8_vnni.default) + 1 :]
    assert ops.quantize.dynamic in between
    assert any("erf" in str(target) for target in between)


def test_query_key_and_value_share_one_quantize():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Int8Linear(BF16, True) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part(x) for part in self.parts)

    (graph,) = capture(Attention().eval(), inputs(BF16, 3))
    assert len(graph.state.rows) == 3
    assert len(calls(graph.state.graph, ops.quantize.dynamic)) == 1


# --- what the report says ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """One linear that is rewritten, one that is missed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"query": Int8Linear(BF16, True)})
        self.register_buffer("weight", weight(48, 48).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(decoded(self.attention["query"](x)), self.weight.to(x.dtype))


def report_of(model: Callable[..., object], *given: Tensor, **arguments: object) -> Report:
    (graph,) = capture(model, *given, **arguments)
    return report_on(graph.state)


def test_a_site_names_its_module_and_line():
    (site,) = report_of(Block(), inputs(BF16, 2)).sites
    assert site.module == "attention.query"
    assert site.source.startswith(__file__.replace("test_pipeline", "models"))


def test_a_miss_names_its_module_line_and_reason():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    (miss,) = report_of(Outer(), inputs(BF16, 2)).misses
    assert miss.module == "block"
    assert miss.source.startswith(f"{__file__}:")
    assert miss.reason == "only the activation is quantized; the weight is floating point"


def test_static_rows_are_an_exact_range():
    assert [site.m for site in report_of(build("int8_int_mm"), inputs(BF16, 3)).sites] == ["48"]


def test_dynamic_rows_are_a_range_without_end():
    assert [site.m for site in report_of(build("int8_int_mm"), inputs(BF16, 2), dynamic_rows=True).sites] == ["2.."]


def test_the_range_of_rows_comes_from_what_the_user_said():
    x = inputs(BF16, 2)
    torch._dynamo.mark_dynamic(x, 0, min=8, max=64)
    assert [site.m for site in report_of(build("int8_int_mm"), x).sites] == ["8..64"]


def test_the_range_of_two_dimensions_is_their_product():
    x = inputs(BF16, 3)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=4)
    torch._dynamo.mark_dynamic(x, 1, min=8, max=64)
    assert [site.m for site in report_of(build("int8_int_mm"), x).sites] == ["16..256"]


def test_rewriting_adds_no_guard():
    """A guard would recompile for other sizes; the sizes are only compared where they are known."""
    graph = one_linear(dynamic=True)
    rows = graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    before = len(rows.node.shape_env.guards)
    rewritten(graph)
    assert len(rows.node.shape_env.guards) == before


def caps(name: str) -> dict[str, list[tuple[str, str, str]]]:
    (graph,) = capture(build(name), ADVERSARIAL[name].inputs(BF16, 2))
    found = {}
    for cap in ("exact", "reassociated"):
        report = report_on(rewrite(graph.source, graph.static, numerics=cap))
        found[cap] = [(site.scheme, site.out_dtype, site.numerics) for site in report.sites]
    return found


def test_the_report_shows_what_a_cap_costs():
    assert caps("narrow_between_scales") == {
        "exact": [("int8 per_token (dynamic) x int8 unscaled", "bfloat16", "exact")],
        "reassociated": [("int8 per_token (dynamic) x int8 per_channel", "bfloat16", "same_accum")],
    }


# --- options ----------------------------------------------------------------------------------------------------


def test_strict_raises_for_a_miss_and_leaves_the_graph():
    graph = trace(lambda x, w: decoded(x) @ w.t(), sample(M, K), sample(N, K))
    text = print_graph(graph)
    with pytest.raises(MissError, match="1 quantized matmuls were missed"):
        rewritten(graph, strict=True)
    assert print_graph(graph) == text


def test_strict_passes_where_nothing_is_missed():
    assert len(rewritten(one_linear(), strict=True).sites) == 1


def test_a_forced_kernel_that_cannot_run_raises_and_leaves_the_graph():
    graph = one_linear()
    text = print_graph(graph)
    with pytest.raises(NoKernelError, match="forced kernel 'cpu_float8_bf16' cannot run"):
        rewritten(graph, force_kernel="cpu_float8_bf16")
    assert print_graph(graph) == text


def test_a_forced_kernel_is_used():
    assert [site.kernel for site in rewritten(one_linear(), force_kernel="pytorch_int_mm").sites] == ["pytorch_int_mm"]


def test_an_unknown_forced_kernel_is_an_error_with_near_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'cpu_int8_vnni'"):
        rewritten(one_linear(), force_kernel="cpu_int8_vnn")


def test_a_disabled_kernel_says_so_among_the_losers():
    (site,) = rewritten(one_linear(), disabled_kernels=["cpu_int8_vnni"]).sites
    assert (site.kernel, site.losers["cpu_int8_vnni"]) == ("pytorch_int_mm", ["is disabled"])


def test_a_site_that_no_kernel_runs_is_recognised_with_every_reason():
    report = rewritten(one_linear(), disabled_kernels=["cpu", "pytorch"])
    (found,) = report.recognised
    assert found.reason == "no kernel of x86_vnni runs this scheme; the source's own steps stay"
    assert found.losers["cpu_int8_vnni"] == ["is disabled"]
    assert found.losers["pytorch_int_mm"] == ["is disabled"]


# --- padding and kernels of other machines ----------------------------------------------------------------------


def on_target(name: str, graph: Graph, static: frozenset[int]) -> Rewriting:
    state = rewrite(graph, static, target=name)
    to_kernels(state)
    return state


@pytest.mark.parametrize("target", ["x86", "x86_vnni", "sm80", "sm90"])
def test_a_padded_kernel_gives_the_bits_of_the_source(target):
    """n = 6 and k = 13 are multiples of nothing."""
    given = (sample(M, 13), weight(N, 13), SCALE, BIAS)
    source = trace(linear, *given)
    assert_same_bits(source, on_target(target, source, frozenset({1, 2, 3})).graph, *given)


def test_source_and_inputs_are_left_alone():
    given = [sample(M, K), weight(), SCALE, BIAS]
    source = trace(linear, *given)
    text, kept = print_graph(source), clones(given)
    rewrite(source)
    run(copy_of(source), *given)
    assert print_graph(source) == text
    assert all(torch.equal(new, old) for new, old in zip(given, kept, strict=True))
