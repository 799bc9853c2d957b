"""The passes in order, as one transaction: a graph is rewritten whole or left as it was."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch.fx import Graph, Node

from fx_quant.compat import copy_graph, is_subgraph, replace_contents
from fx_quant.config import Options
from fx_quant.errors import MissError, NoKernelError
from fx_quant.passes.annotate import Annotation
from fx_quant.passes.assign import UnassignedError, assign
from fx_quant.passes.canonicalize import canonicalize
from fx_quant.passes.emit import Emitter
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.folding import fold_constants
from fx_quant.passes.inputs import classify_inputs
from fx_quant.passes.memory import Memory
from fx_quant.passes.merge import common_subexpressions_merged
from fx_quant.passes.nodes import is_op, module_path, source_line
from fx_quant.passes.quantizers import Quantizer
from fx_quant.passes.rewrite import (
    collapse_reshapes,
    merge_duplicates,
    quantizers_of,
    remove_identities,
    rewrite_quantizers,
)
from fx_quant.passes.rulebook import starts_codes
from fx_quant.passes.sites import Miss, Recognised, Site, SizeMiss, find_sites
from fx_quant.passes.specialize import specialize_weights
from fx_quant.passes.values import Product, sources
from fx_quant.passes.verify import verify
from fx_quant.problem import Problem
from fx_quant.report import MissReport, RecognisedReport, Report, SiteReport
from fx_quant.scheme import dtype_name
from fx_quant.selection import Selection, Verdict, check_kernel_names, select
from fx_quant.target import Target

log = logging.getLogger(__name__)


@dataclass
class Rewriting:
    """One graph on its way through the passes.

    Args:
        source: the source graph, which is not touched.
        before: the same, normalised.
        graph: the graph being rewritten.
        target: the machine to choose kernels for.
        options: what the user asked for.
        static_indices: positions of the placeholders that are parameters or buffers; None where that is not known.
        selections: the kernel of each site.
        misses: what is left as it is, because a rule failed.
        recognised: what is left as it is, because nothing here runs it faster.
        results: for each site the node ``[m, n]`` of ``graph`` that holds what its root held.
        canonical: each site's op in ``graph``, canonical first and then its kernel's.
        quantizers: what was recognised of the quantize behind each site.
    """

    source: Graph
    before: Graph
    graph: Graph
    target: Target
    options: Options
    static_indices: frozenset[int] | None = None
    selections: dict[Site, Selection] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    recognised: list[Recognised] = field(default_factory=list)
    canonical: dict[Site, Node] = field(default_factory=dict)
    results: dict[Site, Node] = field(default_factory=dict)
    quantizers: dict[Site, Quantizer | str] = field(default_factory=dict)


def holds_codes(graph: Graph) -> bool:
    """Whether anything in ``graph`` may be quantized: a low-bit dtype, packed integers, a fake quantization, or an op
    of which only the name says so.
    """
    return any(starts_codes(node) for node in graph.nodes)


def to_canonical(
    graph: Graph,
    target: Target,
    options: Options,
    static_indices: frozenset[int] | None,
    left: Mapping[str, str] = MappingProxyType({}),
) -> Rewriting:
    """Find the sites of ``graph``, select a kernel for each and rewrite a copy to canonical ops.

    ``graph`` itself is not touched. A site that no kernel can run, or at which a step raises, is a miss.

    Args:
        left: sites to leave as they are: the reason, by the name of the matmul.

    Raises:
        NoKernelError: the forced kernel cannot run a site.
    """
    check_kernel_names(options.disabled_kernels)
    work = common_subexpressions_merged(graph)
    remove_identities(work)
    before, _ = copy_graph(work)
    state = Rewriting(graph, before, work, target, options, static_indices)
    inputs = classify_inputs(work, static_indices)
    found = find_sites(work, Annotation(work), inputs, options.numerics)
    if specialize_weights(miss.gemm for miss in found.misses if isinstance(miss, SizeMiss)):
        found = find_sites(work, Annotation(work), inputs, options.numerics)
    # Those of a subgraph are missed once in each call of it, as the graph around it says.
    state.misses, state.recognised = [] if is_subgraph(graph) else found.misses, found.recognised
    memory = Memory(work)
    # The layers of a model ask the same few questions.
    choose = functools.cache(functools.partial(_choose, target=target, options=options))
    for site in found.sites:
        reason = left.get(site.gemm.name) or _overwritten(site, memory)
        selection = None if reason is not None else attempt(choose, site.problem)
        if isinstance(selection, Failure):
            reason = selection.reason("choosing a kernel")
        elif selection is not None:
            _select(state, site, selection, target, options)
        if reason is not None:
            state.misses.append(Miss(site.gemm, site.gemm, reason))
    quantizers = quantizers_of(state.selections, memory)
    if not state.selections:
        return state
    emitter = Emitter(work)
    for site in list(state.selections):
        written = attempt(canonicalize, emitter, site)
        if isinstance(written, Failure):
            # What was emitted of it has no user.
            del state.selections[site]
            state.misses.append(Miss(site.gemm, site.gemm, written.reason("writing the canonical op")))
            continue
        state.canonical[site], state.results[site] = written
        if site.codes is not None:
            state.quantizers[site] = quantizers[site.codes]
    unwritten = rewrite_quantizers(emitter, state.quantizers.values())
    for site, quantizer in state.quantizers.items():
        if isinstance(quantizer, Quantizer) and quantizer.codes in unwritten:
            state.quantizers[site] = unwritten[quantizer.codes]
    collapse_reshapes(emitter)
    merge_duplicates(emitter)
    work.eliminate_dead_code()
    state.results = {site: emitter.current(node) for site, node in state.results.items()}
    return state


def _overwritten(site: Site, memory: Memory) -> str | None:
    """Why the site's operands cannot be read where its result stands; None where they can."""
    for node in () if site.product is None else sources(site.product):
        if memory.is_written_before(node, site.root):
            return f"{node} is written to before the rewritten matmul would read it"
    return None


