"""What memory of a library's modules is given back when they are swapped, and what a model would give back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fx_quant.kernels.subclasses import inner_tensors
from fx_quant.layers.packed_weight import PackedWeight
from fx_quant.loading.module_names import tensors_of


@dataclass(frozen=True)
class Memory:
    """Storages of a module, which may be gone later."""

    storages: tuple[tuple[StorageWeakRef, int], ...]

    @property
    def freed(self) -> int:
        """Bytes of those that nothing refers to any more."""
        return sum(size for storage, size in self.storages if storage.expired())

    def kept_by_others(self, linear: PackedWeight) -> int:
        """Bytes of those that something refers to, and not only ``linear`` beside its weight."""
        own = {x.untyped_storage()._cdata for name, x in _held(linear) if name != "weight"}
        return sum(size for storage, size in self.storages if not storage.expired() and storage.cdata not in own)


class Ledger:
    """The storages of modules, each counted for the first that holds it."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def memory_of(self, module: nn.Module) -> Memory:
        """The storages of ``module`` itself that no module before had."""
        found = []
        for _, tensor in _held(module):
            storage = tensor.untyped_storage()
            # It is referred to weakly from here on, so that its address is no other's.
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                found.append((StorageWeakRef(storage), storage.nbytes()))
        return Memory(tuple(found))


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``module`` itself that have memory, those inside subclasses too, by name."""
    for name, value in tensors_of(module):
        for tensor in inner_tensors(value):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta":
                yield name, tensor
