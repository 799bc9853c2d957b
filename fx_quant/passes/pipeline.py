"""The passes in order, as one transaction: a graph is rewritten whole or left as it was.

``PASSES`` is the whole flow. Each pass takes the state, and is called once for a graph; one that cannot do its part for
a site makes that site a miss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

from torch.fx import Graph, Node

from fx_quant.compat import copy_graph, dump_graph, is_subgraph, replace_contents
from fx_quant.config import Options, PaddingPolicy
from fx_quant.errors import MissError, NoKernelError
from fx_quant.kernels.context import CompileContext
from fx_quant.kernels.select import Selection, Verdict, check_kernel_names, select
from fx_quant.passes import dialects
from fx_quant.passes.annotate import Annotation
from fx_quant.passes.assign import UnassignedError, assign
from fx_quant.passes.attention import attend_single_queries
from fx_quant.passes.canonicalize import canonicalize
from fx_quant.passes.emit import Emitter
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.folding import fold_constants
from fx_quant.passes.inputs import classify_inputs
from fx_quant.passes.memory import Memory
from fx_quant.passes.merge import common_subexpressions_merged
from fx_quant.passes.nodes import is_op
from fx_quant.passes.packed import unpack_once
from fx_quant.passes.pads import PadName, UnremovableError, remove_pads
from fx_quant.passes.quantizers import Quantizer
from fx_quant.passes.reporting import report_on
from fx_quant.passes.rewrite import (
    collapse_reshapes,
    merge_duplicates,
    quantizers_of,
    remove_identities,
    rewrite_quantizers,
)
from fx_quant.passes.rewriting import Rewriting, Row
from fx_quant.passes.row_ranges import in_declared_range
from fx_quant.passes.rulebook import starts_codes
from fx_quant.passes.rules.padded import may_pad
from fx_quant.passes.sites import Found, Recognised, Site, SizeMiss, find_sites
from fx_quant.passes.slices import decode_parts
from fx_quant.passes.specialize import specialize_weights
from fx_quant.passes.turned import reasons, turn
from fx_quant.passes.values import Product, sources
from fx_quant.passes.verify import verify
from fx_quant.passes.written import join_slices
from fx_quant.problem import Problem
from fx_quant.report import Report
from fx_quant.scheme import Numerics
from fx_quant.target import Target

Pass = Callable[[Rewriting], None]


def holds_codes(graph: Graph) -> bool:
    """Whether anything in ``graph`` may be quantized: a low-bit dtype, packed integers, a fake quantization, or an op
    of which only the name says so.
    """
    return any(starts_codes(node) for node in graph.nodes)


# --- what is there, and which kernel runs it ----------------------------------------------------------------------


def merge_common_subexpressions(state: Rewriting) -> None:
    """A copy of the source in which what is computed twice is computed once."""
    state.graph = common_subexpressions_merged(state.source)


def drop_identities(state: Rewriting) -> None:
    """What changes nothing goes, and so do new tensors that slices fill, and slices of decoded weights."""
    join_slices(state.graph)
    remove_identities(state.graph)
    decode_parts(state.graph, state.static_indices)


def drop_pads(state: Rewriting) -> None:
    """Pads that an author wrote for eager calls go, where nothing that is left depends on them."""
    if any(map(may_pad, state.graph.nodes)):
        state.pads = remove_pads(state.graph, classify_inputs(state.graph, state.static_indices), state.kept_pads)


def turn_weights(state: Rewriting) -> None:
    """Weights on the left, and convolutions of one element, are spelled as matmuls where one is rewritten."""
    state.turned = turn(state.graph, state.static_indices, state.kept_spellings)


def find(state: Rewriting) -> None:
    """The sites, and every quantized matmul that is none, with the reason."""
    state.before, _ = copy_graph(state.graph)
    matmuls = _found(state)
    if specialize_weights(miss.gemm for miss in matmuls.misses if isinstance(miss, SizeMiss)):
        matmuls = _found(state)
    # Those of a subgraph are missed once in each call of it, as the graph around it says.
    state.misses, state.recognised = [] if is_subgraph(state.source) else matmuls.misses, matmuls.recognised
    state.misses = [
        dataclasses.replace(miss, rule=state.turned.left.get(miss.gemm.name, miss.rule)) for miss in state.misses
    ]
    state.sites = matmuls.sites
    state.memory = Memory(state.graph)


def _found(state: Rewriting, weight_only: Collection[Node] = ()) -> Found:
    """Every quantized matmul of the graph; of ``weight_only`` the activation is a float, whatever it was before."""
    inputs = classify_inputs(state.graph, state.static_indices)
    matmuls = find_sites(state.graph, Annotation(state.graph, weight_only), inputs, state.options.numerics)
    matmuls.sites = [in_declared_range(site, state.context.ranges) for site in matmuls.sites]
    return matmuls


def choose_kernels(state: Rewriting) -> None:
    """A kernel for each site, or why there is none."""
    assert state.memory is not None
    # The layers of a model ask the same few questions.
    choose = functools.cache(
        functools.partial(_choose, target=state.target, options=state.options, context=state.context)
    )
    left: dict[Node, tuple[Site, Selection | NoKernelError | Failure]] = {}
    for site in state.sites:
        reason = state.left.get(site.gemm.name) or _overwritten(site, state.memory)
        if reason is not None:
            state.miss(site, reason)
            continue
        outcome = _ask(state, site, choose)
        if outcome is not None:
            left[site.gemm] = site, outcome
    decoded = {gemm for gemm, (site, _) in left.items() if site.product is not None and site.product.decoded}
    for site in _found(state, decoded).sites if decoded else ():
        if site.gemm in decoded and not _overwritten(site, state.memory) and _ask(state, site, choose) is None:
            del left[site.gemm]
    for site, outcome in left.values():
        _leave(state, site, outcome)


def _ask(
    state: Rewriting, site: Site, choose: Callable[[Problem], Selection | NoKernelError]
) -> Selection | NoKernelError | Failure | None:
    """Give ``site`` the kernel of the first of its problems that one runs; what came of the first if none does."""
    outcomes = []
    for problem in (site.problem, *site.others):
        outcome = attempt(choose, problem)
        if isinstance(outcome, Selection) and _pays(state, site, outcome):
            site = dataclasses.replace(site, problem=problem, others=())
            state.rows[site] = Row(site, outcome)
            return None
        outcomes.append(outcome)
    return outcomes[0]


def _pays(state: Rewriting, site: Site, selection: Selection) -> bool:
    """Whether the kernel is as exact as was asked and faster than the source's own steps, or is to run anyhow."""
    kernel, options = selection.kernel, state.options
    if site.product is None or options.force_kernel is not None:
        return True
    is_exact = kernel.numerics is Numerics.EXACT or options.numerics is not Numerics.EXACT
    return is_exact and not kernel.dequantizes


