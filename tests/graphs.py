"""Graphs to test the passes on: captured as the backend sees them, or traced from a function; and ways to run them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fx_quant import backend
from fx_quant.compat import (
    copy_graph,
    decompositions_without_matmul,
    row_scales_on_cpu,
    static_input_indices,
)
from fx_quant.config import Options
from fx_quant.diagnose.capture import run_captured, run_eagerly
from fx_quant.passes.annotate import Annotation
from fx_quant.passes.canonicalize import canonicalize
from fx_quant.passes.emit import Emitter
from fx_quant.passes.inputs import classify_inputs
from fx_quant.passes.merge import common_subexpressions_merged
from fx_quant.passes.nodes import CASTS, MULTIPLICATIONS, VIEWS, dtype, is_op
from fx_quant.passes.pipeline import Rewriting, to_canonical, to_kernels
from fx_quant.passes.rewrite import remove_identities
from fx_quant.passes.rulebook import is_matmul
from fx_quant.passes.sites import Found, Miss, Site, find_sites
from fx_quant.passes.slices import decode_parts
from fx_quant.passes.turned import turn
from fx_quant.passes.values import Codes
from fx_quant.passes.written import join_slices
from fx_quant.scheme import FLOAT8_DTYPES, Numerics
from fx_quant.target import named_target
from tests.printer import print_graph
from tests.torchao_cpu import as_on_vnni


@contextlib.contextmanager
def running_op_by_op() -> Iterator[None]:
    """Graphs that our backend compiles take every pass, and what it leaves of them runs op by op, as ``explain`` does."""
    quick = functools.partial(backend.compile_fx, inner_compile=run_eagerly)
    with mock.patch.object(backend, "compile_fx", quick):
        yield


@dataclass
class Captured:
    """One graph of a module on its way through the passes, as text and as data.

    Args:
        source: the graph as Inductor hands it to the pass.
        state: sites, misses and the graph after the passes.
        canonical, kernels: text of the graph with canonical ops, and with kernel ops.
        static: positions of the inputs that are parameters or buffers.
        inputs: what the graph was called with.
    """

    source: Graph
    state: Rewriting
    before: str
    canonical: str
    kernels: str
    static: frozenset[int] | None
    inputs: list[Any]


def capture(
    model: Callable[..., Any],
    *inputs: torch.Tensor,
    dynamic_rows: bool = False,
    target: str = "x86_vnni",
    options: dict[str, Any] | None = None,
) -> list[Captured]:
    """Each joint graph of ``model`` on ``inputs``, rewritten for ``target``."""
    captured: list[Captured] = []

    def on_graph(graph: Graph) -> None:
        source, _ = copy_graph(graph)
        state = to_canonical(graph, named_target(target), Options.parse(options or {}), static_input_indices(graph))
        before, canonical = print_graph(state.before), print_graph(state.graph)
        if state.rows:
            to_kernels(state)
        after = print_graph(state.graph)
        captured.append(Captured(source, state, before, canonical, after, static_input_indices(graph), []))

    def inner_compile(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        compiled, of = run_eagerly(gm, example_inputs), captured[-1]

        def run(inputs: list[Any]) -> Any:
            of.inputs = clones(inputs)
            return compiled(inputs)

        run._boxed_call = True
        return run

    torch._dynamo.reset()
    if dynamic_rows:
        inputs = tuple(x.clone() for x in inputs)
        for x in inputs:
            for dim in range(x.dim() - 1):
                torch._dynamo.mark_dynamic(x, dim)
    with as_on_vnni():
        run_captured(model, inputs, {}, on_graph=on_graph, inner_compile=inner_compile)
    return captured


# --- traced graphs ----------------------------------------------------------------------------------------------


def trace(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Graph:
    """The graph of ``function`` as the backend would get it, without Dynamo; ``dynamic`` frees the rows of input 0."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for position, x in enumerate(inputs):
        free = x.dim() - 1 if dynamic and position == 0 else 0
        dims = [DimDynamic.DYNAMIC if dim < free else DimDynamic.STATIC for dim in range(x.dim())]
        fakes.append(mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims)))
    # As AOTAutograd traces; without it torch 2.11 has no 3-D matmul of free rows.
    with mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(function, decomposition_table=decompositions_without_matmul(), tracing_mode="real")(*fakes)
    return traced.graph


