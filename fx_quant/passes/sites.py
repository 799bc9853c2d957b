"""Sites, misses and recognised matmuls: every matmul with a quantized operand ends as one of the three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from fx_quant.kernels.realise import Operands
from fx_quant.kernels.select import Verdict
from fx_quant.passes.annotate import Annotation
from fx_quant.passes.axes import Dims
from fx_quant.passes.canonical import CANONICAL, operands_of
from fx_quant.passes.contractions import operands_of_contraction
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.inputs import Inputs, classify_inputs
from fx_quant.passes.matrices import matrix_base
from fx_quant.passes.nodes import dtype, dtype_of, is_op, is_single, same_size, shape, summed_size
from fx_quant.passes.origins import Origin, Origins
from fx_quant.passes.packed import unpacked_from
from fx_quant.passes.problems import corrects_outside, fits_int32, problems_of, scheme_of
from fx_quant.passes.regions import Findings, reasons_in_regions
from fx_quant.passes.rulebook import is_matmul, own_kernel
from fx_quant.passes.size_bounds import range_of
from fx_quant.passes.specialize import why_symbolic
from fx_quant.passes.unclaimed import unclaimed_contraction
from fx_quant.passes.values import Affine, Codes, Product
from fx_quant.passes.words import scheme_in_words, source_scheme
from fx_quant.problem import Problem, Size
from fx_quant.scheme import CODE_DTYPES, FLOAT_DTYPES, Granularity, Numerics, OperandSpec, Scheme, scale_dtype_of


@dataclass(frozen=True)
class Site:
    """One quantized matmul that can be rewritten.

    Args:
        gemm: the matmul node.
        root: the node that the canonical op replaces, at or below ``gemm``; ``gemm`` itself where that is canonical.
        product: what is proven of ``root``; None for a canonical op, which says it all.
        problem: the GEMM as data, as a kernel is asked.
        scheme: how the source quantizes; what the kernel is asked leaves out what the graph corrects around it.
        words: the scheme as a report prints it, with what a scheme has no place for.
        others: what a kernel may be asked instead, where none runs ``problem``.
    """

    gemm: Node
    root: Node
    product: Product | None
    problem: Problem
    scheme: Scheme
    words: str
    others: tuple[Problem, ...] = ()

    @property
    def numerics(self) -> Numerics:
        """Class of replacing the root by the canonical op."""
        return Numerics.EXACT if self.product is None else self.product.numerics

    @property
    def codes(self) -> Node | None:
        """The node of the activation's codes; None for a float activation."""
        if self.product is not None:
            return self.product.a.node if isinstance(self.product.a, Codes) else None
        node = self.gemm.args[0]
        return node if isinstance(node, Node) and dtype(node) in CODE_DTYPES else None


@dataclass(frozen=True)
class Miss:
    """One quantized matmul that is left as it is: ``rule`` failed at ``node``."""

    gemm: Node
    node: Node
    rule: str


@dataclass(frozen=True)
class SizeMiss(Miss):
    """One that is left because n or k is symbolic."""


@dataclass(frozen=True)
class Recognised:
    """One quantized matmul that is understood and left as it is, because nothing here would run it faster.

    Args:
        gemm: the matmul node.
        reason: why it is left.
        site: what a kernel was asked; None for a library's own fused kernel.
        verdicts: what was answered, kernel by kernel.
    """

    gemm: Node
    reason: str
    site: Site | None = None
    verdicts: tuple[Verdict, ...] = ()


@dataclass
class Found:
    """Every quantized matmul of a graph, in graph order within each kind."""

    sites: list[Site] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    recognised: list[Recognised] = field(default_factory=list)


def find_sites(graph: Graph, annotation: Annotation, inputs: Inputs, cap: Numerics) -> Found:
    """All quantized matmuls of ``graph``; rewrites past ``cap`` are not proposed.

    Those in the subgraphs of a higher-order op, which are rewritten by themselves or not at all, are misses of each
    call.
    """
    return _find_sites(graph, annotation, inputs, cap, {})


