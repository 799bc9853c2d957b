"""The ``torch.compile`` backend: Inductor with our passes, scoped to one compile."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import operator
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

import fx_quant.lowerings  # cached artifacts need ops and lowerings before any pass runs
from fx_quant.compat import (
    carried_by_artefacts,
    compile_id,
    decompositions_without_matmul,
    dump_graph,
    kept_inputs,
    marked_dynamic,
    restore_matmul_decompositions,
    static_input_indices,
    trace_json,
)
from fx_quant.config import Options, option_names
from fx_quant.errors import FxQuantError, MissError, must, unknown_name
from fx_quant.kernels.context import CompileContext
from fx_quant.kernels.cpu.plans import tuned_tables
from fx_quant.kernels.machine import detect_target
from fx_quant.kernels.registry import kernels
from fx_quant.kernels.select import disabled_kernels
from fx_quant.kernels.subclasses import with_outer_versions
from fx_quant.lowerings.toolchain import prepare_in_background
from fx_quant.passes import dialects
from fx_quant.passes.nodes import tensor
from fx_quant.passes.packed import refuse_writes
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.piecewise.compile import compile_in_pieces
from fx_quant.piecewise.sizes import Asked
from fx_quant.report import MissReport, Report
from fx_quant.target import Target

log = logging.getLogger("fx_quant")

HOOK = "joint_custom_pre_pass"


class RewritePass(CustomGraphPass):
    """The passes of fx_quant as one Inductor pass.

    Args:
        options: what the user asked for.
        target: the machine to choose kernels for; None detects it from the graph's device.
        on_report: called with the report of each graph, one that came from a cache included.

    ``kept`` are the positions of parameters and buffers in Dynamo's graph, where the backend has seen it.
    """

    def __init__(
        self,
        options: Options,
        target: Target | None = None,
        on_report: Callable[[Report], None] | None = None,
    ) -> None:
        self.options = options
        self.context = CompileContext.of(options)
        self.target = target
        self.on_report = on_report
        self.reports: list[Report] = []
        self.kept: frozenset[int] | None = None

    def __call__(self, graph: Graph) -> None:
        """Rewrite ``graph`` in place; on an exception it stays as it is, unless ``strict``."""

        def passes() -> Report:
            # Which loads every provider, so that one of them may fail.
            target = self.target or detect_target(_device(map(tensor, graph.nodes)))
            return rewrite_graph(graph, target, self.options, static_input_indices(graph, self.kept), self.context)

        dump_graph("FX_QUANT_BEFORE", graph)
        report = safely(passes, self.target or _device(map(tensor, graph.nodes)), self.options)
        self.record(report)
        restore_matmul_decompositions(graph)
        dump_graph("FX_QUANT_AFTER", graph)

    def record(self, report: Report, *, cached: bool = False) -> None:
        """Count, log and hand on ``report``, which a pass has made or a cached artefact brought."""
        self.reports.append(report)
        _record(report, cached=cached)
        if self.on_report is not None:
            self.on_report(report)

    def uuid(self) -> object:
        """Key of Inductor's caches: our sources, options, context, target, the kernels, their versions and plans.

        And dialects from outside, and which sizes are marked as dynamic: what is compiled for others may have guards,
        which they refuse.
        """
        target = self.target or detect_target(_first_device())
        return (
            source_digest(),
            repr(self.options),
            repr(self.context),
            repr((target.platform, target.arch, sorted(target.features), sorted(target.packages.items()))),
            tuple(kernel.name for kernel in kernels()),
            dialects.registered(),
            tuple(sorted(disabled_kernels())),
            repr(sorted(tuned_tables().items())),
            marked_dynamic(),
            torch.__version__,
        )


def safely(passes: Callable[[], Report], target: Target | torch.device, options: Options) -> Report:
    """The report of ``passes``; where they fail, a report of one miss that names the exception.

    Args:
        target: the machine, or its device where nothing more is known of it.

    Raises:
        FxQuantError: what ``passes`` raise on purpose, and under ``strict`` a ``MissError`` for any other exception.
    """
    try:
        return passes()
    except FxQuantError:
        raise
    except Exception as error:
        if options.strict:
            raise MissError(f"strict=True and a pass of fx_quant failed: {error!r}") from error
        log.debug("pass failed", exc_info=True)
        return Report(str(target), (), (MissReport.of_graph(f"a pass failed with {error!r}"),))


def _device(values: Iterable[object]) -> torch.device:
    devices = (each.device for each in values if isinstance(each, torch.Tensor))
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _first_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def warn_of_failures(report: Report) -> None:
    """Warn of each graph that is left because a pass failed."""
    for miss in report.misses:
        if miss.is_of_graph:
            warnings.warn(
                f"fx_quant: {miss.reason}; the graph compiles as it was. "
                "Set options={'strict': True} to get the traceback.",
                stacklevel=2,
            )


def _record(report: Report, *, cached: bool = False) -> None:
    counters["fx_quant_graphs"]["cached" if cached else "compiled"] += 1
    for site in report.sites:
        counters["fx_quant_kernels"][site.kernel] += 1
    trace_json("fx_quant_report", report.to_json)
    counters["fx_quant"]["rewritten"] += len(report.sites)
    counters["fx_quant"]["recognised"] += len(report.recognised)
    counters["fx_quant"]["missed"] += len(report.misses)
    log.info("graph %s%s: %s", compile_id(), " from a cache" if cached else "", report.summary())
    log.debug("%s", _Table(report))
    if how := report.how_cut():
        log.log(logging.WARNING if report.whole else logging.INFO, "%s", how)
    warn_of_failures(report)
    for miss in report.misses:
        log.warning("%s left as it is at %s: %s", miss.op, miss.module or miss.source or miss.node, miss.reason)


class _Table:
    """A report as text, made only where a log prints it."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __str__(self) -> str:
        return self.report.to_text(wide=True)


