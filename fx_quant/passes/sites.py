"""Sites and misses: every matmul with a quantized operand ends as one or the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fx_quant.passes.annotate import Annotation
from fx_quant.passes.canonical import CANONICAL, operands_of
from fx_quant.passes.matrices import EPILOGUE_DTYPES, matrix_base
from fx_quant.passes.nodes import MATMULS, dtype, is_op, is_single, shape, tensor
from fx_quant.passes.values import Axis, Codes, Factor, Product, Unknown
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import CODE_DTYPES, Granularity, Numerics, OperandSpec, Scheme


@dataclass(frozen=True)
class Site:
    """One quantized matmul that can be rewritten.

    Args:
        gemm: the matmul node.
        root: the node that the canonical op replaces, at or below ``gemm``; ``gemm`` itself where that is canonical.
        product: what is proven of ``root``; None for a canonical op, which says it all.
        problem: the GEMM as data.
    """

    gemm: Node
    root: Node
    product: Product | None
    problem: Problem

    @property
    def numerics(self) -> Numerics:
        """Class of replacing the root by the canonical op."""
        return Numerics.EXACT if self.product is None else self.product.numerics

    @property
    def codes(self) -> Node | None:
        """The node of the activation's codes; None for a float activation."""
        node = self.gemm.args[0] if self.product is None else self.product.a.node
        return node if isinstance(node, Node) and dtype(node) in CODE_DTYPES else None


@dataclass(frozen=True)
class Miss:
    """One quantized matmul that is left as it is: ``rule`` failed at ``node``."""

    gemm: Node
    node: Node
    rule: str


@dataclass(frozen=True)
class Inputs:
    """Which nodes hold the same value in every call of the compiled graph.

    Args:
        constant: parameters, buffers and constants of the graph.
        runtime: nodes that depend on anything else.
    """

    constant: frozenset[Node]
    runtime: frozenset[Node]


def classify_inputs(graph: Graph, static_indices: frozenset[int] | None) -> Inputs:
    """Split nodes by whether they can change from call to call.

    Args:
        static_indices: positions of the placeholders that are parameters or buffers; None (a bare graph) takes those
            that hold codes or float vectors for such.
    """
    constant, runtime = set(), set()
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        static = _looks_static(node) if static_indices is None else index in static_indices
        if static:
            constant.add(node)
        elif tensor(node) is not None:
            runtime.add(node)
    constant.update(graph.find_nodes(op="get_attr"))
    for node in graph.nodes:
        # A size depends on the input's shape alone, and what is expanded to it holds the same values in every call.
        is_size = isinstance(node.meta.get("val"), (int, torch.SymInt))
        if not is_size and any(source in runtime for source in node.all_input_nodes):
            runtime.add(node)
    return Inputs(frozenset(constant), frozenset(runtime))


def _looks_static(node: Node) -> bool:
    return dtype(node) in CODE_DTYPES or (tensor(node) is not None and len(shape(node)) < 2)


def find_sites(graph: Graph, annotation: Annotation, inputs: Inputs, cap: Numerics) -> tuple[list[Site], list[Miss]]:
    """All sites and misses of ``graph``, in graph order; rewrites past ``cap`` are not proposed."""
    sites, misses = [], []
    for gemm in graph.nodes:
        if is_op(gemm, *CANONICAL):
            found = canonical_site(gemm, inputs)
            (sites if isinstance(found, Site) else misses).append(found)
            continue
        if gemm.op != "call_function" or gemm.target not in MATMULS:
            continue
        value = annotation.value(gemm)
        if isinstance(value, Unknown):
            misses.append(Miss(gemm, value.node, value.rule))
        elif isinstance(value, Product):
            found = _site(gemm, value, annotation, inputs, cap)
            (sites if isinstance(found, Site) else misses).append(found)
    return sites, misses


def _site(gemm: Node, product: Product, annotation: Annotation, inputs: Inputs, cap: Numerics) -> Site | Miss:
    chain = _chain(gemm, annotation)
    allowed = [(node, value) for node, value in chain if _can_end(value)]
    if not allowed:
        return Miss(
            gemm, chain[-1][0], f"the codes carry an offset of {product.offset} that nothing corrects after the matmul"
        )
    capped = [(node, value) for node, value in allowed if value.numerics <= cap]
    if not capped:
        least = min(value.numerics for _, value in allowed)
        return Miss(gemm, gemm, f"the rewrite is of class {least}, and numerics={cap} does not allow that")
    root, product = _choose_root(capped)
    n, k = shape(gemm)[-1], shape(gemm.args[-1] if gemm.target not in _SCALED else gemm.args[1])[-2]
    if not isinstance(n, int) or not isinstance(k, int):
        return Miss(gemm, gemm, f"n and k must be static, got n={n} k={k}")
    rows = _size_range(shape(gemm)[:-1])
    return Site(gemm, root, product, _problem(product, rows, n, k, inputs))


_SCALED = frozenset({torch.ops.aten._scaled_mm.default})


