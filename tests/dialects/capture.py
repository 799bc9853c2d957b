"""One flow in one variant: built, captured with fx_quant's passes, and compared with eager where numbers are wanted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule

import fx_quant
from fx_quant.backend import RewritePass, compile_with
from fx_quant.config import Options
from fx_quant.diagnose.capture import run_eagerly
from fx_quant.report import Report
from fx_quant.scheme import dtype_name
from fx_quant.target import named_target
from tests.dialects.codes import collecting, fraction_changed
from tests.dialects.outcome import Outcome, Verdict, as_expected, failed, judged, reasons_of
from tests.dialects.registry import Flow
from tests.dialects.variants import Variant


def capture(flow: Flow, variant: Variant, *, target: str | None = None, numbers: bool = False) -> Outcome:
    """Build ``flow`` for ``variant`` and say what fx_quant makes of it on ``target`` (None: this machine).

    Dynamo starts afresh, and Inductor's configuration is afterwards as it was.
    """
    started = time.perf_counter()
    torch.manual_seed(0)
    with inductor_config_restored():
        fields = _captured(flow, variant, target, numbers)
    fields["expected"] = as_expected(flow, fields["verdict"])
    return Outcome(flow.name, str(variant), seconds=time.perf_counter() - started, **fields)


def _captured(flow: Flow, variant: Variant, target: str | None, numbers: bool) -> dict[str, Any]:
    """The fields of the outcome, ``expected`` excepted."""
    try:
        model = built(flow, variant)
    except Exception as error:  # noqa: BLE001  (a library may fail in any way)
        return {"verdict": Verdict.UNBUILDABLE, "reasons": (failed(error),)}
    try:
        report = _reported(flow, model, variant, target)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the outcome)
        return _without_us(flow, variant) or {"verdict": Verdict.FAILED, "reasons": (failed(error),)}
    breaks = tuple(dict.fromkeys(str(reason).split("\n")[0] for reason in counters["graph_break"]))
    verdict = judged(flow, report)
    if verdict is Verdict.BROKEN:
        verdict, report = _prepared(flow, model, variant, target, report)
    errors, notes = _errors(flow, model, variant) if numbers and not flow.gpu_only else ({}, ())
    return {
        "verdict": verdict,
        "kernels": tuple(site.kernel for site in report.sites),
        "schemes": tuple(site.scheme for site in report.sites),
        "reasons": reasons_of(report),
        "graph_breaks": breaks,
        "errors": errors,
        "notes": notes,
    }


def _prepared(
    flow: Flow, model: nn.Module, variant: Variant, target: str | None, broken: Report
) -> tuple[Verdict, Report]:
    """What becomes of ``model`` once ``fx_quant.prepare_`` has swapped what breaks its graph."""
    prepared = fx_quant.prepare_(model)
    if not prepared.swapped:
        return Verdict.BROKEN, broken
    report = _reported(flow, model, variant, target)
    verdict = judged(flow, report)
    return (Verdict.PREPARED if verdict in (Verdict.REWRITTEN, Verdict.RECOGNISED) else verdict), report


def _without_us(flow: Flow, variant: Variant) -> dict[str, Any] | None:
    """What to say of a flow that torch.compile fails on without our passes too; None where it does not."""
    try:
        # Freezing is Inductor's own, so there is no telling without it.
        inner = None if variant.mode == "freezing" else run_eagerly
        compiled(flow, built(flow, variant), variant, _unchanged, inner)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the outcome)
        return {"verdict": Verdict.UNCOMPILABLE, "reasons": (failed(error),)}
    return None


def built(flow: Flow, variant: Variant) -> nn.Module:
    """The module of ``flow``; in ``grad`` mode its plain parameters require a gradient."""
    model = flow.build(variant.dtype, variant.bias)
    if variant.mode == "grad":
        for parameter in model.parameters():
            # The codes inside a tensor subclass have no gradient.
            if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1:
                parameter.requires_grad_(True)
    return model


@contextlib.contextmanager
def inductor_config_restored() -> Iterator[None]:
    """Libraries change Inductor's process-wide options and the float32 matmul precision; both are put back."""
    config = torch._inductor.config
    saved, precision = config.get_config_copy(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        for name, value in config.get_config_copy().items():
            if name in saved and saved[name] is not value and saved[name] != value:
                setattr(config, name, saved[name])
        torch.set_float32_matmul_precision(precision)


def fresh() -> None:
    """Forget what Dynamo compiled and counted."""
    torch._dynamo.reset()
    counters.clear()


def _unchanged(graph: Graph) -> None:
    """A pass that rewrites nothing."""


def _reported(flow: Flow, model: nn.Module, variant: Variant, target: str | None) -> Report:
    """What ``explain`` reports; where it cannot run as the variant does, what the passes report in a compile."""
    if variant.mode in ("grad", "freezing") or flow.gpu_only:
        return passes_report(flow, model, variant, target)
    fresh()
    args, kwargs = flow.inputs(variant)
    with variant.context():
        return fx_quant.explain(model, *args, target=target, **kwargs)


def passes_report(flow: Flow, model: nn.Module, variant: Variant, target: str | None) -> Report:
    """What our passes report when ``model`` is compiled; the result runs where this machine can run it."""
    reports: list[Report] = []
    machine = None if target is None else named_target(target)
    rewrite = RewritePass(Options(), machine, reports.append)
    elsewhere = flow.gpu_only or target is not None
    inner = _look_only if elsewhere else None if variant.mode == "freezing" else run_eagerly
    with contextlib.suppress(LookedAt):
        compiled(flow, model, variant, rewrite, inner)
    merged = Report(str(target), (), (), graphs=0, graph_breaks=sum(counters["graph_break"].values()))
    for report in reports:
        merged = merged.merged(report)
    return merged


class LookedAt(Exception):
    """A graph that another machine would run has been looked at."""


def _look_only(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """An ``inner_compile`` for a graph that only another machine can run."""

    def run(inputs: list[Any]) -> Any:
        raise LookedAt

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def compiled(
    flow: Flow,
    model: nn.Module,
    variant: Variant,
    rewrite: Callable[[Graph], None],
    inner: Callable[..., Any] | None,
) -> Any:
    """The output of ``model`` compiled with ``rewrite`` on its joint graphs.

    Args:
        inner: what makes the rewritten graph callable; None is Inductor itself.
    """
    fresh()
    options: dict[str, Any] = {"force_disable_caches": True, "fallback_random": True}
    arguments = {} if inner is None else {"inner_compile": inner}

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_with(gm, example_inputs, rewrite, None, options, **arguments)

    args, kwargs = flow.inputs(variant)
    with variant.context(), _freezing(variant):
        return torch.compile(model, backend=backend)(*args, **kwargs)


def _freezing(variant: Variant) -> contextlib.AbstractContextManager[Any]:
    """Inductor's option as a user sets it: Dynamo asks it too, before the backend has its own options."""
    return torch._inductor.config.patch(freezing=variant.mode == "freezing")


def _errors(flow: Flow, model: nn.Module, variant: Variant) -> tuple[dict[str, float], tuple[str, ...]]:
    """Codes changed, errors against eager of the rewritten graph op by op, of fx_quant and of Inductor; what failed."""
    args, kwargs = flow.inputs(variant)
    with variant.context():
        eager = tensor_of(model(*args, **kwargs))
    ours = RewritePass(Options())
    before: list[Tensor] = []
    after: list[Tensor] = []
    runs: dict[str, Callable[[], Any]] = {
        "source": lambda: compiled(flow, model, variant, _unchanged, collecting(before)),
        "rewritten": lambda: compiled(flow, model, variant, ours, collecting(after)),
        "fx_quant": lambda: _by_name("fx_quant", flow, model, variant),
        "inductor": lambda: _by_name("inductor", flow, model, variant),
    }
    errors: dict[str, float] = {}
    notes: list[str] = []
    for name, run in runs.items():
        try:
            result = tensor_of(run())
            errors[name] = relative_error(result, eager)
            if result.dtype is not eager.dtype or result.shape != eager.shape:
                notes.append(f"{name} returns {_kind(result)} where eager returns {_kind(eager)}")
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the note)
            notes.append(f"{name} fails: {failed(error)}")
    changed = fraction_changed(before, after)
    if changed is not None:
        errors["codes"] = changed
    return errors, tuple(notes)


def _by_name(backend: str, flow: Flow, model: nn.Module, variant: Variant) -> Any:
    fresh()
    args, kwargs = flow.inputs(variant)
    with variant.context(), _freezing(variant):
        return torch.compile(model, backend=backend)(*args, **kwargs)


def _kind(x: Tensor) -> str:
    return f"{dtype_name(x.dtype)} {list(x.shape)}"


def tensor_of(output: Any) -> Tensor:
    """The first tensor of a module's output."""
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)).detach()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``max |actual - expected| / max |expected|`` in float64; infinite where one of them is not finite and differs.

    A result of another shape or dtype is an infinite error too.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    a, b = actual.double(), expected.double()
    if not bool(((a == b) | (a.isfinite() & b.isfinite()) | (a.isnan() & b.isnan())).all()):
        return float("inf")
    difference = torch.where(a == b, 0.0, a - b).nan_to_num()
    return float(difference.abs().max() / b[b.isfinite()].abs().max().clamp(min=1e-30)) if b.isfinite().any() else 0.0
