"""What memory of a library's modules is given back when they are swapped, and what a model would give back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fx_quant.kernels.registry import kernels
from fx_quant.kernels.subclasses import inner_tensors
from fx_quant.layers.packed_weight import PackedWeight
from fx_quant.loading.module_names import tensors_of
from fx_quant.report import Report


@dataclass(frozen=True)
class Memory:
    """Storages of a module, which may be gone later."""

    storages: tuple[tuple[StorageWeakRef, int], ...]

    @property
    def freed(self) -> int:
        """Bytes of those that nothing refers to any more."""
        return sum(size for storage, size in self.storages if storage.expired())

    @property
    def kept(self) -> int:
        """Bytes of the largest of them, the codes, where something refers to it."""
        storage, size = max(self.storages, key=lambda each: each[1], default=(None, 0))
        return 0 if storage is None or storage.expired() else size


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


def held_twice(modules: Mapping[str, nn.Module], report: Report) -> dict[nn.Module, int]:
    """The bytes of codes that ``modules`` hold beside what a kernel of ``report`` packs of them, by module.

    Memory that several share counts for the first. A ``QuantizedLinear`` holds its weight once, and what is made of a
    weight that is no codes is not counted.
    """
    layouts = {kernel.name for kernel in kernels() if kernel.layout is not None}
    found: dict[nn.Module, int] = {}
    seen: set[int] = set()
    for site in report.sites:
        module = modules.get(site.module)
        if module is None or site.kernel not in layouts or isinstance(module, PackedWeight):
            continue
        # Two codes to a byte, or one.
        sizes = (site.n * site.k, site.n * site.k // 2)
        for _, tensor in _held(module):
            storage = tensor.untyped_storage()
            codes = not tensor.is_floating_point() or tensor.dtype.itemsize == 1
            if codes and tensor.dim() > 1 and tensor.nbytes in sizes and storage._cdata not in seen:
                seen.add(storage._cdata)
                found[module] = found.get(module, 0) + tensor.nbytes
    return found