def canonical_site(node: Node, inputs: Inputs) -> Site | Miss:
    """The site of a canonical op that stands in the source graph, as ``QuantizedLinear`` puts it there."""
    of = operands_of(node)
    n, k = shape(of.b)[1], shape(of.a)[1]
    if not isinstance(n, int) or not isinstance(k, int):
        return Miss(node, node, f"n and k must be static, got n={n} k={k}")
    activation = OperandSpec(
        _dtype_of(of.a),
        _scale_granularity(of.a_scale, of.block and (1, of.block[1]), Granularity.PER_TOKEN),
        dynamic=of.a_scale in inputs.runtime,
        symmetric=of.a_zero_point is None,
    )
    packed = shape(of.b)[0] != k
    weight = OperandSpec(
        torch.int4 if packed else _dtype_of(of.b),  # pyrefly: ignore[missing-attribute]
        _scale_granularity(of.b_scale, of.block, Granularity.PER_CHANNEL),
        symmetric=of.b_zero_point is None,
    )
    problem = Problem(
        scheme=Scheme(activation, weight),
        m=_size_range(shape(of.a)[:1]),
        n=n,
        k=k,
        out_dtype=of.out_dtype,
        bias=dtype(of.bias),
        constant_weight=is_constant(Codes(of.b), inputs),
    )
    return Site(node, node, None, problem)


def _dtype_of(node: Node) -> torch.dtype:
    found = dtype(node)
    assert found is not None
    return found


def _scale_granularity(scale: Node | None, block: tuple[int, int] | None, named: Granularity) -> Granularity:
    if scale is None:
        return Granularity.UNSCALED
    if block is not None:
        return Granularity.per_group(block[1]) if block[0] == 1 else Granularity.per_block(*block)
    return Granularity.PER_TENSOR if is_single(scale) else named


def _chain(gemm: Node, annotation: Annotation) -> list[tuple[Node, Product]]:
    """``gemm`` and the products below it, as long as each has the next as its only user."""
    chain = []
    node: Node | None = gemm
    while node is not None:
        value = annotation.value(node)
        if not isinstance(value, Product) or value.gemm is not gemm:
            break
        chain.append((node, value))
        node = next(iter(node.users)) if len(node.users) == 1 else None
    return chain


def _choose_root(candidates: list[tuple[Node, Product]]) -> tuple[Node, Product]:
    """The last node that brings a scale, then on as long as a step costs neither a numerics class nor a rounding.

    Steps without a scale (bias, cast) fuse into the epilogue of any kernel, so they are never worth a rounding.
    """
    chosen = candidates[0]
    for node, product in candidates:
        best = chosen[1]
        brings_scale = (product.rows, product.columns) != (best.rows, best.columns)
        if brings_scale or (product.numerics <= best.numerics and product.skipped <= best.skipped):
            chosen = (node, product)
    return chosen


def _can_end(product: Product) -> bool:
    if product.offset != 0:
        return False
    if product.dtype is torch.int32:
        return not product.rows and not product.columns and product.bias is None
    return product.dtype in EPILOGUE_DTYPES


def _size_range(sizes: tuple[int | torch.SymInt, ...]) -> SizeRange:
    """Range of the product of ``sizes``, from facts already known; no guard is added."""
    low, high = 1, 1
    for size in sizes:
        if isinstance(size, int):
            bounds = (size, size)
        else:
            bound = size.node.shape_env.bound_sympy(size.node.expr)
            # Unbounded is a sympy infinity or the huge integer that stands for one.
            lower = int(bound.lower) if bound.lower.is_Integer else 0
            upper = int(bound.upper) if bound.upper.is_Integer and bound.upper < 2**48 else None
            bounds = (lower, upper)
        low *= bounds[0]
        high = None if high is None or bounds[1] is None else high * bounds[1]
    return SizeRange(low, high)


def _problem(product: Product, rows: SizeRange, n: int, k: int, inputs: Inputs) -> Problem:
    a_dtype, b_dtype = dtype(product.a.node), dtype(product.b.node)
    assert a_dtype is not None
    assert b_dtype is not None
    return Problem(
        scheme=Scheme(
            OperandSpec(
                a_dtype,
                _granularity(product.rows, Axis.ROW, Granularity.PER_TOKEN),
                dynamic=any(f.source in inputs.runtime for f in product.rows),
            ),
            OperandSpec(b_dtype, _granularity(product.columns, Axis.COLUMN, Granularity.PER_CHANNEL)),
        ),
        m=rows,
        n=n,
        k=k,
        out_dtype=product.dtype,
        bias=None if product.bias is None else _bias_dtype(product.bias),
        constant_weight=is_constant(product.b, inputs),
    )


def is_constant(codes: Codes, inputs: Inputs) -> bool:
    """Whether ``codes`` are a view of a parameter, buffer or constant."""
    base = matrix_base(codes)
    return base is not None and base[0] in inputs.constant


def _granularity(factors: tuple[Factor, ...], axis: Axis, named: Granularity) -> Granularity:
    if not factors:
        return Granularity.UNSCALED
    return named if any(f.axis is axis for f in factors) else Granularity.PER_TENSOR


def _bias_dtype(bias: Factor) -> torch.dtype:
    found = dtype(bias.source)
    return torch.float32 if found is None else found