def _find_sites(
    graph: Graph, annotation: Annotation, inputs: Inputs, cap: Numerics, given: Mapping[Node, Origin]
) -> Found:
    origins = Origins(graph, annotation, inputs, given)
    matmuls = _found(graph, annotation, inputs, cap, origins)

    def in_region(graph: Graph, static: frozenset[int], given: Mapping[Node, Origin]) -> Findings:
        inside = _find_sites(graph, Annotation(graph), classify_inputs(graph, static), cap, given)
        sites, recognised = [site.gemm for site in inside.sites], [row.gemm for row in inside.recognised]
        return sites, recognised, [(miss.gemm, miss.node, miss.rule) for miss in inside.misses]

    matmuls.misses += [Miss(*reason) for reason in reasons_in_regions(graph, origins, inputs, in_region)]
    return matmuls


def _found(graph: Graph, annotation: Annotation, inputs: Inputs, cap: Numerics, origins: Origins) -> Found:
    matmuls = Found()
    for gemm in graph.nodes:
        one = attempt(_find, gemm, annotation, inputs, cap, origins)
        if isinstance(one, Failure):
            one = Miss(gemm, gemm, one.reason(f"finding what {gemm.target} multiplies"))
        if isinstance(one, Site):
            matmuls.sites.append(one)
        elif isinstance(one, Miss):
            matmuls.misses.append(one)
        elif isinstance(one, Recognised):
            matmuls.recognised.append(one)
    return matmuls


def _find(
    gemm: Node, annotation: Annotation, inputs: Inputs, cap: Numerics, origins: Origins
) -> Site | Miss | Recognised | None:
    if gemm.op != "call_function":
        return None
    if is_op(gemm, *CANONICAL):
        return canonical_site(gemm, inputs)
    library = own_kernel(gemm)
    if library is not None:
        return Recognised(gemm, f"the source calls {library} itself, over a weight in that kernel's own layout")
    value = annotation.value(gemm) if is_matmul(gemm) else None
    if isinstance(value, Product):
        return _site(gemm, value, annotation, inputs, cap, origins)
    unclaimed = unclaimed_contraction(gemm, value, annotation, origins)
    return None if unclaimed is None else Miss(gemm, *unclaimed)


def _site(
    gemm: Node, product: Product, annotation: Annotation, inputs: Inputs, cap: Numerics, origins: Origins
) -> Site | Miss | Recognised | None:
    chain = _chain(gemm, annotation)
    if not isinstance(product.a, Codes) and product.b.node in inputs.runtime:
        operands = operands_of_contraction(gemm)
        coded = any(origins.coded(operand) is not None for operand in operands)
        decoded = annotation.value(operands[-1])
        scales = chain[-1][1].columns[len(decoded.scales) if isinstance(decoded, Affine) else 0 :]
        # What scales the sum by a vector that comes with the operand, as that of codes is, tells codes.
        if not coded and all(scale.row_block is None or scale.source not in inputs.runtime for scale in scales):
            return None  # integers as such, a mask or an image, are no quantized weight
        literal = is_op(product.b.node, torch.ops.aten.lift_fresh_copy.default)
        return Miss(gemm, product.b.node, _LITERAL if literal else _CHANGES)
    constant = is_constant(product.b, inputs)
    allowed = [(node, value) for node, value in chain if _can_end(value, constant)]
    if not allowed:
        return Miss(gemm, chain[-1][0], f"nothing that can be returned is proven: the sum ends in {product.dtype}")
    capped = [(node, value) for node, value in allowed if value.numerics <= cap]
    if not capped:
        least = min(value.numerics for _, value in allowed)
        return Miss(gemm, gemm, f"the rewrite is of class {least}, and numerics={cap} does not allow that")
    lasting = [(node, value) for node, value in capped if inputs.runtime.isdisjoint(_sources_of_offsets(value))]
    if not lasting:
        return Miss(gemm, gemm, "the offset of the weight changes from call to call")
    n, k = shape(gemm)[-1], summed_size(gemm)
    if not isinstance(n, int) or not isinstance(k, int):
        return SizeMiss(gemm, gemm, _dynamic(n, k))
    if 0 in (*(size for size in shape(gemm) if isinstance(size, int)), k):
        return Recognised(gemm, _EMPTY)
    fitting = [(node, value) for node, value in lasting if fits_int32(value, k)]
    if not fitting:
        return Miss(gemm, gemm, f"the sum of integers is taken in int32, which k={k} may leave")
    root, product = _choose_root(fitting)
    scheme = scheme_of(product, inputs)
    problems = problems_of(product, scheme, range_of(shape(gemm)[:-1]), n, k, constant)
    source = source_scheme(product, scheme, inputs)
    words = scheme_in_words(source, product, chain[-1][0], annotation, inputs, origins)
    return Site(gemm, root, product, problems[0], source, words, problems[1:])


