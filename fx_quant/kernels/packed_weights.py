"""Weights that were packed, each once: the ops that pack and unpack, and what is kept.

``fx_quant::prepack`` is one call for all weights of a graph. Its body keeps what it packed:

- a *group* is one call site's list of weights, see ``ops/constants.py``: a repeated call hands out the same tensors,
  unless a weight was written to;
- a *packed weight* is kept by storage, offset, shape and strides, so tied weights and views are packed once.

What was packed is dropped when its weight's storage dies, or by ``clear_packed_weights()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_quant.kernels.layouts import check_packed, check_weight, code_dtype, pack_weight, packed_layout, unpack_weight
from fx_quant.ops import KEEPING_TAGS, MATMUL_TAGS, register
from fx_quant.ops.constants import Mark, forget, forget_all, remembered, view_of


@dataclass(frozen=True)
class _Packed:
    """One packed weight: valid while its storage lives and holds what was packed."""

    mark: Mark
    death: weakref.ref
    tensor: Tensor


_packed: dict[tuple, _Packed] = {}


def clear_packed_weights() -> None:
    """Forget every packed weight; each is packed again when it is next used."""
    forget_all()
    _packed.clear()


def forget_storages(storages: Collection[int]) -> None:
    """Forget what was computed of tensors in ``storages``, given by ``_cdata``."""
    forget(storages)
    for key in [key for key in _packed if key[0] in storages]:
        _packed.pop(key, None)


def _packed_once(weight: Tensor, name: str, mark: Mark) -> Tensor:
    storage = weight.untyped_storage()
    key = (storage._cdata, weight.storage_offset(), view_of(weight), name)
    kept = _packed.get(key)
    if kept is not None and not kept.mark.storage.expired() and kept.mark.same_content(mark):
        return kept.tensor
    tensor = pack_weight(weight, name)
    _packed[key] = _Packed(mark, weakref.ref(storage, lambda _: _packed.pop(key, None)), tensor)
    return tensor


def prepack(weights: list[Tensor], layouts: list[str]) -> list[Tensor]:
    """Weights ``[n, k]``, any strides, packed: ``result[i]`` is ``weights[i]`` in ``layouts[i]``.

    A layout's name with ``TRANSPOSED`` behind it takes the weight as ``[k, n]``: what a graph holds is given as it is,
    as views that a graph makes anew have no version.

    The results are kept and handed out again: do not write to them. They never alias an input; equal inputs give the
    same tensor.
    """

    def pack(marks: Sequence[Mark]) -> list[Tensor]:
        given = zip(weights, layouts, marks, strict=True)
        return [_packed_once(weight, layout, mark) for weight, layout, mark in given]

    return remembered(weights, tuple(layouts), pack)


def _prepack_fake(weights: list[Tensor], layouts: list[str]) -> list[Tensor]:
    torch._check(
        len(weights) == len(layouts),
        lambda: f"prepack: one layout for each weight, got {len(weights)} weights and {len(layouts)} layouts",
    )
    results = []
    for weight, name in zip(weights, layouts, strict=True):
        layout = packed_layout(name)
        check_weight(weight, layout)
        results.append(weight.new_empty(layout.shape(*weight.shape), dtype=layout.dtype or weight.dtype))
    return results


def _unpack_fake(packed: Tensor, layout: str, n: int, k: int) -> Tensor:
    check_packed(packed, layout, n, k)
    return packed.new_empty((n, k), dtype=code_dtype(layout, packed.dtype))


register(
    "pack(Tensor weight, str layout) -> Tensor",
    pack_weight,
    lambda weight, layout: _prepack_fake([weight], [layout])[0],
    MATMUL_TAGS,
)
register("unpack(Tensor packed, str layout, int n, int k) -> Tensor", unpack_weight, _unpack_fake, MATMUL_TAGS)
register("prepack(Tensor[] weights, str[] layouts) -> Tensor[]", prepack, _prepack_fake, KEEPING_TAGS)
