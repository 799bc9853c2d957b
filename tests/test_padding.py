"""Padding plans, and that what a plan pads does not change the result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

import fx_quant
from fx_quant.config import Options
from fx_quant.kernels import eager, registry
from fx_quant.kernels.context import GRAPH, CompileContext
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.padding import Padding, plan_padding
from fx_quant.kernels.registry import Requires, kernel
from fx_quant.kernels.select import Selection
from fx_quant.passes.assign import assign
from fx_quant.passes.inputs import classify_inputs
from fx_quant.passes.pipeline import to_canonical, to_kernels
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import named_target
from tests.graphs import calls, run, trace
from tests.test_conformance import HERE
from tests.test_conformance import operands as operands_of_problem
from tests.test_deterministic import accepted as accepted_problems
from tests.test_realise import Recorded
from tests.tolerances import assert_within

ops = torch.ops.fx_quant
E4M3 = torch.float8_e4m3fn
SCHEME = Scheme(OperandSpec(torch.int8, Granularity.PER_TOKEN), OperandSpec(torch.int8, Granularity.PER_CHANNEL))
PROBLEM = Problem(SCHEME, SizeRange(1, None), 30, 60, torch.bfloat16, None, constant_weight=True)

sizes = st.integers(1, 10_000)
alignments = st.sampled_from([1, 4, 8, 16, 32, 128])


def sized(n: int, k: int) -> Problem:
    return replace(PROBLEM, n=n, k=k)


def least_plan(n: int, k: int, align: int) -> Padding:
    """The plan of a graph for a kernel that wants n and k in multiples of ``align``."""
    return plan_padding(sized(n, k), replace(kernel("pytorch_int_mm"), requires=Requires(align=align)), GRAPH)


# --- the plan ---------------------------------------------------------------------------------------------------


@given(n=sizes, k=sizes, align=alignments)
def test_a_plan_pads_to_the_least_multiple(n, k, align):
    padding = least_plan(n, k, align)
    for size, padded in ((n, padding.n), (k, padding.k)):
        assert padded % align == 0
        assert 0 <= padded - size < align


@given(n=sizes, k=sizes, align=alignments)
def test_a_padded_problem_needs_no_more_padding(n, k, align):
    padding = least_plan(n, k, align)
    assert least_plan(padding.n, padding.k, align) == padding


@given(n=sizes, k=sizes, align=alignments)
def test_a_plan_changes_a_problem_exactly_when_a_size_is_unaligned(n, k, align):
    assert (least_plan(n, k, align) != Padding(n, k)) == bool(n % align or k % align)


@pytest.mark.parametrize(
    ("n", "k", "text"),
    [(32, 64, "none"), (30, 64, "n 30->32"), (32, 60, "k 60->64"), (30, 60, "n 30->32, k 60->64")],
)
def test_a_plan_says_what_it_pads(n, k, text):
    assert least_plan(n, k, 16).describe(sized(n, k)) == text


# --- padded operands --------------------------------------------------------------------------------------------


def operands(m: int, n: int, k: int, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``a [m, k]``, ``b [k, n]``, their scales and a bias; m may be 0."""
    generator = torch.Generator().manual_seed(n * 10_007 + k * 101 + m)
    a, b = (torch.randint(-128, 128, shape, generator=generator) for shape in ((m, k), (n, k)))
    return (
        a.to(dtype),
        b.to(dtype).t(),
        torch.rand(m, 1, generator=generator) + 0.01,
        torch.rand(n, generator=generator) + 0.01,
        torch.randn(n, generator=generator),
    )


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 19),
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    align=st.sampled_from([8, 16]),
    dtype=st.sampled_from([torch.int8, E4M3]),
)
def test_zero_codes_one_scales_and_zero_bias_leave_the_result_alone(m, n, k, align, dtype):
    a, b, a_scale, b_scale, bias = operands(m, n, k, dtype)
    plan = least_plan(n, k, align)
    pad_n, pad_k = plan.n - n, plan.k - k
    padded = ops.scaled_mm(
        F.pad(a, (0, pad_k)),
        F.pad(b, (0, pad_n, 0, pad_k)),
        a_scale,
        F.pad(b_scale, (0, pad_n), value=1.0),
        F.pad(bias, (0, pad_n)),
        torch.bfloat16,
    )
    # Zeros change no product, but a float32 sum of float8 products may be cut into other pieces.
    numerics = Numerics.EXACT if dtype is torch.int8 else Numerics.SAME_ACCUM
    expected = ops.scaled_mm(a, b, a_scale, b_scale, bias, torch.bfloat16)
    assert padded.isfinite().all()
    assert_within(padded[:, :n], expected, numerics)