def _leave(state: Rewriting, site: Site, outcome: Selection | NoKernelError | Failure) -> None:
    """Leave ``site`` as it is, and say why."""
    if isinstance(outcome, Failure):
        state.miss(site, outcome.reason("choosing a kernel"))
    elif isinstance(outcome, NoKernelError) and state.options.force_kernel is not None:
        raise outcome
    elif site.product is not None:
        state.recognised.append(_left(site, site.product, state, outcome.verdicts))
    else:
        state.miss(site, str(outcome))


def _overwritten(site: Site, memory: Memory) -> str | None:
    """Why the site's operands cannot be read where its result stands; None where they can."""
    for node in () if site.product is None else sources(site.product):
        if memory.is_written_before(node, site.root):
            return f"{node} is written to before the rewritten matmul would read it"
    return None


def _choose(problem: Problem, target: Target, options: Options, context: CompileContext) -> Selection | NoKernelError:
    """The kernel for ``problem``, or why there is none."""
    try:
        return select(
            problem,
            target,
            force_kernel=options.force_kernel,
            disabled=options.disabled_kernels,
            context=context,
        )
    except NoKernelError as error:
        return error


def _left(site: Site, product: Product, state: Rewriting, verdicts: tuple[Verdict, ...]) -> Recognised:
    context = state.context
    asked = ", deterministic" if context.deterministic else ""
    asked += ", exactly" if state.options.numerics is Numerics.EXACT else ""
    asked += (
        f", with padding='{context.padding}'"
        if context.padding in (PaddingPolicy.NEVER, PaddingPolicy.CONSTANTS)
        else ""
    )
    reason = f"no kernel of {state.target} runs this scheme{asked}; the source's own steps stay"
    return Recognised(site.gemm, f"{product.obstacle}; {reason}" if product.obstacle else reason, site, verdicts)


