"""The classes of kernels, derived from the registry: each kernel's data says which class stands for it."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from fx_quant.errors import must
from fx_quant.kernels.registry import Kernel, kernels
from fx_quant.linear_kernels.interface import MMLinearKernel
from fx_quant.linear_kernels.registry import (
    FP8ScaledMMLinearKernel,
    Int8ScaledMMLinearKernel,
    MPLinearKernel,
    RegistryLinearKernel,
)
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, INT8_DTYPES

KernelT = TypeVar("KernelT", bound=MMLinearKernel)
Family = type[RegistryLinearKernel]

PLATFORMS = ("cpu", "cuda", "rocm")
FAMILIES: tuple[Family, ...] = (FP8ScaledMMLinearKernel, Int8ScaledMMLinearKernel, MPLinearKernel)


def families(kernel: Kernel) -> list[Family]:
    """The families that a kernel's codes belong to; all of them for one that names none."""
    activations = {activation for activation, _ in kernel.requires.codes}
    kinds = zip(FAMILIES, (FLOAT8_DTYPES, INT8_DTYPES, FLOAT_DTYPES), strict=True)
    return [family for family, dtypes in kinds if activations & dtypes or not activations]


def derived_class(kernel: Kernel, family: Family) -> Family:
    """The class of ``family`` that stands for ``kernel``, and for all others that say the same class."""
    name = kernel.class_name(family is MPLinearKernel)
    return _derived(family, name, "" if kernel.linear_kernel else kernel.name)


@functools.cache
def _derived(family: Family, name: str, only: str) -> Family:
    body = {
        "KERNELS": (only,) if only else _Registered(family, name),
        "__module__": __package__,
        "__doc__": f"The kernel {only!r}." if only else f"The kernels of the registry whose class is {name}.",
    }
    return type(name, (family,), body)


class _Registered:
    """``KERNELS`` of the class ``name``: those that say it, best first, of all that are registered by now."""

    def __init__(self, family: Family, name: str) -> None:
        self._family, self._name = family, name

    def __get__(self, instance: object, owner: type) -> tuple[str, ...]:
        return tuple(k.name for k in kernels() if k.linear_kernel == self._name and self._family in families(k))


def derived_classes() -> dict[str, Family]:
    """The classes of all kernels, by name."""
    derived = (derived_class(kernel, family) for kernel in kernels() for family in families(kernel))
    return {cls.__name__: cls for cls in derived}


# vLLM's names of classes for blocks of scales, where they differ from what ours are called.
BLOCK_NAMES = {
    "CutlassFp8BlockScaledMMKernel": "CutlassFP8BlockScaledMMLinearKernel",
    "TritonFp8BlockScaledMMKernel": "TritonFP8BlockScaledMMLinearKernel",
    "AiterFp8BlockScaledMMKernel": "AiterFP8BlockScaledMMLinearKernel",
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel": "FlashInferFP8BlockScaledMMLinearKernel",
    "CPUFp8BlockScaledMMKernel": "CPUFP8ScaledMMLinearKernel",
}
_KINDS = dict(zip(("fp8", "int8", "mp"), FAMILIES, strict=True))
# Those of somebody else, which were registered, by family and platform.
_REGISTERED: dict[tuple[Family, str], list[type[MMLinearKernel]]] = {}


def register_linear_kernel(kernel_class: type[MMLinearKernel], platform: Any, kernel_type: str = "mp") -> None:
    """Have ``possible_kernels`` list ``kernel_class``, after those that are there.

    Args:
        kernel_class: implements ``MMLinearKernel``.
        platform: ``"cpu"``, ``"cuda"`` or ``"rocm"``, or vLLM's own enum of them.
        kernel_type: ``"fp8"``, ``"int8"`` or ``"mp"`` (weight-only).

    Raises:
        ValueError: no such platform or type, or no class of kernels.
    """
    name = str(getattr(platform, "name", platform)).lower()
    must(name in PLATFORMS, lambda: f"platform must be one of {', '.join(PLATFORMS)}, got {platform!r}")
    must(kernel_type in _KINDS, lambda: f"kernel_type must be one of {', '.join(_KINDS)}, got {kernel_type!r}")
    must(
        isinstance(kernel_class, type) and issubclass(kernel_class, MMLinearKernel),
        lambda: f"a registered kernel must be a subclass of MMLinearKernel, got {kernel_class!r}",
    )
    known = _REGISTERED.setdefault((_KINDS[kernel_type], name), [])
    if kernel_class not in known:
        known.append(kernel_class)


def possible_kernels(family: Family) -> dict[str, list[Any]]:
    """The classes of ``family`` by platform, in the order in which ``select`` asks their kernels.

    Beside those that are derived, each class of somebody else that names kernels: it stands for a kernel that says no
    class itself. Those of ``register_linear_kernel`` come last.
    """
    order = {kernel.name: i for i, kernel in enumerate(kernels())}
    theirs = [cls for known in FAMILIES for cls in _descendants(known) if cls.KERNELS and not _is_derived(cls)]
    named = {name for cls in theirs for name in cls.KERNELS}
    classes = [
        derived_class(kernel, family)
        for kernel in kernels()
        if family in families(kernel) and (kernel.linear_kernel or kernel.name not in named)
    ]
    classes += [cls for cls in theirs if issubclass(cls, family) and order.keys() >= set(cls.KERNELS)]
    classes = sorted(dict.fromkeys(classes), key=lambda cls: min(order[name] for name in cls.KERNELS))
    return {
        platform: list(
            dict.fromkeys(
                [*(cls for cls in classes if _runs_on(cls, platform)), *_REGISTERED.get((family, platform), ())]
            )
        )
        for platform in PLATFORMS
    }


def _runs_on(cls: Family, platform: str) -> bool:
    return any(platform in (kernel.requires.platforms or PLATFORMS) for kernel in cls.kernels())


def _is_derived(cls: Family) -> bool:
    return cls.__module__ == __package__


def _descendants(family: type[KernelT]) -> list[type[KernelT]]:
    """Every class below ``family``, once each."""
    classes = [cls for child in family.__subclasses__() for cls in (child, *_descendants(child))]
    return list(dict.fromkeys(classes))
