"""Quantized modules, whatever library made them: what a report on graphs alone would not know of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from types import CodeType, FunctionType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant.loading.adapters.base import adapter_of
from fx_quant.loading.module_names import tensors_of
from fx_quant.report import BreakReport, FloatReport, Report, UnseenReport

# Several codes to an integer, as GPTQ, AWQ and compressed-tensors store them; other integers are indices.
_PACKED = ("qweight", "packed")
# Bytes in two dims or more that are no codes; NNCF's hooks hold zero points beside a weight that is its module's.
_NO_CODES = ("mask", "zero_point")


def holds_codes(module: nn.Module) -> bool:
    """Whether ``module`` itself holds a matrix of codes, to multiply with."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    return adapter_of(module) is not None or any(_is_codes(name, value) for name, value in tensors_of(module))


def _is_codes(name: str, value: Tensor) -> bool:
    if value.dim() < 2 or any(word in name for word in _NO_CODES):
        return False
    if is_traceable_wrapper_subclass(value):
        return any(_is_codes(each, getattr(value, each)) for each in value.__tensor_flatten__()[0])
    if value.dtype is torch.int32:
        return any(word in name for word in _PACKED)
    return value.dtype.itemsize == 1 and value.dtype is not torch.bool


def unseen_modules(
    modules: Mapping[str, nn.Module],
    seen: Set[str],
    report: Report,
    hiding: Mapping[nn.Module, tuple[str, str]],
) -> tuple[UnseenReport, ...]:
    """The ``modules`` that hold codes, or whose library hides them, and of which ``report`` tells nothing.

    Args:
        seen: names of the modules of which a graph took a tensor.
        hiding: modules into which a compiler cannot see, each with its library's package, and with what to do.
    """
    told = {row.module for row in (*report.sites, *report.misses, *report.recognised)}
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    return tuple(
        UnseenReport(
            each[0],
            type(module).__name__,
            not seen.isdisjoint(each),
            _reason(module, report.breaks, hiding.get(module)),
        )
        for module, each in names.items()
        if module in hiding or holds_codes(module)
        if not any(_tells_of(path, name, name in seen) for path in told for name in each)
    )


def _reason(module: nn.Module, breaks: Sequence[BreakReport], library: tuple[str, str] | None) -> str:
    """Where the graph broke in the code of ``module``, and what is said of its library."""
    package, says = library or ("", "")
    inside = [broken for broken in breaks if _is_code_of(module, package, broken.frames)]
    if not inside:
        return says
    first = max(inside, key=lambda broken: broken.count)
    where = "/".join(first.source.split("/")[-2:])
    more = len({broken.source for broken in inside}) - 1
    others = f" and {more} more" if more else ""
    return "; ".join(filter(None, (f"the graph breaks at {where}{others}: {first.reason.rstrip('.')}", says)))


def _is_code_of(module: nn.Module, package: str, frames: Sequence[str]) -> bool:
    """Whether one of ``frames`` is in a function of the class of ``module``, or in the ``package`` of its library."""
    folder = f"/{package.partition('.')[0]}/" if package else None
    for frame in frames:
        file, _, line = frame.rpartition(":")
        if folder is not None and folder in file:
            return True
        if any(code.co_filename == file and _has_line(code, int(line)) for code in _code_of(type(module))):
            return True
    return False


def _code_of(kind: type) -> Iterator[CodeType]:
    for cls in kind.__mro__:
        if not cls.__module__.startswith("torch."):
            yield from (each.__code__ for each in vars(cls).values() if isinstance(each, FunctionType))


def _has_line(code: CodeType, line: int) -> bool:
    return any(each == line for _, _, each in code.co_lines())


def float_linears(modules: Mapping[str, nn.Module], report: Report) -> tuple[FloatReport, ...]:
    """The linears among ``modules`` whose weight is floating point, and of which ``report`` tells nothing."""
    told = {row.module for row in (*report.sites, *report.misses, *report.recognised, *report.unseen)}
    linears: dict[nn.Module, str] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name not in told and not holds_codes(module):
            linears.setdefault(module, name)
    return tuple(
        FloatReport(name, type(module).__name__, module.weight.numel() * module.weight.dtype.itemsize)
        for module, name in linears.items()
        if isinstance(module.weight, Tensor) and module.weight.is_floating_point()
    )


def _tells_of(path: str, name: str, in_graph: bool) -> bool:
    """Whether what is told of the module ``path`` is of what ``name`` holds.

    It is where it happens in ``name`` or within it; or in a parent, which reads its child's tensors itself.
    """
    return path == name or _is_within(path, name) or (in_graph and _is_within(name, path))


def _is_within(name: str, parent: str) -> bool:
    return not parent or name.startswith(f"{parent}.")
