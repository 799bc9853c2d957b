"""How many quantized linears a call of a model runs, found without fx_quant: by classes, and by tensors that hold codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant import QuantizedLinear, Report

# What multiplies a weight where its subclass is given to it.
_MATMULS = {
    getattr(namespace, name)
    for namespace, names in (
        (torch.nn.functional, ("linear", "bilinear", "conv1d", "conv2d")),
        (torch, ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")),
        (Tensor, ("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__")),
    )
    for name in names
}


def quantized_calls(model: nn.Module, call: Callable[[], Any]) -> tuple[Counter[str], Any]:
    """How often ``call`` multiplies with each quantized weight of ``model``, by the module's name; and its result.

    A module that is called again with the same values counts once: a compiler computes that once.
    """
    calls: dict[str, list[Tensor]] = {}
    weights: dict[int, str] = {}
    handles = []

    def note(name: str, args: Iterable[Any]) -> None:
        x = next(each for each in args if isinstance(each, Tensor) and id(each) not in weights)
        known = calls.setdefault(name, [])
        if not any(each.dtype is x.dtype and torch.equal(each, x) for each in known):
            known.append(x.clone())

    for name, module in model.named_modules():
        subclasses = [each for each in module.parameters(recurse=False) if _holds_codes(each)]
        for each in subclasses:
            weights.setdefault(id(each), name)
        # One of compressed-tensors keeps plain tensors, and a layer of ours its own.
        if not subclasses and (isinstance(module, QuantizedLinear) or getattr(module, "quantization_status", None)):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, args)))
    try:
        with torch.no_grad(), _Watching(weights, note):
            result = call()
    finally:
        for handle in handles:
            handle.remove()
    return Counter({name: len(known) for name, known in calls.items()}), result


class _Watching(TorchFunctionMode):
    """Calls ``note`` with the name of each of ``weights`` that is multiplied with, by its id, and what it is given with."""

    def __init__(self, weights: dict[int, str], note: Callable[[str, Iterable[Any]], None]) -> None:
        super().__init__()
        self._weights, self._note = weights, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MATMULS:
            given = (*args, *kwargs.values())
            for name in [self._weights[id(each)] for each in given if id(each) in self._weights]:
                self._note(name, given)
        return func(*args, **kwargs)


def _holds_codes(value: Tensor) -> bool:
    if not is_traceable_wrapper_subclass(value):
        return False
    return any(_is_codes(getattr(value, each)) for each in value.__tensor_flatten__()[0])


def _is_codes(value: Tensor) -> bool:
    return _holds_codes(value) or (value.dtype.itemsize == 1 and value.dtype is not torch.bool)


def untold(counts: Counter[str], report: Report) -> tuple[int, int]:
    """``(outside, silent)``: the calls of which no row of ``report`` tells, where it says that a module is in none, or not.

    A row tells of one call of the module that it names or stands in; one that names a parent, or nothing, of one within.
    """
    rows = Counter(row.module for row in (*report.sites, *report.recognised, *report.misses))
    lacking: Counter[str] = Counter()
    for name, calls in counts.items():
        of_it = [module for module in rows if module == name or module.startswith(f"{name}.")]
        lacking[name] = max(0, calls - sum(rows.pop(module) for module in of_it))
    for module in rows:
        for name in _within(lacking, module):
            taken = min(rows[module], lacking[name])
            lacking[name] -= taken
            rows[module] -= taken
    outside = sum(lacking.pop(row.module, 0) for row in report.unseen)
    return outside, sum(lacking.values())


def _within(names: Counter[str], module: str) -> Iterator[str]:
    return (name for name in names if not module or name.startswith(f"{module}."))
