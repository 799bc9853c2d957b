"""``check``: is the rewritten model still right? Each site against the source graph, in one run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter

from fx_quant.backend import compile_graph
from fx_quant.capture import run_captured, run_eagerly
from fx_quant.compat import copy_graph, replace_contents, static_input_indices
from fx_quant.config import Options
from fx_quant.errors import ToleranceError
from fx_quant.passes.pipeline import Rewriting, holds_codes, report_on, to_canonical, to_kernels
from fx_quant.report import MissReport, SiteReport
from fx_quant.target import detect_target


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
    """One site: its error where it stands in the model, and the share of activation codes at an end of their range."""

    module: str
    kernel: str
    numerics: str
    error: Error
    saturated: float


@dataclass(frozen=True)
class CheckReport:
    """Errors of every site and of the model's outputs; prints as a table.

    A site's error holds what earlier sites brought: one rounding that differs may flip a code of the next quantize.
    """

    sites: tuple[SiteCheck, ...]
    misses: tuple[MissReport, ...]
    outputs: Error

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

    def to_json(self) -> str:
        """The whole report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [
            (s.module or "?", s.kernel, s.numerics, *_cells(s.error), f"{100 * s.saturated:.2f}%") for s in self.sites
        ]
        rows.append(("model output", "", "", *_cells(self.outputs), ""))
        headers = ("module", "kernel", "numerics", "max rel err", "SQNR dB", "new NaN", "new Inf", "saturated")
        text = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
        if self.misses:
            text += f"\n\n{len(self.misses)} quantized matmuls were missed and run as they were; see explain."
        return text


def _cells(error: Error) -> tuple[str, str, str, str]:
    return (f"{error.max_rel_err:.2e}", f"{error.sqnr_db:.1f}", str(error.new_nan), str(error.new_inf))


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
class _Tapped:
    """One graph whose sites are extra outputs."""

    before: Graph
    roots: list[str]
    codes: list[tuple[str, float, float] | None]
    reports: list[SiteReport]
    outputs: int


class _Recorder:
    """Rewrites each graph with its sites as extra outputs, and compares them with the source graph as it runs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.sites: list[SiteCheck] = []
        self.misses: list[MissReport] = []
        self._tapped: _Tapped | None = None

    def on_graph(self, graph: Graph) -> None:
        """Rewrite ``graph`` in place and add each site to its outputs."""
        self._tapped = None
        if not holds_codes(graph):
            return
        target = detect_target("cuda" if _on_cuda(graph) else "cpu")
        state = to_canonical(graph, target, self.options, static_input_indices())
        report = report_on(state, target)
        self.misses += report.misses
        if not state.selections:
            return
        to_kernels(state)
        (output,) = state.graph.find_nodes(op="output")
        outputs = list(output.args[0])
        output.args = ((*outputs, *state.canonical.values()),)
        self._tapped = _Tapped(
            before=state.before,
            roots=[site.root.name for site in state.canonical],
            codes=[_saturation_bounds(state, site) for site in state.canonical],
            reports=list(report.sites),
            outputs=len(outputs),
        )
        replace_contents(graph, state.graph)

    def inner_compile(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile the tapped graph; each call also runs the source graph op by op and compares."""
        tapped = self._tapped
        if tapped is None:
            return run_eagerly(gm, example_inputs)
        compiled = compile_graph(gm, example_inputs, **kwargs)
        before, _ = copy_graph(tapped.before)
        source = GraphModule(gm, before)

        def run(inputs: list[Any]) -> Any:
            interpreter = _Keeper(source, {*tapped.roots, *(c[0] for c in tapped.codes if c)})
            with torch._C.DisableTorchFunction():
                interpreter.run(*inputs)
            results = list(compiled(list(inputs)))
            self._compare(tapped, interpreter.kept, results[tapped.outputs :])
            return results[: tapped.outputs]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _compare(self, tapped: _Tapped, kept: dict[str, Tensor], taps: list[Tensor]) -> None:
        for root, codes, report, tap in zip(tapped.roots, tapped.codes, tapped.reports, taps, strict=True):
            saturated = 0.0
            if codes is not None and kept[codes[0]].numel():
                values = kept[codes[0]].float()
                saturated = ((values <= codes[1]) | (values >= codes[2])).float().mean().item()
            self.sites.append(
                SiteCheck(report.module, report.kernel, report.numerics, error_of(tap, kept[root]), saturated)
            )


def _on_cuda(graph: Graph) -> bool:
    return any(isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_cuda for n in graph.nodes)


def _saturation_bounds(state: Rewriting, site: Any) -> tuple[str, float, float] | None:
    """``(node of the codes, lowest, highest code)`` of the site's activation."""
    codes = site.product.a.node
    dtype = site.problem.scheme.activation.dtype
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    # Symmetric codes of int8 stop at -127, which is as saturated as 127.
    low = info.min + 1 if dtype is torch.int8 else info.min
    return codes.name, float(low), float(info.max)


class _Keeper(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.kept: dict[str, Tensor] = {}
        self._names = names

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run ``n`` and keep its value when asked for."""
        value = super().run_node(n)
        if n.name in self._names:
            self.kept[n.name] = value
        return value


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
        options: as for the backend.

    Raises:
        UnknownNameError, NoKernelError: as the backend.
    """
    recorder = _Recorder(Options.parse(options or {}))
    with torch.no_grad():
        reference = getattr(model, "_orig_mod", model)(*args, **kwargs)
    output, _ = run_captured(
        model, args, kwargs, on_graph=recorder.on_graph, inner_compile=recorder.inner_compile, dynamic=dynamic
    )
    return CheckReport(tuple(recorder.sites), tuple(recorder.misses), _worst(output, reference))


def _worst(output: Any, reference: Any) -> Error:
    leaves = [
        error_of(x, r)
        for x, r in zip(
            torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(reference), strict=True
        )
        if isinstance(x, Tensor) and x.is_floating_point()
    ]
    if not leaves:
        return Error(0.0, math.inf, 0, 0)
    return Error(
        max(e.max_rel_err for e in leaves),
        min(e.sqnr_db for e in leaves),
        sum(e.new_nan for e in leaves),
        sum(e.new_inf for e in leaves),
    )
