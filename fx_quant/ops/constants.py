"""Results that are computed of constant tensors once, and again after one of them was written to.

A result is a copy, and must not outlive what it was made of. Each call compares the tensors' memory, view and version,
and looks at some of their bytes (``fingerprint``), as many writes raise no version. What PyTorch counts is seen
exactly; the rest at once where a tensor was replaced, and within some calls where a part of it was. A result is dropped
when the storage of a tensor that it was computed of dies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fx_quant.ops.fingerprint import Fingerprint, Watches, fingerprint

_has_died = torch.UntypedStorage._expired


@dataclass(frozen=True, slots=True)
class Mark:
    """How one tensor looked.

    Args:
        versions: how often it was written to, None for an inference tensor, for each tensor that counted it (by
            ``id``: ``torch.utils.swap_tensors`` refuses tensors with weak references). Tied weights count apart.
        storage, death: its memory, and what drops the group when that is freed.
        shape, stride, dtype: what it shows of the memory.
        fingerprint: of its bytes; None where they are not looked at.
    """

    versions: dict[int, int | None]
    storage: StorageWeakRef
    death: weakref.ref
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: Fingerprint | None

    def same_content(self, other: Mark) -> bool:
        """Whether the same memory, under the same view, holds what it held: by its bytes, or else by its version."""
        if self.fingerprint is None or other.fingerprint is None:
            return not self.versions.items().isdisjoint(other.versions.items())
        return self.fingerprint.same_bytes(other.fingerprint)


@dataclass(frozen=True)
class _Group:
    """One call site: where its tensors are, how they looked, in full and at a glance, their bytes, and the results."""

    place: tuple
    marks: tuple[Mark, ...]
    looks: list[tuple]
    watches: Watches
    results: tuple[Tensor, ...]


# By the tensors' addresses, which a call has at hand.
_groups: dict[tuple, _Group] = {}
# By storages and views: the key in ``_groups``. A storage may be freed and filled again elsewhere, as FSDP does.
_keys: dict[tuple, tuple] = {}


def remembered(
    tensors: Sequence[Tensor], recipe: tuple, compute: Callable[[Sequence[Mark]], Sequence[Tensor]]
) -> list[Tensor]:
    """``compute(marks)``, which depends on ``tensors`` and ``recipe`` alone.

    The results are shared: do not write to them.
    """
    key = (*[tensor.data_ptr() for tensor in tensors], *recipe)
    group = _groups.get(key)
    if group is not None and _is_current(group, tensors):
        return list(group.results)
    # Marked first, so that what is written while it computes is seen in the next call.
    marks = tuple(_mark(tensor, key) for tensor in tensors)
    results = tuple(compute(marks))
    looked_at = [
        (tensor.data_ptr(), mark.fingerprint)
        for tensor, mark in zip(tensors, marks, strict=True)
        if mark.fingerprint is not None
    ]
    looks = [(*version, mark.dtype, mark.stride, mark.shape) for mark in marks for version in mark.versions.items()]
    place = (
        *[(mark.storage.cdata, t.storage_offset(), *view_of(t)) for mark, t in zip(marks, tensors, strict=True)],
        *recipe,
    )
    _drop(_keys.get(place, key))
    _keys[place] = key
    _groups[key] = _Group(place, marks, looks, Watches(looked_at), results)
    return list(results)


def forget_all() -> None:
    """Forget every result."""
    _groups.clear()
    _keys.clear()


def forget(storages: Collection[int]) -> None:
    """Forget every result that was computed of tensors in ``storages``, given by ``_cdata``."""
    for key, group in list(_groups.items()):
        if any(mark.storage.cdata in storages for mark in group.marks):
            _drop(key)


def _drop(key: tuple) -> None:
    group = _groups.pop(key, None)
    if group is not None and _keys.get(group.place) == key:
        del _keys[group.place]


def view_of(tensor: Tensor) -> tuple:
    """What a tensor shows of the memory at its address."""
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_current(group: _Group, tensors: Sequence[Tensor]) -> bool:
    # Runs at each call of a compiled graph, so what is usual is asked of all tensors first.
    return (_are_as_usual(group.looks, tensors) or all(map(_is_as_marked, tensors, group.marks))) and (
        not group.watches.changed()
    )


def _are_as_usual(looks: Sequence[tuple], tensors: Sequence[Tensor]) -> bool:
    try:
        for tensor, (counter, version, dtype, stride, shape) in zip(tensors, looks, strict=True):
            if (
                id(tensor) != counter
                or tensor._version != version
                or tensor.dtype is not dtype
                or tensor.stride() != stride
                or tensor.shape != shape
            ):
                return False
    except RuntimeError:  # an inference tensor has no version
        return False
    return True


_COUNTERS = 8


def _is_as_marked(tensor: Tensor, mark: Mark) -> bool:
    """Whether ``tensor`` is what was marked, a passing view of it, or another tensor of the same memory and bytes."""
    if _has_died(mark.storage.cdata) or view_of(tensor) != (mark.shape, mark.stride, mark.dtype):
        return False
    counter, version = _counter(tensor), _version(tensor)
    if counter in mark.versions:
        return mark.versions[counter] == version
    bytes_now = fingerprint(tensor)
    if bytes_now is None or mark.fingerprint is None or not bytes_now.same_bytes(mark.fingerprint):
        return False
    if len(mark.versions) >= _COUNTERS:
        mark.versions.clear()
    mark.versions[counter] = version
    return True


def _version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written to; None for an inference tensor."""
    try:
        return tensor._version
    except RuntimeError:
        return None


def _counter(tensor: Tensor) -> int:
    """Which tensor's version ``tensor`` shows, by ``id``: views share that of their base."""
    base = tensor._base if not tensor.is_inference() and tensor._is_view() else None
    return id(tensor if base is None else base)


def _mark(tensor: Tensor, key: tuple) -> Mark:
    storage = tensor.untyped_storage()
    return Mark(
        {_counter(tensor): _version(tensor)},
        StorageWeakRef(storage),
        weakref.ref(storage, lambda _: _drop(key)),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        fingerprint(tensor),
    )