def padded_graph(padding: Padding, arguments: tuple, n: int, k: int) -> GraphModule:
    """The graph of ``scaled_mm(*arguments)`` after its op was assigned a kernel with ``padding``."""

    def call(*tensors: Tensor | None) -> Tensor:
        return ops.scaled_mm(*tensors, torch.float32)

    traced = make_fx(call, tracing_mode="fake")(*arguments)
    (node,) = traced.graph.find_nodes(op="call_function", target=ops.scaled_mm.default)
    selection = Selection(sized(n, k), named_target("x86"), kernel("pytorch_int_mm"), padding, ())
    assign(traced.graph, {node: selection})
    traced.graph.lint()
    traced.recompile()
    return traced


B_SCALES = {"none": None, "0-d": torch.tensor(0.5), "[1]": torch.tensor([0.5]), "[n]": ..., "[1, n]": ...}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("b_scale", B_SCALES)
@pytest.mark.parametrize("n", [1, 30, 32])
@pytest.mark.parametrize("k", [60, 64])
def test_a_padded_kernel_gives_the_result_of_the_unpadded_op(n, k, b_scale, with_bias):
    a, b, a_scale, per_column, bias = operands(5, n, k)
    given_scale = {"[n]": per_column, "[1, n]": per_column[None]}.get(b_scale, B_SCALES[b_scale])
    arguments = (a, b, a_scale, given_scale, bias if with_bias else None)
    graph = padded_graph(least_plan(n, k, 16), arguments, n, k)
    assert_within(graph(*arguments), ops.scaled_mm(*arguments, torch.float32), Numerics.EXACT)


def test_the_padded_result_is_contiguous():
    arguments = operands(5, 30, 60)
    assert padded_graph(least_plan(30, 60, 16), arguments, 30, 60)(*arguments).is_contiguous()


@pytest.mark.parametrize("layout", ["column-major", "row-major"])
def test_a_padded_weight_is_column_major(layout):
    """GPU kernels take no other layout."""
    a, b, *rest = operands(5, 30, 60)
    arguments = (a, b if layout == "column-major" else b.contiguous(), *rest)
    graph = padded_graph(least_plan(30, 60, 16), arguments, 30, 60).graph
    (node,) = graph.find_nodes(op="call_function", target=ops.pytorch_int_mm.default)
    padded = node.args[1].meta["val"]
    assert (tuple(padded.shape), padded.stride()) == ((64, 32), (1, 64))


class KernelOperands(Interpreter):
    """Runs a graph and keeps what its kernel was called with."""

    operands: tuple = ()

    def call_function(self, target, args, kwargs):
        if target is ops.pytorch_int_mm.default:
            self.operands = args
        return super().call_function(target, args, kwargs)


def test_codes_are_padded_with_zero_scales_with_one_and_the_bias_with_zero():
    arguments = operands(5, 30, 60)
    interpreter = KernelOperands(padded_graph(least_plan(30, 60, 16), arguments, 30, 60))
    interpreter.run(*arguments)
    a, b, a_scale, b_scale, bias, *_ = interpreter.operands
    assert not a[:, 60:].any()
    assert not b[60:].any()
    assert not b[:, 30:].any()
    assert torch.equal(a_scale, arguments[2])
    assert b_scale[30:].tolist() == [1.0, 1.0]
    assert bias[30:].tolist() == [0.0, 0.0]