def rewrite(graph: Graph, static: Sequence[int] | None = None, target: str = "x86_vnni", **options: Any) -> Rewriting:
    """``graph`` rewritten to canonical ops; ``static`` are its parameters (all inputs but the first unless told)."""
    inputs = len(graph.find_nodes(op="placeholder"))
    static = range(1, inputs) if static is None else static
    return to_canonical(graph, named_target(target), Options.parse(options), frozenset(static))


@dataclass
class Proven:
    """What the algebra proves of a graph, whatever kernels there are.

    Args:
        before: the normalised source graph.
        graph: the same with every site as its canonical op.
        found: sites, misses and what is recognised, as found; a site that cannot be emitted is a miss.
        results: the name in ``graph`` of what stands for each site's root.
    """

    before: Graph
    graph: Graph
    found: Found
    results: dict[Site, str]


def prove(graph: Graph, static: Sequence[int] | None = None, numerics: str = "reassociated") -> Proven:
    """``graph`` with all that is proven of it written as canonical ops; arguments as for ``rewrite``."""
    work = common_subexpressions_merged(graph)
    join_slices(work)
    remove_identities(work)
    static = range(1, len(work.find_nodes(op="placeholder"))) if static is None else static
    decode_parts(work, frozenset(static))
    turn(work, frozenset(static), {})
    before = copy_of(work)
    found = find_sites(work, Annotation(work), classify_inputs(work, frozenset(static)), Numerics[numerics.upper()])
    emitter, results = Emitter(work), {}
    for site in list(found.sites):
        try:
            canonicalize(emitter, site)
        except LookupError as error:
            found.sites.remove(site)
            found.misses.append(Miss(site.gemm, site.gemm, str(error)))
            continue
        results[site] = emitter.current(site.root).name
    work.eliminate_dead_code()
    return Proven(before, work, found, results)


def clones(values: Sequence[Any]) -> list[Any]:
    """``values`` with each tensor copied."""
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def copy_of(graph: Graph) -> Graph:
    """A copy of ``graph`` that later passes leave alone."""
    return copy_graph(graph)[0]


def calls(graph: Graph, op: object) -> list[Node]:
    """The calls of ``op`` in ``graph``, in order."""
    return graph.find_nodes(op="call_function", target=op)


