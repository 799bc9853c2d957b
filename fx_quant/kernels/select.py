"""Which kernel runs a problem: one function, whose losers' reasons are kept."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from fx_quant.errors import NoKernelError, unknown_name
from fx_quant.kernels.context import GRAPH, CompileContext, Mode
from fx_quant.kernels.padding import Padding, plan_padding, unmet_by_context
from fx_quant.kernels.registry import Kernel, kernel, kernels
from fx_quant.problem import Problem
from fx_quant.reasons import DISABLED, Unmet, for_platform, lacks_only_compiler
from fx_quant.target import Target

DISABLED_VARIABLE = "FX_QUANT_DISABLED_KERNELS"
# The attention of one query beside quantized matmuls, which is switched off like a kernel.
CPU_ATTENTION = "cpu_attention"


@dataclass(frozen=True)
class Verdict:
    """What selection found of one kernel: it can run where no requirement is unmet."""

    kernel: str
    unmet: tuple[Unmet, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """What stands against the kernel, in words."""
        return tuple(map(str, self.unmet))

    @property
    def can_run(self) -> bool:
        """Whether nothing stands against the kernel."""
        return not self.unmet

    @property
    def for_platform(self) -> bool:
        """Whether the kernel is for the target's platform at all."""
        return for_platform(self.unmet)


@dataclass(frozen=True)
class Selection:
    """A kernel and its padding plan for a problem on a target, with the verdict of every candidate."""

    problem: Problem
    target: Target
    kernel: Kernel
    padding: Padding
    verdicts: tuple[Verdict, ...]
    context: CompileContext = GRAPH

    def overload(self) -> torch._ops.OpOverload:
        """The op that is called."""
        return self.kernel.overload(self.context.deterministic)

    def padding_in(self, mode: Mode) -> Padding:
        """The plan of the kernel in calls of ``mode``."""
        if mode is self.context.mode:
            return self.padding
        return plan_padding(self.problem, self.kernel, replace(self.context, mode=mode))

    @property
    def without_compiler(self) -> tuple[str, ...]:
        """Kernels that would have been chosen before this one, had the target a C++ compiler."""
        names = [verdict.kernel for verdict in self.verdicts]
        better = self.verdicts[: names.index(self.kernel.name)]
        return tuple(verdict.kernel for verdict in better if lacks_only_compiler(verdict.unmet))


_CLASS_NAMES: set[str] = set()


def know_class(name: str) -> None:
    """Let the class ``name``, which stands for no registered kernel, be named where kernels are disabled."""
    _CLASS_NAMES.add(name)


def disabled_kernels() -> frozenset[str]:
    """Kernels, providers and kernel classes that ``FX_QUANT_DISABLED_KERNELS`` (comma-separated) switches off.

    Raises:
        UnknownNameError: the variable names none of these.
    """
    names = frozenset(name.strip() for name in os.environ.get(DISABLED_VARIABLE, "").split(",") if name.strip())
    check_kernel_names(names)
    return names


def check_kernel_names(names: Collection[str]) -> None:
    """Raise ``UnknownNameError`` unless each name is a kernel, a provider or a class of ``fx_quant.linear_kernels``.

    A class of somebody else is known once it is defined.
    """
    if not names:
        return
    known = _CLASS_NAMES.union({CPU_ATTENTION}, *map(_names, kernels()))
    for name in sorted(names):
        if name not in known:
            raise unknown_name("kernel or provider", name, known)


def _names(kernel: Kernel) -> frozenset[str]:
    """All names by which ``kernel`` can be switched off."""
    return kernel.class_names | {kernel.name, kernel.provider}


def verdicts(
    problem: Problem,
    target: Target,
    disabled: Collection[str] = (),
    context: CompileContext = GRAPH,
    among: Collection[str] | None = None,
) -> tuple[Verdict, ...]:
    """What stands against each kernel running ``problem`` on ``target``, the best kernel first.

    Args:
        disabled, context: as for ``select``.
        among: names of the kernels that are asked; None for all.

    Raises:
        UnknownNameError: a name is not known.
    """
    check_kernel_names(disabled)
    off = frozenset(disabled) | disabled_kernels()
    asked = (candidate for candidate in kernels() if among is None or candidate.name in among)
    return tuple(Verdict(candidate.name, _unmet(candidate, problem, target, off, context)) for candidate in asked)


def select(
    problem: Problem,
    target: Target,
    *,
    force_kernel: str | None = None,
    disabled: Collection[str] = (),
    context: CompileContext = GRAPH,
) -> Selection:
    """The best kernel that can run ``problem`` on ``target``.

    Args:
        force_kernel: use this kernel or raise.
        disabled: names of kernels, providers or kernel classes not to use, beside those of
            ``FX_QUANT_DISABLED_KERNELS``.
        context: how it will be called, what may be padded, and whether a row's bits may depend on other rows.

    Raises:
        NoKernelError: no kernel can run it, or the forced one cannot; the message holds every reason.
        UnknownNameError: a kernel name is not known.
    """
    judged = verdicts(problem, target, disabled, context)
    if force_kernel is not None:
        kernel(force_kernel)  # an unknown name raises here
        reasons = next(v.reasons for v in judged if v.kernel == force_kernel)
        if reasons:
            raise NoKernelError(
                f"forced kernel {force_kernel!r} cannot run {problem} on {target}: {'; '.join(reasons)}. "
                "Remove force_kernel to let fx_quant choose."
            )
    for verdict in judged:
        if verdict.can_run and force_kernel in (None, verdict.kernel):
            chosen = kernel(verdict.kernel)
            return Selection(problem, target, chosen, plan_padding(problem, chosen, context), judged, context)
    near = [v for v in judged if v.for_platform]
    losers = "; ".join(f"{v.kernel}: {', '.join(v.reasons)}" for v in near) or f"none is for {target.platform}"
    raise NoKernelError(f"no kernel can run {problem} on {target}: {losers}", judged)


def _unmet(
    candidate: Kernel, problem: Problem, target: Target, off: frozenset[str], context: CompileContext
) -> tuple[Unmet, ...]:
    disabled = [DISABLED] if off and off & _names(candidate) else []
    required = candidate.requires.unmet(problem, target)
    return (*disabled, *required, *unmet_by_context(problem, candidate, context))
