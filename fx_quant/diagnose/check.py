"""``check``: is the rewritten model still right? Each site against the source graph, in one run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fx_quant.backend import compile_graph, safely, split_options, warn_of_failures
from fx_quant.compat import copy_graph, replace_contents, row_scales_on_cpu, second_compile, static_input_indices
from fx_quant.config import Options
from fx_quant.diagnose.capture import run_captured, run_eagerly
from fx_quant.diagnose.cuts import Keeper, cut_out
from fx_quant.diagnose.inputs import check_inputs, failures_in_a_line
from fx_quant.diagnose.isolation import innermost, preserve_rng_state, uncompiled
from fx_quant.errors import MissError, ToleranceError
from fx_quant.kernels.machine import detect_target
from fx_quant.loading.module_names import named_modules_of, renamed
from fx_quant.passes.pipeline import run_passes
from fx_quant.passes.reporting import report_on
from fx_quant.passes.sites import Site
from fx_quant.report import (
    Block,
    MissReport,
    Paragraph,
    Report,
    Reported,
    SiteReport,
    Table,
    alike_by_name,
    counted,
)
from fx_quant.report.progress import counting
from fx_quant.target import Target


@dataclass(frozen=True)
class Error:
    """How far a tensor is from its reference.

    Args:
        max_rel_err: ``max |x - reference| / max |reference|`` over the finite elements of both.
        sqnr_db: ``10 log10(sum reference^2 / sum (x - reference)^2)``; infinite when equal.
        new_nan, new_inf: elements that are NaN or infinite here and not in the reference.
    """

    max_rel_err: float
    sqnr_db: float
    new_nan: int
    new_inf: int


@dataclass(frozen=True)
class SiteCheck:
    """One site: its error on the source graph's values, and the share of activation codes at an end of their range."""

    module: str
    kernel: str
    numerics: str
    error: Error
    saturated: float


