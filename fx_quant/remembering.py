"""Results that are computed of constant tensors once, and again only after one of them was written to.

A repeated call compares addresses, identities and versions. Inference tensors have no version and are taken to be
constant; writes through ``tensor.data`` do not raise it: call ``fx_quant.clear_packed_weights()`` after either. A
result is dropped when the storage of a tensor that it was computed of dies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True, slots=True)
class _Mark:
    """How one tensor looked: the object itself, or, where that was a passing view, what it viewed."""

    tensor: weakref.ref
    version: int | None
    storage: StorageWeakRef
    death: weakref.ref
    view: tuple


@dataclass(frozen=True)
class _Group:
    """One call site: how each of its tensors looked, and what was computed of them."""

    marks: tuple[_Mark, ...]
    results: tuple[Tensor, ...]


_groups: dict[tuple, _Group] = {}


def remembered(tensors: Sequence[Tensor], what: tuple, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """``compute()``, which depends on ``tensors`` and ``what`` alone. The results are shared: do not write to them."""
    key = (*[tensor.data_ptr() for tensor in tensors], *what)
    group = _groups.get(key)
    if group is not None and _is_current(group, tensors):
        return list(group.results)
    results = tuple(compute())
    _groups[key] = _Group(tuple(_mark(tensor, key) for tensor in tensors), results)
    return list(results)


def forget_all() -> None:
    """Forget every result."""
    _groups.clear()


def version_of(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written to; None for an inference tensor."""
    return None if tensor.is_inference() else tensor._version


def view_of(tensor: Tensor) -> tuple:
    """What a tensor shows of the memory at its address."""
    return tensor.shape, tensor.stride(), tensor.dtype


def drop_at_death(storage: torch.UntypedStorage, entries: dict, key: tuple) -> weakref.ref:
    """A reference to ``storage`` that drops ``entries[key]`` when it dies; keep it as long as the entry."""
    return weakref.ref(storage, lambda _: entries.pop(key, None))


def _is_current(group: _Group, tensors: Sequence[Tensor]) -> bool:
    # Runs at each call of a compiled graph.
    for tensor, mark in zip(tensors, group.marks, strict=True):
        if mark.tensor() is tensor:
            if mark.version is not None and mark.version != tensor._version:
                return False
        elif mark.storage.expired() or mark.version != version_of(tensor) or mark.view != view_of(tensor):
            return False
    return True


def _mark(tensor: Tensor, key: tuple) -> _Mark:
    storage = tensor.untyped_storage()
    return _Mark(
        weakref.ref(tensor),
        version_of(tensor),
        StorageWeakRef(storage),
        drop_at_death(storage, _groups, key),
        view_of(tensor),
    )