@functools.cache
def source_digest() -> str:
    """Hash over every source file of the package and of the installed kernel providers."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".h", ".cpp")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    for entry_point in sorted(importlib.metadata.entry_points(group="fx_quant.kernels"), key=str):
        version = entry_point.dist.version if entry_point.dist else ""
        digest.update(f"{entry_point}{version}".encode())
    return digest.hexdigest()


class Chain(CustomGraphPass):
    """Passes one after another. Its uuid is None, which bypasses caches, when that of any pass is."""

    def __init__(self, passes: Sequence[Callable[[Graph], None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: Graph) -> None:
        """Run each pass on ``graph``."""
        for each in self.passes:
            each(graph)

    def uuid(self) -> object:
        """The uuids of all passes, or None."""
        uuids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in uuids else tuple(uuids)


def inductor_pass(
    chain: Callable[[Graph], None] | Sequence[Callable[[Graph], None]] | None = None, **options: Any
) -> CustomGraphPass:
    """The passes for someone else's Inductor set-up, to be set as ``joint_custom_pre_pass``.

    Args:
        chain: passes that were there already; they run first.
        options: as for the backend, which alone can compile in pieces.

    Raises:
        FxQuantError: ``piecewise`` is asked for, or an option is not as it must be.
    """
    parsed = Options.parse(options)
    must(not parsed.piecewise, "option 'piecewise' is the backend's; a pass is given one graph at a time", FxQuantError)
    ours = RewritePass(parsed)
    if chain is None:
        return ours
    first = list(chain) if isinstance(chain, Sequence) else [chain]
    return Chain([*first, ours])


def split_options(given: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """``(our options, Inductor's)``.

    Raises:
        UnknownNameError: an option that neither knows.
    """
    ours, inductors = {}, {}
    # With the aliases, which get_config_copy() leaves out.
    known = vars(inductor_config)["_config"]
    for name, value in (given or {}).items():
        key = name.replace("-", "_")
        if key in option_names():
            ours[key] = value
        elif key in known:
            inductors[key] = value
        else:
            raise (
                unknown_name("option", name, [*option_names(), *known])
                if _is_near(name, known)
                else unknown_name("option", name, option_names())
            )
    return Options.parse(ours), inductors


def _is_near(name: str, known: Mapping[str, Any]) -> bool:
    import difflib

    return bool(difflib.get_close_matches(name, list(known), n=1, cutoff=0.8))


def _asked(mode: str | None, inductor_options: Mapping[str, Any]) -> dict[str, Any]:
    """What the user asks of Inductor: the mode's options, and over them those that are named."""
    return {**(list_mode_options(mode) if mode and mode != "default" else {}), **inductor_options}


def config_patches(
    mode: str | None, inductor_options: Mapping[str, Any], ours: Callable[[Graph], None]
) -> dict[str, Any]:
    """Inductor's configuration for one compile: the mode's, the user's, and our pass after the user's own."""
    # What follows a matmul belongs in its epilogue, not in the next reduction: the bare accumulator is never stored.
    patches: dict[str, Any] = {"epilogue_fusion_first": True, **_asked(mode, inductor_options)}
    previous = patches.get(HOOK, getattr(inductor_config, HOOK))
    if previous is not None:
        first = list(previous) if isinstance(previous, Sequence) else [previous]
        ours = Chain([*first, ours])
    return {**patches, HOOK: ours}


def fx_quant(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The backend of ``torch.compile(model, backend="fx_quant", options={...})``.

    Args:
        mode: one of ``torch.compile``'s modes, with Inductor's meaning.
        options: those of ``fx_quant.config.Options``, and any of ``torch._inductor.config``.

    Raises:
        UnknownNameError: an unknown option, numerics class or kernel.
        NoKernelError: a forced kernel cannot run a site.
        MissError: ``strict`` and a quantized matmul was missed.
        FxQuantError: the graph writes to the weight of a layer that holds it packed.
    """
    if _device(example_inputs).type == "cpu":
        prepare_in_background()
    refuse_writes(gm)
    ours, inductors = split_options(options)
    if ours.piecewise:
        return _compile_in_pieces(gm, example_inputs, ours, mode, inductors)
    compiled = _compile_and_report(gm, example_inputs, RewritePass(ours), mode, inductors)
    return outside_function_modes(with_outer_versions(compiled, example_inputs))


def outside_function_modes(compiled: Any) -> Any:
    """``compiled``, whose ops no torch-function mode sees: what a mode does is in the graph already.

    A mode of NNCF's decodes each parameter that an op takes, and so the codes that a kernel's op packs.
    """
    if not callable(compiled):
        return compiled

    @functools.wraps(compiled)
    def run(*inputs: Any) -> Any:
        if torch._C._len_torch_function_stack() == 0:
            return compiled(*inputs)
        with torch._C.DisableTorchFunction():
            return compiled(*inputs)

    return run


def _compile_and_report(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    rewrite: RewritePass,
    mode: str | None,
    inductor_options: Mapping[str, Any],
) -> Any:
    """``gm`` compiled; ``rewrite`` has the reports, of a graph that came from a cache too."""
    found: list[str] = []
    with carried_by_artefacts(lambda: _to_text(rewrite.reports), found):
        compiled = _compile(gm, example_inputs, rewrite, mode, inductor_options)
    if not rewrite.reports and found:
        # AOTAutograd's cache had the graph, so that no pass ran: what they said when it was made holds still.
        for report in _from_text(found[0]):
            rewrite.record(report, cached=True)
    return compiled


class _PiecePass(RewritePass):
    """The passes on one piece, of which the graph's report tells later."""

    def record(self, report: Report, *, cached: bool = False) -> None:
        """Keep ``report``."""
        self.reports.append(report)


def _current(name: str) -> Any:
    return operator.attrgetter(name)(inductor_config)


# Options of Inductor under which an artefact may not serve other parameters, or was not tried to.
_WHOLE = {
    "freezing": "freezing makes constants of the parameters, so that no two pieces are the same",
    "triton.cudagraphs": "a CUDA graph reads parameters where they were when it was recorded",
    "cpp_wrapper": "cpp_wrapper is given a graph's own inputs",
}


def _compile_in_pieces(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    inductor_options: Mapping[str, Any],
) -> Any:
    """``gm`` compiled in the pieces between the ops that ``options`` name, and one report of all."""

    def compiler(piece: GraphModule, inputs: Sequence[Any]) -> tuple[Any, Report]:
        rewrite = _PiecePass(options)
        compiled = _compile_and_report(piece, inputs, rewrite, mode, inductor_options)
        reports = rewrite.reports or [Report(str(detect_target()), (), ())]
        return compiled, functools.reduce(Report.merged, reports)

    inductors = _asked(mode, inductor_options)
    whole = [why for name, why in _WHOLE.items() if inductors.get(name, _current(name))]
    asked = Asked.of(options, detect_target(_device(example_inputs)).platform)
    compiled, report = compile_in_pieces(
        gm, example_inputs, options.splitting_ops, compiler, "; ".join(whole), asked, options.splitting_modules
    )
    _record(report)
    return outside_function_modes(with_outer_versions(compiled, example_inputs))


def _to_text(reports: Sequence[Report]) -> str:
    return json.dumps([report.to_json() for report in reports])


def _from_text(text: str) -> list[Report]:
    return [Report.from_json(each) for each in json.loads(text)]


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], **arguments: Any) -> Callable[[list[Any]], Any]:
    """Inductor's compilation of one graph after AOTAutograd: what an ``inner_compile`` wraps."""
    return compile_fx_inner(gm, example_inputs, **arguments)


def compile_plainly(gm: GraphModule, example_inputs: Sequence[Any], **arguments: Any) -> Callable[[list[Any]], Any]:
    """As ``compile_graph``, under what Inductor does of itself."""
    with inductor_config.patch(epilogue_fusion_first=False):
        return compile_fx_inner(gm, example_inputs, **arguments)


def compile_with(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    rewrite: Callable[[Graph], None],
    mode: str | None = None,
    inductor_options: Mapping[str, Any] | None = None,
    **compile_arguments: Any,
) -> Any:
    """Inductor on ``gm`` with ``rewrite`` run on its joint graph, nothing global changed."""
    compiled = _compile(gm, example_inputs, rewrite, mode, inductor_options, **compile_arguments)
    return with_outer_versions(compiled, example_inputs)


def _compile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    rewrite: Callable[[Graph], None],
    mode: str | None,
    inductor_options: Mapping[str, Any] | None,
    **compile_arguments: Any,
) -> Any:
    if isinstance(rewrite, RewritePass):
        rewrite.kept = kept_inputs(gm)
    return compile_fx(
        gm,
        example_inputs,
        config_patches=config_patches(mode, inductor_options or {}, rewrite),
        decompositions=decompositions_without_matmul(),
        **compile_arguments,
    )