# --- canonical ops ------------------------------------------------------------------------------------------------


def recognise_quantizes(state: Rewriting) -> None:
    """The quantize behind each site's activation."""
    assert state.memory is not None
    quantizers = quantizers_of(state.rows, state.memory)
    for site, row in state.rows.items():
        row.quantizer = None if site.codes is None else quantizers[site.codes]


def write_canonical_ops(state: Rewriting) -> None:
    """Each site as one canonical op and what follows it."""
    state.emitter = Emitter(state.graph)
    for site, row in list(state.rows.items()):
        written = attempt(canonicalize, state.emitter, site)
        if isinstance(written, Failure):
            # What was emitted of it has no user.
            state.miss(site, written.reason("writing the canonical op"))
        else:
            row.op, row.result = written
            row.canonical = written[0].name


def write_quantizes(state: Rewriting) -> None:
    """Each recognised quantize as one op."""
    assert state.emitter is not None
    rows = [row for row in state.rows.values() if row.quantizer is not None]
    unwritten = rewrite_quantizers(state.emitter, [row.quantizer for row in rows if row.quantizer is not None])
    for row in rows:
        if isinstance(row.quantizer, Quantizer):
            row.quantizer = unwritten.get(row.quantizer.codes, row.quantizer)


def tidy(state: Rewriting) -> None:
    """What several sites asked for stands once, and what nothing reads goes."""
    assert state.emitter is not None
    collapse_reshapes(state.emitter)
    merge_duplicates(state.emitter)
    state.graph.eliminate_dead_code()
    for row in state.rows.values():
        row.result = state.emitter.current(row.written()[1])


# --- kernels ------------------------------------------------------------------------------------------------------


def assign_kernels(state: Rewriting) -> None:
    """Each canonical op as its kernel's plan."""
    selections = {row.written()[0]: row.selection for row in state.rows.values()}
    inputs = classify_inputs(state.graph, state.static_indices)
    results = assign(state.graph, selections, inputs.runtime)
    for row in state.rows.values():
        op, result = row.written()
        row.op, row.result = results[op], results.get(result, result)
    state.graph.eliminate_dead_code()


def fold(state: Rewriting) -> None:
    """What kernels are given of constants alone is computed once."""
    ops = {row.selection.overload() for row in state.rows.values()}
    kernels = [node for node in state.graph.nodes if is_op(node, *ops)]
    emitter, inputs = Emitter(state.graph), classify_inputs(state.graph, state.static_indices)
    fold_constants(emitter, kernels, inputs)
    unpack_once(emitter, inputs)


def check(state: Rewriting) -> None:
    """The graph is well-formed, and what it returns is like what the source returns."""
    verify(state.graph, state.source, {row.canonical for row in state.rows.values()})


FINDING: tuple[Pass, ...] = (
    merge_common_subexpressions,
    drop_identities,
    drop_pads,
    turn_weights,
    find,
    choose_kernels,
)
WRITING: tuple[Pass, ...] = (recognise_quantizes, write_canonical_ops, write_quantizes, tidy)
LOWERING: tuple[Pass, ...] = (assign_kernels, fold, attend_single_queries, check)
PASSES = FINDING + WRITING + LOWERING


def _run(passes: Sequence[Pass], state: Rewriting) -> None:
    """Run ``passes`` in order; the graph after each can be dumped under its name."""
    for step in passes:
        step(state)
        dump_graph(f"FX_QUANT_{PASSES.index(step) + 1:02}_{step.__name__.upper()}", state.graph)