@dataclass(frozen=True, repr=False)
class CheckReport(Reported):
    """Errors of every site and of the model's outputs; prints as a table.

    Each site starts from the values of the source graph, so its error is its own. The outputs are those of the whole
    compiled model against eager, whatever part of the difference is ours.
    """

    sites: tuple[SiteCheck, ...]
    misses: tuple[MissReport, ...]
    outputs: Error
    uncaptured: str = ""

    def raise_if(
        self, *, max_rel_err: float | None = None, min_sqnr_db: float | None = None, new_nan: bool = True
    ) -> CheckReport:
        """Raise when a site or an output is worse than allowed; returns self otherwise.

        Args:
            max_rel_err: largest allowed relative error.
            min_sqnr_db: smallest allowed signal to quantization-noise ratio.
            new_nan: also raise for NaN or infinity that the reference has not.

        Raises:
            ToleranceError: names the worst site.
        """
        rows = [(s.module or s.kernel, s.error) for s in self.sites] + [("model output", self.outputs)]
        for name, error in rows:
            if max_rel_err is not None and not error.max_rel_err <= max_rel_err:
                raise ToleranceError(f"{name}: max_rel_err must be <= {max_rel_err:g}, got {error.max_rel_err:.3g}")
            if min_sqnr_db is not None and not error.sqnr_db >= min_sqnr_db:
                raise ToleranceError(f"{name}: SQNR must be >= {min_sqnr_db:g} dB, got {error.sqnr_db:.1f} dB")
            if new_nan and (error.new_nan or error.new_inf):
                raise ToleranceError(f"{name}: {error.new_nan} new NaN and {error.new_inf} new infinite elements")
        return self

    def raise_if_missed(self, *, missed: bool = True, fewer_than: int | None = None) -> CheckReport:
        """Raise when a matmul was missed or none was compared, or fewer than expected; returns self otherwise.

        Raises:
            MissError: says which.
        """
        if missed and (self.misses or not self.sites):
            raise MissError(f"every quantized matmul must be compared and none missed, got: {self.summary()}")
        if fewer_than is not None and len(self.sites) < fewer_than:
            raise MissError(f"{fewer_than} or more rewritten matmuls must be compared, got: {self.summary()}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"summary": self.summary(), **dataclasses.asdict(self)}

    def summary(self) -> str:
        """One line: how many were compared, and how far the worst is from its source."""
        if self.uncaptured:
            return f"nothing was compiled, so nothing was compared: {self.uncaptured}"
        if not self.sites:
            return "no quantized matmul was rewritten, so that the outputs alone were compared"
        worst = _worst([site.error for site in self.sites])
        return (
            f"{counted(len(self.sites), 'rewritten matmul', 'rewritten matmuls')} compared, "
            f"the worst relative error is {worst.max_rel_err:.1e}"
            + (f"; {len(self.misses)} missed" if self.misses else "")
        )

    def blocks(self, *, wide: bool) -> list[Block]:
        """One row a site, with the worst of repeated layers, then the model's outputs."""
        alike = alike_by_name(self.sites, lambda site: (site.kernel, site.numerics))
        errors = [*(_worst([site.error for site in sites]) for _, sites in alike), self.outputs]
        columns = {
            "module": [*(name or "?" for name, _ in alike), "model output"],
            "sites": [*(str(len(sites)) for _, sites in alike), ""],
            "kernel": [*(sites[0].kernel for _, sites in alike), ""],
            "numerics": [*(sites[0].numerics for _, sites in alike), ""],
            "rel err": [f"{error.max_rel_err:.2e}" for error in errors],
            "SQNR dB": [f"{error.sqnr_db:.1f}" for error in errors],
            "new NaN": [str(error.new_nan) for error in errors],
            "new Inf": [str(error.new_inf) for error in errors],
            "saturated": [*(f"{100 * max(site.saturated for site in sites):.2f}%" for _, sites in alike), ""],
        }
        blocks: list[Block] = []
        if not wide:
            if sound := not any(error.new_nan or error.new_inf for error in errors):
                del columns["new NaN"], columns["new Inf"]
            said = ["no new NaN or infinity"] if sound else []
            for name in ("kernel", "numerics"):
                if len(values := set(columns[name][:-1])) == 1:
                    del columns[name]
                    said.insert(0, values.pop())
            blocks += [Paragraph(", ".join(said))] if said else []
        blocks.append(Table(tuple(columns), tuple(zip(*columns.values(), strict=True))))
        if self.sites:
            blocks.append(
                Paragraph(
                    "Each site on the inputs that eager gives it, the worst of its row; the model output is that of "
                    "the whole compiled model, in which dynamic quantization amplifies the rounding of every op."
                )
            )
        if self.misses:
            missed = counted(len(self.misses), "quantized matmul was missed", "quantized matmuls were missed")
            blocks.append(Paragraph(f"{missed}, and ran as before; see explain."))
        return blocks


def error_of(value: Tensor, reference: Tensor) -> Error:
    """The error of ``value`` against ``reference``, in float64. Empty tensors have none."""
    x, r = value.detach().double().flatten(), reference.detach().double().flatten()
    both = x.isfinite() & r.isfinite()
    noise, signal = (x - r)[both], r[both]
    peak = signal.abs().max().item() if signal.numel() else 0.0
    worst = noise.abs().max().item() if noise.numel() else 0.0
    power, noise_power = signal.square().sum().item(), noise.square().sum().item()
    return Error(
        max_rel_err=worst / peak if peak else (0.0 if worst == 0 else math.inf),
        sqnr_db=math.inf if noise_power == 0 else 10 * math.log10(power / noise_power) if power else -math.inf,
        new_nan=int((x.isnan() & ~r.isnan()).sum()),
        new_inf=int((x.isinf() & ~r.isinf()).sum()),
    )


@dataclass
class _Sites:
    """The sites of one graph, alone: every kernel's op and what feeds it, cut off where the source graph's nodes begin.

    Args:
        before: the source graph.
        alone: takes the values of the source nodes ``inputs``; returns the result of each site.
        inputs: names of source nodes.
        roots: names of the source nodes that each site replaces.
        codes: ``(source node of the activation's codes, lowest, highest code)`` of each site.
        reports: each site in words.
    """

    before: Graph
    alone: Graph
    inputs: list[str]
    roots: list[str]
    codes: list[tuple[str, float, float] | None]
    reports: list[SiteReport]


class _Recorder:
    """Rewrites each graph, and as it runs compares each of its sites with the source graph, on the source's values."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.sites: list[SiteCheck] = []
        self.misses: list[MissReport] = []
        self._sites: _Sites | None = None
        self._renaming: Mapping[str, str] = {}

    def on_call(self, renaming: Mapping[str, str]) -> None:
        """A graph is called next, for the modules that ``renaming`` says in place of its own."""
        self._renaming = renaming

    def on_graph(self, graph: Graph) -> None:
        """Rewrite ``graph`` in place; one on which a pass fails stays as it is, and is a miss."""
        self._sites = None
        target = detect_target("cuda" if _on_cuda(graph) else "cpu")
        report = safely(lambda: self._rewrite(graph, target), target, self.options)
        warn_of_failures(report)
        self.misses += report.misses

    def _rewrite(self, graph: Graph, target: Target) -> Report:
        state = run_passes(graph, target, self.options, static_input_indices(graph))
        report = report_on(state)
        if state.rows:
            alone, inputs = cut_out(state, [row.written()[1] for row in state.rows.values()])
            self._sites = _Sites(
                before=state.before,
                alone=alone,
                inputs=inputs,
                roots=[site.root.name for site in state.rows],
                codes=[_saturation_bounds(site) for site in state.rows],
                reports=list(report.sites),
            )
            replace_contents(graph, state.graph)
        return report

    def inner_compile(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile the rewritten graph; each call also runs the source graph op by op, and the sites alone."""
        sites = self._sites
        if sites is None:
            return run_eagerly(gm, example_inputs)
        before, _ = copy_graph(sites.before)
        source = GraphModule(gm, before)
        alone = GraphModule(gm, sites.alone)
        fakes = [node.meta["val"] for node in sites.alone.find_nodes(op="placeholder")]
        with second_compile():
            compiled_alone = compile_graph(alone, fakes, **{**kwargs, "static_input_idxs": ()})
        compiled = compile_graph(gm, example_inputs, **kwargs)

        def run(inputs: list[Any]) -> Any:
            keeper = Keeper(source, {*sites.inputs, *sites.roots, *(codes[0] for codes in sites.codes if codes)})
            with torch._C.DisableTorchFunction():
                with row_scales_on_cpu():
                    keeper.run(*inputs)
                results = compiled_alone([keeper.kept[name] for name in sites.inputs])
            self._compare(sites, keeper.kept, results)
            return compiled(list(inputs))

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _compare(self, sites: _Sites, kept: dict[str, Tensor], results: Sequence[Tensor]) -> None:
        for root, codes, report, result in zip(sites.roots, sites.codes, sites.reports, results, strict=True):
            saturated = 0.0 if codes is None else _saturated(kept[codes[0]], *codes[1:])
            module = renamed(report.module, self._renaming)
            self.sites.append(
                SiteCheck(module, report.kernel, report.numerics, error_of(result, kept[root]), saturated)
            )


def _saturated(codes: Tensor, low: float, high: float) -> float:
    values = codes.float()
    return ((values <= low) | (values >= high)).float().mean().item() if values.numel() else 0.0


def _on_cuda(graph: Graph) -> bool:
    return any(isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_cuda for n in graph.nodes)


def _saturation_bounds(site: Site) -> tuple[str, float, float] | None:
    """``(node of the codes, lowest, highest code)`` of the site's activation; None for a float one."""
    codes = site.codes
    dtype = None if codes is None else codes.meta["val"].dtype
    if codes is None or dtype is None:
        return None
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    # Symmetric codes of int8 stop at -127, which is as saturated as 127.
    low = info.min + 1 if dtype is torch.int8 else info.min
    return codes.name, float(low), float(info.max)


def check(
    model: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> CheckReport:
    """Run ``model`` compiled by fx_quant and its source graph on the same inputs, and compare site by site.

    Args:
        dynamic: as for ``torch.compile``.
        options: as for the backend, Inductor's too.

    Raises:
        UnknownNameError, NoKernelError: as the backend.
        ModelError: the model cannot be run on these inputs.
    """
    parsed, inductors = split_options(options)
    check_inputs(model, args, kwargs)
    recorder = _Recorder(parsed)
    original = innermost(model)
    modules = named_modules_of(original).values()
    with preserve_rng_state(), uncompiled(modules), torch.no_grad(), row_scales_on_cpu(), failures_in_a_line():
        reference = original(*args, **kwargs)
    with counting("compiling and comparing", "graph") as done:

        def on_graph(graph: Graph) -> None:
            recorder.on_graph(graph)
            done()

        capture = run_captured(
            original,
            args,
            kwargs,
            on_graph=on_graph,
            on_call=recorder.on_call,
            inner_compile=recorder.inner_compile,
            dynamic=dynamic,
            inductor_options=inductors,
        )
    outputs = _output_error(capture.output, reference)
    return CheckReport(tuple(recorder.sites), tuple(recorder.misses), outputs, capture.uncaptured)


def _output_error(output: Any, reference: Any) -> Error:
    """The worst error of any floating-point tensor in a model's output."""
    leaves, references = torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(reference)
    return _worst(
        [
            error_of(x, r)
            for x, r in zip(leaves, references, strict=True)
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
    )


def _worst(errors: Sequence[Error]) -> Error:
    return Error(
        max((e.max_rel_err for e in errors), default=0.0),
        min((e.sqnr_db for e in errors), default=math.inf),
        sum(e.new_nan for e in errors),
        sum(e.new_inf for e in errors),
    )