class _Keeper(Interpreter):
    """Runs a graph and keeps what each node gave."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(GraphModule(torch.nn.Module(), copy_of(graph)))
        self.by_name: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.by_name[n.name] = self.seen(super().run_node(n))
        return self.by_name[n.name]

    def seen(self, value: Any) -> Any:
        return value


def run(graph: Graph, *inputs: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """Outputs of ``graph`` run op by op on copies of ``inputs``, and the value of each node by name."""
    return _outputs_of(_Keeper(graph), inputs)


def _outputs_of(interpreter: Interpreter, inputs: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    with torch.no_grad(), row_scales_on_cpu():
        result = interpreter.run(*clones(inputs))
    return list(result) if isinstance(result, (list, tuple)) else [result], interpreter.by_name


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _InFloat64(_Keeper):
    """Runs a graph with every float widened to float64 and no rounding in between, except to codes.

    What differs between two graphs then is what they mean, not how they round.
    """

    def seen(self, value: Any) -> Any:
        return torch.utils._pytree.tree_map(_widened, value)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is not torch.ops.aten.view.dtype:  # of bytes, which are halves where they are viewed as such
            args, kwargs = torch.utils._pytree.tree_map(_wide_dtype, (args, kwargs))
        body = _NAMED_FLOAT64_BODIES.get(str(target)) or _FLOAT64_BODIES.get(target, target)
        return super().call_function(body, args, kwargs)


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _FLOATS else value


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _FLOATS else value


def _codes_in_float64(x, scale, *, dtype, reciprocal, lo, hi):
    y = x * scale.reciprocal() if reciprocal else x / scale
    y = y if dtype.is_floating_point else y.round()
    return y.clamp(lo, hi).to(dtype)


def _quantize_in_float64(
    x, *, granularity, divisor, floor, floor_on, divide_dtype=None, scale_dtype=None, **codes_arguments
):
    amax = x.abs().amax(-1, keepdim=True) if granularity == "per_token" else x.abs().amax()
    amax = amax.clamp(min=floor) if floor_on == "amax" else amax
    scale = amax / divisor
    scale = scale.clamp(min=floor) if floor_on == "scale" else scale
    return _codes_in_float64(x, scale, **codes_arguments), scale


def _scaled_mm_in_float64(
    a, b, a_scale, b_scale, bias, out_dtype=None, *, a_zero_point=None, b_zero_point=None, block=None
):
    a, b = a.double(), _unpacked(b, a.shape[1])
    if a_zero_point is not None:
        a = a - a_zero_point
    if block is not None:
        by_group = a_scale is not None and a_scale.dim() == 2 and a_scale.shape[1] == b_scale.shape[1]
        if by_group:
            a, a_scale = a * a_scale.repeat_interleave(block[1], 1)[:, : a.shape[1]], None
        b_scale, b = None, _decoded(b, b_scale, b_zero_point, block)
    elif b_zero_point is not None:
        b = b - b_zero_point
    y = a @ b
    if a_zero_point is not None and block is None and b_zero_point is None:
        # The op sums integers in int32, which wraps around where that of its source does.
        y = (y + 2**31) % 2**32 - 2**31
    for scale in (a_scale, b_scale):
        y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.to(torch.int32) if out_dtype is torch.int32 else y


def _unpacked(b, k):
    if b.shape[0] == k:
        return b.double()
    return torch.stack((b & 15, b >> 4), 1).reshape(k, b.shape[1]).double() - 8


def _weight_only_mm_in_float64(x, b, b_scale, b_zero_point, bias, out_dtype, *, block=None, b_offset=None):
    y = x.double() @ _decoded(_unpacked(b, x.shape[1]), b_scale, b_zero_point, block, b_offset)
    return y if bias is None else y + bias


def _decoded(b, scale, zero_point, block, offset=None):
    def spread(t):
        if block is None:
            return t
        return t.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: b.shape[1], : b.shape[0]].t()

    b = b.double() if zero_point is None else b.double() - spread(zero_point)
    return b * spread(scale) + (0 if offset is None else spread(offset))


def _aten_scaled_mm_in_float64(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, fast=False):
    m, k, n = *a.shape, b.shape[1]
    if scale_a.numel() > 1 and scale_a.shape == (m, k // 128) and scale_b.shape[0] == k // 128:
        a, scale_a = a.double() * scale_a.repeat_interleave(128, 1), None
        wide = scale_b.repeat_interleave(128, 0)
        b, scale_b = b.double() * (wide if wide.shape[1] == n else wide.repeat_interleave(128, 1)[:, :n]), None
    return _scaled_mm_in_float64(a, b, scale_a, scale_b, bias, out_dtype)


def _aten_scaled_mm_v2_in_float64(a, b, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, bias, *_):
    by_column = recipe_a == recipe_b == [4]  # BlockWise1x128
    return _aten_scaled_mm_in_float64(a, b, scale_a[0], scale_b[0].t() if by_column else scale_b[0], bias)


def _split_in_float64(zero_point, lo, hi):
    near = zero_point.clamp(lo, hi)
    return near.to(torch.int32), zero_point.double() - near


def _int_mm_in_float64(self, mat2):
    # PyTorch multiplies unsigned codes here since 2.12 only.
    return (self.double() @ mat2.double()).to(torch.int32)


def _per_tensor_in_float64(q, scale, zero_point, *_, **__):
    return (q.double() - zero_point) * scale


def _per_channel_in_float64(q, scales, zero_points, axis, *_, **__):
    sizes = [-1 if dim == axis % q.dim() else 1 for dim in range(q.dim())]
    points = 0 if zero_points is None else zero_points.view(sizes)
    return (q.double() - points) * scales.view(sizes)


def _int8pack_mm_in_float64(self, mat2, scales):
    return self.double() @ mat2.double().t() * scales


_NAMED_FLOAT64_BODIES = {
    "aten._scaled_mm_v2.default": _aten_scaled_mm_v2_in_float64,
    "quantized_decomposed.dequantize_per_tensor.default": _per_tensor_in_float64,
    "quantized_decomposed.dequantize_per_tensor.tensor": _per_tensor_in_float64,
    "quantized_decomposed.dequantize_per_channel.default": _per_channel_in_float64,
    "quantized_decomposed.dequantize_per_token.default": _per_tensor_in_float64,
}
_FLOAT64_BODIES = {
    torch.ops.aten._int_mm.default: _int_mm_in_float64,
    torch.ops.aten._weight_int8pack_mm.default: _int8pack_mm_in_float64,
    torch.ops.fx_quant.quantize.default: _codes_in_float64,
    torch.ops.fx_quant.quantize.dynamic: _quantize_in_float64,
    torch.ops.fx_quant.split_zero_point.default: _split_in_float64,
    torch.ops.fx_quant.scaled_mm.default: _scaled_mm_in_float64,
    torch.ops.fx_quant.weight_only_mm.default: _weight_only_mm_in_float64,
    torch.ops.aten._scaled_mm.default: _aten_scaled_mm_in_float64,
}


def run_in_float64(graph: Graph, *inputs: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """As ``run``, in float64 throughout; codes stay codes."""
    return _outputs_of(_InFloat64(graph), [_widened(x) for x in inputs])


def assert_same_meaning(source: Graph, rewritten: Graph, inputs: Sequence[Tensor]) -> None:
    """Without rounding, both graphs give the same."""
    expected, _ = run_in_float64(source, *inputs)
    actual, _ = run_in_float64(rewritten, *inputs)
    for new, old in zip(actual, expected, strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        expected_values = old.double()
        finite = expected_values[expected_values.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        torch.testing.assert_close(new.double(), expected_values, rtol=1e-9, atol=1e-9 * largest, equal_nan=True)


# --- how far a site may be --------------------------------------------------------------------------------------

# How many roundings in the coarsest dtype may separate a site from its source: operands, scales, product, bias, cast.
ROUNDINGS = 8


def assert_within_class(site: Site, state: Rewriting, canonical: Graph, inputs: Sequence[Any]) -> None:
    """The site's own value is as far from the source's as its class allows."""
    _, old = run(state.before, *inputs)
    _, new = run(canonical, *inputs)
    op = next(node for node in canonical.nodes if node.name == state.rows[site].op.name)
    a, b, a_scale, b_scale, bias, _ = (new[arg.name] if hasattr(arg, "name") else arg for arg in op.args)
    b = _unpacked(b, a.shape[-1]) if b.shape[0] != a.shape[-1] else b
    expected = old[site.root.name].double()
    actual = new[op.name].double().reshape(expected.shape)
    # The sum of the magnitudes of all terms: what roundings are relative to, however the terms cancel.
    magnitude = a.double().abs() @ b.double().abs()
    for scale in (a_scale, b_scale):
        magnitude = magnitude if scale is None else magnitude * scale.double().abs()
    if site.product.numerics <= Numerics.SAME_ACCUM and a.dtype not in FLOAT8_DTYPES:
        # The sum is the same, so only what follows it rounds.
        acc = (a.double() @ b.double()).abs()
        for scale in (a_scale, b_scale):
            acc = acc if scale is None else acc * scale.double().abs()
        magnitude = acc
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    magnitude = magnitude.reshape(expected.shape)
    dtypes = rounded_to(site, state)
    epsilon, tiny = max(torch.finfo(each).eps for each in dtypes), max(TINY[each] for each in dtypes)
    allowed = (ROUNDINGS * epsilon / 2 + a.shape[-1] * 2.0**-24) * magnitude + tiny
    compared = expected.isfinite() & actual.isfinite() & (expected.abs() < 60000)
    wrong = ((actual - expected).abs() > allowed) & compared
    assert not wrong.any(), f"off by {(actual - expected)[wrong]}, allowed {allowed[wrong]}"


class _Magnitudes(_InFloat64):
    """As its base, and for each node the sum of the magnitudes of all terms that were summed on the way to it.

    That is what roundings are relative to, however the terms cancel. Integers do not round.
    """

    def __init__(self, graph: Graph, exact_sums: bool) -> None:
        super().__init__(graph)
        self.magnitudes: dict[str, Any] = {}
        self._exact_sums = exact_sums
        self._summed: set[str] = set()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.magnitudes[n.name] = self._magnitude(n, value) if isinstance(value, Tensor) else value
        return value

    def _magnitude(self, node: Node, value: Tensor) -> Tensor:
        plain = value.double().abs()
        summed = any(source.name in self._summed for source in node.all_input_nodes)
        matmul = is_matmul(node)
        if matmul or summed:
            self._summed.add(node.name)
        if not value.is_floating_point() or node.op != "call_function" or (matmul and self._exact_sums):
            return plain
        target = _MAGNITUDE_BODIES.get(node.target, node.target)
        moves = node.target in VIEWS | CASTS | MULTIPLICATIONS
        if not matmul and not (summed and (moves or node.target in _MAGNITUDE_BODIES)):
            return plain
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: self.magnitudes[arg.name])
        found = super().call_function(target, _numbers_abs(args), kwargs)
        return found.double().abs().reshape(value.shape)


def _numbers_abs(args: tuple) -> tuple:
    return tuple(abs(arg) if isinstance(arg, float) else arg for arg in args)


_MAGNITUDE_BODIES = {
    # Magnitudes lie in memory as they come.
    torch.ops.aten.view.default: torch.reshape,
    torch.ops.aten.sub.Tensor: torch.add,
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.div.Tensor: torch.div,
}


def assert_roundings_allowed(site: Site, proven: Proven, inputs: Sequence[Any]) -> None:
    """What stands for the site's root is as far from it as its class allows, whatever operands the site has."""
    old, new = run(proven.before, *inputs)[1], run(proven.graph, *inputs)[1]
    off, allowed = roundings(site, proven, old, new, inputs)
    wrong = off > allowed
    assert not wrong.any(), f"off by {off[wrong]}, allowed {allowed[wrong]}"


