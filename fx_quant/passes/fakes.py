"""Fake values of emitted calls, worked out once for operands that look alike: the layers of a model repeat a few.

A dispatch through a fake mode takes a tenth of a millisecond or more, ten times as long as making its result again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from fx_quant.passes.merge import constant_key


@dataclass(frozen=True)
class Strided:
    """What a strided tensor of known sizes looks like.

    Args:
        alias: which of the tensors that the call was given has its memory; None for memory of its own.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    alias: int | None = None


class FakeCalls:
    """Calls of pure ops on the fake tensors of one mode.

    Args:
        mode: the mode of every tensor that the ops are given.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[tuple, tuple[type, list[Strided]] | Strided] = {}

    def __call__(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``target(*args, **kwargs)``, a new fake value. Only what has no symbolic size is remembered."""
        if target is operator.getitem:
            return operator.getitem(*args)
        tensors: list[Tensor] = []
        looks = _looks((args, kwargs), tensors)
        key = None if None in looks else (target, *looks)
        known = None if key is None else self._known.get(key)
        if isinstance(known, tuple):
            kind, parts = known
            return kind(self._made(look, tensors) for look in parts)
        if known is not None:
            return self._made(known, tensors)
        # Without it some ops take no symbolic size, unless what compiles the graph has set it.
        with self._mode, torch.no_grad(), enable_python_dispatcher():
            result = target(*args, **kwargs)
        look = _look(result, tensors)
        if key is not None and look is not None:
            self._known[key] = look
        return result

    def _made(self, look: Strided, tensors: Sequence[Tensor]) -> FakeTensor:
        with in_kernel_invocation_manager(self._mode), torch.no_grad():
            meta = torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")
            if look.alias is not None:
                meta.set_(tensors[look.alias].untyped_storage(), look.offset, look.shape, look.stride)
        return FakeTensor(self._mode, meta, look.device)


def _looks(argument: object, tensors: list[Tensor]) -> list[object]:
    """What ``argument`` looks like, flat and hashable, None for what has no look; its tensors go to ``tensors``."""
    if isinstance(argument, Tensor):
        tensors.append(argument)
        return [_strided(argument)]
    if isinstance(argument, (list, tuple)):
        return [len(argument), *(look for part in argument for look in _looks(part, tensors))]
    if isinstance(argument, dict):
        return [len(argument), *(look for item in argument.items() for look in _looks(item, tensors))]
    return [constant_key(argument)]


def _look(result: Any, tensors: Sequence[Tensor]) -> tuple[type, list[Strided]] | Strided | None:
    """How to make ``result`` again, a tensor or a list or tuple of tensors; None where that would not be the same."""
    if type(result) not in (list, tuple):
        return _tensor_look(result, tensors)
    looks = [look for part in result if (look := _tensor_look(part, tensors)) is not None]
    apart = len({part.untyped_storage()._cdata for part in result if isinstance(part, Tensor)}) == len(result)
    return (type(result), looks) if len(looks) == len(result) and apart else None


def _tensor_look(result: object, tensors: Sequence[Tensor]) -> Strided | None:
    if not isinstance(result, Tensor):
        return None
    look = _strided(result)
    if look is None:
        return None
    memory = result.untyped_storage()._cdata
    for i, tensor in enumerate(tensors):
        if tensor is result:
            return None
        if tensor.untyped_storage()._cdata == memory:
            return Strided(look.shape, look.stride, look.offset, look.dtype, look.device, alias=i)
    return look if look.offset == 0 else None


def _strided(value: Tensor) -> Strided | None:
    """What ``value`` looks like; None for a tensor that is not strided or has a symbolic size."""
    if type(value) is not FakeTensor or value.layout is not torch.strided or value.requires_grad:
        return None
    if value.constant is not None:
        return None
    offset = value.storage_offset()
    if not isinstance(offset, int) or not all(type(size) is int for size in (*value.shape, *value.stride())):
        return None
    return Strided(tuple(value.shape), value.stride(), offset, value.dtype, value.device)