# --- k of the activation, inside of its quantize ----------------------------------------------------------------------

QUANTIZE = {"dtype": torch.int8, "reciprocal": False, "lo": -127.0, "hi": 127.0}
DYNAMIC = QUANTIZE | {
    "granularity": "per_token",
    "divisor": 127.0,
    "divide_dtype": torch.float32,
    "floor": 1e-6,
    "floor_on": "scale",
    "scale_dtype": torch.float32,
}


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.parametrize("shape", [(5, 60), (2, 3, 60), (0, 60)])
def test_a_quantize_that_pads_has_the_same_codes_and_zeros_behind(shape, dtype):
    x, named = torch.randn(shape), {"dtype": dtype}
    codes, scale = ops.quantize.dynamic(x, **DYNAMIC | named, pad=4)
    plain, plain_scale = ops.quantize.dynamic(x, **DYNAMIC | named)
    given = ops.quantize(x, scale, **QUANTIZE | named, pad=4)
    assert torch.equal(scale, plain_scale)
    for padded in (codes, given):
        assert padded.dtype is dtype and padded.shape == (*shape[:-1], 64) and padded.is_contiguous()
        assert torch.equal(padded[..., :60].float(), plain.float())
        assert not padded[..., 60:].float().any()
    fakes = make_fx(lambda x: ops.quantize.dynamic(x, **DYNAMIC, pad=4), tracing_mode="fake")(x).graph
    (node,) = fakes.find_nodes(op="call_function", target=ops.quantize.dynamic)
    assert [part.shape for part in node.meta["val"]] == [codes.shape, scale.shape]