def roundings(
    site: Site, proven: Proven, old: dict[str, Any], new: dict[str, Any], inputs: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """How far what stands for the site's root is from it, and how far its class allows.

    Args:
        old, new: the values of the nodes of the graphs before and after.
    """
    product = site.product
    assert product is not None
    expected, actual = old[site.root.name].double(), new[proven.results[site]].double()
    integer = isinstance(product.a, Codes) and dtype(product.a.node) not in FLOAT8_DTYPES
    interpreter = _Magnitudes(proven.before, integer and product.numerics <= Numerics.SAME_ACCUM)
    _outputs_of(interpreter, [_widened(x) for x in inputs])
    # In float64 other codes may be rounded to, whose sum may be smaller.
    magnitude = torch.maximum(interpreter.magnitudes[site.root.name], expected.nan_to_num(0.0).abs())
    dtypes = _rounded_to(site, proven.before)
    epsilon, tiny = max(torch.finfo(each).eps for each in dtypes), max(TINY[each] for each in dtypes)
    allowed = (ROUNDINGS * epsilon / 2 + site.problem.k * 2.0**-24) * magnitude + tiny
    if product.numerics is Numerics.EXACT:
        allowed = torch.zeros_like(allowed)
    compared = expected.isfinite() & actual.isfinite() & (expected.abs() < 60000)
    if torch.float16 in dtypes and _has_subnormal_halves(site, proven.before, interpreter.magnitudes):
        compared &= False
    return torch.where(compared, (actual - expected).abs(), 0.0), allowed


def _has_subnormal_halves(site: Site, before: Graph, magnitudes: dict[str, Any]) -> bool:
    """Whether something on the way has so few bits in float16 that no count of roundings bounds what is lost."""
    nodes = _on_the_way(site, before)
    values = [magnitudes[node.name] for node in {*nodes, *(n for node in nodes for n in node.all_input_nodes)}]
    least = torch.finfo(torch.float16).smallest_normal
    return any(bool(((x > 0) & (x < least)).any()) for x in values if isinstance(x, Tensor) and x.is_floating_point())


# float16 loses relative precision below 6e-5: half of its smallest step, a few times over and scaled up.
TINY = {torch.float64: 0.0, torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-6}


def rounded_to(site: Site, state: Rewriting) -> set[torch.dtype]:
    """Float dtypes that the source rounds values to on the way from the codes to the site's root."""
    return _rounded_to(site, state.before)


def _on_the_way(site: Site, before: Graph) -> list[Node]:
    """What is between the codes of ``site`` and its root, both included, in order."""
    source, a = {node.name: node for node in before.nodes}, site.product.a
    root = source[site.root.name]
    above = {root}
    for node in reversed(before.nodes):
        if node in above:
            above.update(node.all_input_nodes)
    below = {source[a.node.name if isinstance(a, Codes) else a.name], source[site.product.b.node.name]}
    for node in before.nodes:
        if not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    return [node for node in before.nodes if node in above & below]


def _rounded_to(site: Site, before: Graph) -> set[torch.dtype]:
    passed = _on_the_way(site, before)
    # A scale per row that met one per column was rounded too, and is as large as the result.
    met = [other for node in passed for other in node.all_input_nodes if is_op(other, torch.ops.aten.mul.Tensor)]
    dtypes = {dtype(node) for node in [*passed, *met] if node.op == "call_function"}
    return {torch.float32} | dtypes.intersection(_FLOATS)