def _choose(problem: Problem, target: Target, options: Options) -> Selection | NoKernelError:
    """The kernel for ``problem``, or why there is none; a kernel that the user forces must run."""
    try:
        return select(problem, target, force_kernel=options.force_kernel, disabled=options.disabled_kernels)
    except NoKernelError as error:
        if options.force_kernel is not None:
            raise
        return error


def _select(
    state: Rewriting, site: Site, selection: Selection | NoKernelError, target: Target, options: Options
) -> None:
    """Give ``site`` its kernel, or say why it is left as it is."""
    if isinstance(selection, NoKernelError):
        if site.product is None:
            state.misses.append(Miss(site.gemm, site.gemm, str(selection)))
        else:
            state.recognised.append(_left(site, site.product, target, selection.verdicts))
        return
    if site.product is not None and selection.kernel.dequantizes and options.force_kernel is None:
        state.recognised.append(_left(site, site.product, target, selection.verdicts))
    else:
        state.selections[site] = selection


def _left(site: Site, product: Product, target: Target, verdicts: tuple[Verdict, ...]) -> Recognised:
    reason = f"no kernel of {target} runs this scheme; the source's own steps stay"
    return Recognised(site.gemm, f"{product.obstacle}; {reason}" if product.obstacle else reason, site, verdicts)


def to_kernels(state: Rewriting) -> None:
    """Replace the canonical ops of ``state`` by their kernels' ops, and verify the result.

    A site at which that raises becomes a miss.
    """
    try:
        _to_kernels(state)
    except UnassignedError as error:
        sites = {node: site for site, node in state.canonical.items()}
        left = {sites[node].gemm.name: reason for node, reason in error.reasons.items()}
        without = to_canonical(state.source, state.target, state.options, state.static_indices, left)
        vars(state).update(vars(without))
        if state.selections:
            _to_kernels(state)