def pads_of_codes(function, *given, static, kernel="pytorch_int_mm", align=16):
    """What pads int8 codes when ``function`` is assigned a kernel that wants n and k in multiples of ``align``."""
    graph = trace(function, *given, dynamic=True)
    state = to_canonical(graph, named_target("x86_vnni"), Options.parse({"force_kernel": kernel}), frozenset(static))
    for row in state.rows.values():
        asked = row.site.problem
        wanted = Padding(-(-asked.n // align) * align, -(-asked.k // align) * align)
        row.selection = replace(row.selection, padding=wanted)
    to_kernels(state)
    (out,), _ = run(state.graph, *given)
    assert_within(out, function(*given), Numerics.EXACT)
    quantizes = [node for op in (ops.quantize.default, ops.quantize.dynamic) for node in calls(state.graph, op)]
    runtime = classify_inputs(state.graph, frozenset(static)).runtime
    pads = [node for node in calls(state.graph, torch.ops.aten.constant_pad_nd.default) if node in runtime]
    return [node.kwargs.get("pad", 0) for node in quantizes], len(pads)


WEIGHT = torch.randint(-127, 128, (60, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 60, generator=torch.Generator().manual_seed(1))


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def linear(x, *weights):
    codes, scale = quantized(x)
    codes = codes.reshape(-1, 60)
    return torch.cat([torch._int_mm(codes, w).float() for w in weights], -1) * scale.reshape(-1, 1)


@pytest.mark.parametrize("x", [X, X.reshape(1, 5, 60).repeat(2, 1, 1)], ids=["2d", "3d"])
def test_k_is_padded_by_the_quantize_once_for_all_that_read_it(x):
    assert pads_of_codes(linear, x, WEIGHT, WEIGHT + 1, WEIGHT[:, :20], static={1, 2, 3}) == ([4], 0)


def test_k_is_padded_by_a_static_quantize():
    def static(x, w, scale):
        return torch._int_mm((x / scale).round().clamp(-128, 127).to(torch.int8), w).float() * scale

    assert pads_of_codes(static, X, WEIGHT, torch.tensor(0.02), static={1, 2}) == ([4], 0)


def test_codes_that_something_else_reads_are_padded_behind_their_quantize():
    def also_summed(x, w):
        codes, scale = quantized(x)
        return torch._int_mm(codes, w).float() * scale + codes.float().sum(-1, keepdim=True)

    assert pads_of_codes(also_summed, X, WEIGHT, static={1}) == ([0], 1)


def test_codes_that_were_given_are_padded_on_their_own():
    def of_codes(codes, w):
        return torch._int_mm(codes, w).float() * 0.5

    codes = quantized(X)[0]
    assert pads_of_codes(of_codes, codes, WEIGHT, static={1}) == ([], 1)


@pytest.mark.parametrize("scheme", ["int8 per_token (dynamic)", "int8 per_token asymmetric (dynamic)"])
def test_an_eager_layer_quantizes_to_padded_codes(scheme, monkeypatch):
    chosen = replace(kernel("pytorch_int_mm"), requires=replace(kernel("pytorch_int_mm").requires, align=16))
    layer = fx_quant.QuantizedLinear.from_float(nn.Linear(60, 30), f"{scheme} x int8 per_channel")
    expected = layer(X)
    monkeypatch.setitem(registry._KERNELS, chosen.name, chosen)
    eager._remembered.cache_clear()
    layer.force_kernel = chosen.name
    assert layer.selection(X).padding == Padding(32, 64)
    with Recorded() as recorded:
        out = layer(X)
    pads = [args for name, args, _ in recorded.calls if "constant_pad_nd" in name and args[0].dtype is torch.int8]
    assert len(pads) == (1 if "asymmetric" in scheme else 0)
    assert_within(out, expected, Numerics.EXACT)
    eager._remembered.cache_clear()


# --- the plan in words is what is done --------------------------------------------------------------------------------


def fills_and_cuts(selection: Selection, m: int) -> tuple[dict[str, set[float]], list[int]]:
    """What ``run_kernel`` fills the padding of each operand with, and the dims that it cuts of the result."""
    given = operands_of_problem(selection.problem, m)
    names = {x.untyped_storage().data_ptr(): name for name, x in given.items() if x is not None}
    names[given["weight"].untyped_storage().data_ptr()] = "b"
    filled: dict[str, set[float]] = {}
    with Recorded() as recorded:
        run_kernel(selection, **given, constant=())
    cuts = []
    for name, args, _ in recorded.calls:
        if name == "aten.constant_pad_nd.default":
            # A pad of what is padded already is of the same operand.
            source = names.get(args[0].untyped_storage().data_ptr(), "b_sum")
            names[args[-1].untyped_storage().data_ptr()] = source
            filled.setdefault(source, set()).add(args[2] if len(args) == 4 else 0)
        elif name == "aten.slice.Tensor" and args[0].shape != args[-1].shape:
            cuts.append(args[1])
    return filled, cuts


@pytest.mark.parametrize("rows", [0, 17])
@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("of", ["pytorch_int_mm", "pytorch_dequantized_block", "pytorch_weight_only"])
def test_the_words_of_a_plan_are_what_a_call_does(of, align, rows):
    grown = replace(kernel(of), requires=replace(kernel(of).requires, align=align), least_rows=rows)
    asked = [problem for problem in accepted_problems(grown, 70, 36, 5) if problem.scheme.weight.codes_per_element == 1]
    assert asked
    for problem in asked:
        plan = plan_padding(problem, grown, CompileContext("eager", "always"))
        filled, cuts = fills_and_cuts(Selection(problem, HERE, grown, plan, ()), problem.m.low)
        assert filled == {name: {fill} for name, fill in plan.fills(problem).items()}, str(problem)
        assert cuts == [dim for dim, grows in enumerate(plan.padded_dims(problem)[:2]) if grows], str(problem)