def _sources_of_offsets(product: Product) -> Iterator[Node]:
    """What the offsets of the weight are computed of."""
    tiles = (tile for offset in product.b_offsets for tile in offset)
    return (tile.source for tile in tiles if isinstance(tile.source, Node))


def _dynamic(n: Size, k: Size) -> str:
    why = why_symbolic(n) or why_symbolic(k) or "the second operand is no stored weight"
    return f"n and k must be static, got n={n} k={k}: {why}"


_CHANGES = "the dequantized operand changes from call to call; only weights are rewritten"
_LITERAL = "the weight is a literal in the code, which is copied in every call; make it a parameter or a buffer"
_EMPTY = "a size of the matmul is 0, so there is nothing to multiply"


def canonical_site(node: Node, inputs: Inputs) -> Site | Miss | Recognised:
    """The site of a canonical op that stands in the source graph, as ``QuantizedLinear`` puts it there."""
    operands = operands_of(node)
    a_scale = operands.a_scale
    n, k = shape(operands.b)[1], shape(operands.a)[1]
    if not isinstance(n, int) or not isinstance(k, int):
        return SizeMiss(node, node, _dynamic(n, k))
    if 0 in (n, k):
        return Recognised(node, _EMPTY)
    packed = not same_size(shape(operands.b)[0], k)
    activation = OperandSpec(
        dtype_of(operands.a),
        _scale_granularity(a_scale, _block_of_rows(operands, k, packed=packed), Granularity.PER_TOKEN),
        dynamic=a_scale in inputs.runtime,
        symmetric=operands.a_zero_point is None,
        scale_dtype=scale_dtype_of(dtype(a_scale)),
    )
    weight = OperandSpec(
        torch.int4 if packed else dtype_of(operands.b),  # pyrefly: ignore[missing-attribute]
        _scale_granularity(operands.b_scale, operands.block, Granularity.PER_CHANNEL),
        symmetric=operands.b_zero_point is None,
        scale_dtype=scale_dtype_of(dtype(operands.b_scale)),
        offset=operands.b_offset is not None,
    )
    problem = Problem(
        scheme=Scheme(activation, weight),
        m=range_of(shape(operands.a)[:1]),
        n=n,
        k=k,
        out_dtype=operands.out_dtype,
        bias=dtype(operands.bias),
        constant_weight=_is_constant_matrix(operands.b, None, inputs),
    )
    return Site(node, node, None, problem, problem.scheme, str(problem.scheme))


def _block_of_rows(operands: Operands, k: int, *, packed: bool) -> tuple[int, int] | None:
    """The block of the activation where its scales vary along k; one scale may be for a whole row beside groups.

    Where one group has all of k it is both: a block, but for what only whole rows have kernels for.
    """
    scale, block = operands.a_scale, operands.block
    if block is None or scale is None:
        return None
    count = -(-k // block[1])
    if count == 1 and (packed or operands.a_zero_point is not None):
        return None
    sizes = shape(scale)
    return (1, block[1]) if len(sizes) == 2 and same_size(sizes[1], count) else None


def _scale_granularity(scale: Node | None, block: tuple[int, int] | None, named: Granularity) -> Granularity:
    if scale is None:
        return Granularity.UNSCALED
    if block is not None:
        return Granularity.of_block(*block)
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


def _can_end(product: Product, constant: bool) -> bool:
    if product.dtype is torch.int32:
        is_sum = not product.rows and not product.columns and product.bias is None
        return is_sum and not corrects_outside(product, constant=constant)
    return product.dtype in FLOAT_DTYPES


def is_constant(codes: Codes, inputs: Inputs) -> bool:
    """Whether ``codes`` are a parameter, buffer or constant, or computed of such alone."""
    if _is_constant_matrix(codes.node, codes.dims, inputs):
        return True
    computed = codes.node.op == "call_function" and codes.node not in inputs.runtime
    return computed or codes.node in inputs.constant


def _is_constant_matrix(node: Node, dims: Dims | None, inputs: Inputs) -> bool:
    base = matrix_base(node, dims)
    packed = None if base is None else unpacked_from(base[0])
    return base is not None and (base[0] if packed is None else packed[0]) in inputs.constant