def _to_kernels(state: Rewriting) -> None:
    selections = {node: state.selections[site] for site, node in state.canonical.items()}
    assigned = [node.name for node in selections]
    inputs = classify_inputs(state.graph, state.static_indices)
    results = assign(state.graph, selections, inputs.runtime)
    state.canonical = {site: results[node] for site, node in state.canonical.items()}
    state.results = {site: results.get(node, node) for site, node in state.results.items()}
    state.graph.eliminate_dead_code()
    ops = {selection.kernel.overload() for selection in selections.values()}
    kernels = [node for node in state.graph.nodes if is_op(node, *ops)]
    fold_constants(Emitter(state.graph), kernels, classify_inputs(state.graph, state.static_indices))
    verify(state.graph, state.source, assigned)


def rewrite_graph(graph: Graph, target: Target, options: Options, static_indices: frozenset[int] | None) -> Report:
    """Rewrite ``graph`` in place to the kernels of ``target`` and report on it.

    A graph without a site is left byte for byte as it was. On an exception the graph is untouched.

    Raises:
        MissError: ``options.strict`` and a quantized matmul was missed.
        NoKernelError: the forced kernel cannot run a site.
    """
    if not holds_codes(graph):
        return Report(str(target), (), ())
    with collector_paused():
        return _rewrite_graph(graph, target, options, static_indices)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's garbage collector meanwhile, if it was on.

    The passes make several copies of the graph and drop them at the end. A collection in the midst of that walks every
    object of the process, which may take as long as the passes, and promotes the copies to be walked again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _rewrite_graph(graph: Graph, target: Target, options: Options, static_indices: frozenset[int] | None) -> Report:
    state = to_canonical(graph, target, options, static_indices)
    if state.selections:
        to_kernels(state)
    report = report_on(state, target)
    if options.strict and report.misses:
        raise MissError(f"strict=True and {len(report.misses)} quantized matmuls were missed.\n{report}")
    if state.selections:
        replace_contents(graph, state.graph)
    return report


def report_on(state: Rewriting, target: Target) -> Report:
    """Sites, recognised matmuls and misses of ``state``, in words."""
    sites = tuple(_site_report(site, selection, state) for site, selection in state.selections.items())
    misses = tuple(
        MissReport(
            module=module_path(miss.gemm),
            source=source_line(miss.gemm),
            op=_op_name(miss.gemm),
            node=miss.node.name,
            reason=miss.rule,
        )
        for miss in state.misses
    )
    return Report(str(target), sites, misses, tuple(map(_recognised_report, state.recognised)))


def _recognised_report(found: Recognised) -> RecognisedReport:
    site = found.site
    return RecognisedReport(
        module=module_path(found.gemm),
        source=source_line(found.gemm),
        op=_op_name(found.gemm),
        scheme="" if site is None else site.words,
        m="" if site is None else str(site.problem.m),
        n=None if site is None else site.problem.n,
        k=None if site is None else site.problem.k,
        reason=found.reason,
        losers=_losers(found.verdicts),
    )


def _op_name(gemm: Node) -> str:
    return str(gemm.target).removesuffix(".default")


def _losers(verdicts: Iterable[Verdict], chosen: str = "") -> dict[str, list[str]]:
    """Why each other kernel was not chosen."""
    return {
        verdict.kernel: list(verdict.reasons) or ["can run, lower priority"]
        for verdict in verdicts
        if verdict.kernel != chosen
    }


def _site_report(site: Site, selection: Selection, state: Rewriting) -> SiteReport:
    problem = site.problem
    return SiteReport(
        module=module_path(site.gemm),
        source=source_line(site.gemm),
        op=_op_name(site.gemm),
        scheme=site.words,
        m=str(problem.m),
        n=problem.n,
        k=problem.k,
        out_dtype=dtype_name(problem.out_dtype),
        kernel=selection.kernel.name,
        padding=selection.padding.describe(problem),
        numerics=str(max(site.numerics, selection.kernel.numerics)),
        quantize=str(state.quantizers.get(site, "")),
        losers=_losers(selection.verdicts, selection.kernel.name),
    )
