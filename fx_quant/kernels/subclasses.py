"""Writes to tensor subclasses, which the plain tensors inside them do not count.

A compiled graph is given the inner tensors of a subclass (torchao's, DTensor). What writes to such a parameter, its
``copy_`` or ``load_state_dict``, raises the version of the outer tensor only; so that is watched where it is at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant.kernels.packed_weights import forget_storages


def with_outer_versions(compiled: Any, example_inputs: Sequence[Any]) -> Any:
    """``compiled``, which first forgets what was computed of a tensor subclass that was written to since its last call.

    Args:
        compiled: a compiled graph, called with tensors like ``example_inputs``; what is no function stays as it is.
    """
    positions = [i for i, given in enumerate(example_inputs) if is_traceable_wrapper_subclass(given)]
    if not positions or not callable(compiled):
        return compiled
    seen: list[tuple[int, int]] = []

    @functools.wraps(compiled)
    def run(*inputs: Any) -> Any:
        # Some graphs take one list of their inputs.
        given = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], list) else inputs
        versions = [(id(given[i]), _version(given[i])) for i in positions]
        if versions != seen:
            forget_storages({storage for i in positions for storage in _written(given[i])})
            seen[:] = versions
        return compiled(*inputs)

    return run


# By the storage of an inner tensor: the version of the tensor around it, as the graphs of a process last saw it.
_seen: dict[int, tuple[StorageWeakRef, int]] = {}


def _written(outer: Tensor) -> Iterator[int]:
    """The storages inside ``outer`` that were seen with another version of it."""
    version = _version(outer)
    for inner in inner_tensors(outer):
        storage = inner.untyped_storage()
        known = _seen.get(storage._cdata)
        if known is not None and not known[0].expired() and known[1] != version:
            yield storage._cdata
        _seen[storage._cdata] = StorageWeakRef(storage), version


def inner_tensors(part: object) -> Iterator[Tensor]:
    """The plain tensors inside ``part``, at any depth: itself where it is one, none where it is something else."""
    if is_traceable_wrapper_subclass(part):
        # DTensor's parts hold its mesh too.
        for name in part.__tensor_flatten__()[0]:
            yield from inner_tensors(getattr(part, name))
    elif isinstance(part, Tensor):
        yield part


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