def to_canonical(
    graph: Graph,
    target: Target,
    options: Options,
    static_indices: frozenset[int] | None,
    left: Mapping[str, str] = MappingProxyType({}),
    context: CompileContext | None = None,
) -> Rewriting:
    """Find the sites of ``graph``, select a kernel for each and rewrite a copy to canonical ops.

    ``graph`` itself is not touched. A site that no kernel can run, or at which a step raises, is a miss.

    Args:
        left: sites to leave as they are: the reason, by the name of the matmul.
        context: what kernels and plans are chosen for; None is a whole graph with these options.

    Raises:
        NoKernelError: the forced kernel cannot run a site.
    """
    check_kernel_names(options.disabled_kernels)
    context = context or CompileContext.of(options)
    kept: dict[PadName, str] = {}
    spellings: dict[str, str] = {}
    failed = False
    while True:
        state = Rewriting(graph, graph, target, options, context, static_indices, left, kept, spellings)
        try:
            _run(FINDING, state)
            if state.rows:
                _run(WRITING, state)
            stays, as_written = _of_misses(state), _as_written(state)
            spellings = spellings | as_written
            if not stays and not as_written:
                return state
        except UnremovableError as error:
            # One that cannot be taken out costs no other pad; with a second all stay, so that time stays linear.
            stays = dict.fromkeys(error.going if failed else error.pads, error.reason)
            failed = True
        except NoKernelError as error:
            # The author may have padded for just this kernel.
            stays = {name: str(error) for pad in state.pads if pad.kept is None for name in pad.pads}
            if not stays:
                raise
        kept |= stays


def _of_misses(state: Rewriting) -> dict[PadName, str]:
    """The pads that were taken out of matmuls which are not rewritten: these are to be left as they were."""
    rewritten = {site.gemm.name for site in state.rows}
    left = [pad for pad in state.pads if pad.kept is None and pad.gemm not in rewritten]
    return {name: f"the matmul {pad.gemm} is not rewritten" for pad in left for name in pad.pads}


def _as_written(state: Rewriting) -> dict[str, str]:
    """Why linears that were spelled as something else are to be left so: their matmuls are not rewritten."""
    why = {miss.gemm.name: miss.rule for miss in state.misses}
    why |= {row.gemm.name: row.reason for row in state.recognised}
    return reasons(state.turned, why, {site.gemm.name for site in state.rows})


def to_kernels(state: Rewriting) -> None:
    """Replace the canonical ops of ``state`` by their kernels' ops, and verify the result.

    A site at which that raises becomes a miss.
    """
    try:
        _run(LOWERING, state)
    except UnassignedError as error:
        names = {row.op: row.site.gemm.name for row in state.rows.values()}
        left = {names[node]: reason for node, reason in error.reasons.items()}
        without = to_canonical(state.source, state.target, state.options, state.static_indices, left, state.context)
        vars(state).update(vars(without))
        if state.rows:
            _run(LOWERING, state)


def run_passes(
    graph: Graph,
    target: Target,
    options: Options,
    static_indices: frozenset[int] | None,
    context: CompileContext | None = None,
) -> Rewriting:
    """All passes on a copy of ``graph``; without a site ``rows`` is empty and the copy is not to be used.

    Args:
        context: as for ``to_canonical``.

    Raises:
        NoKernelError: the forced kernel cannot run a site.
    """
    dialects.load_dialects()
    if not holds_codes(graph):
        return Rewriting(graph, graph, target, options, context or CompileContext.of(options), static_indices)
    with collector_paused():
        state = to_canonical(graph, target, options, static_indices, context=context)
        if state.rows:
            to_kernels(state)
    return state


def rewrite_graph(
    graph: Graph,
    target: Target,
    options: Options,
    static_indices: frozenset[int] | None,
    context: CompileContext | None = None,
) -> Report:
    """Rewrite ``graph`` in place to the kernels of ``target`` and report on it.

    A graph without a site is left byte for byte as it was. On an exception the graph is untouched.

    Args:
        context: as for ``to_canonical``.

    Raises:
        MissError: ``options.strict`` and a quantized matmul was missed.
        NoKernelError: the forced kernel cannot run a site.
    """
    with collector_paused():
        state = run_passes(graph, target, options, static_indices, context)
        report = report_on(state)
        if options.strict and report.misses:
            raise MissError(f"strict=True and {len(report.misses)} quantized matmuls were missed.\n{report}")
        if state.rows:
            replace_contents(graph, state.graph)
        return report


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
