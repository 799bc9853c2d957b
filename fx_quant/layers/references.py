"""Whether a module alone refers to the memory of one of its buffers, by counts of references.

What the counts are where nothing else refers to it is measured by the same functions when this is imported, as it
depends on the versions of Python and PyTorch. Where it is in doubt the answer is no.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor


def _references(buffers: Mapping[str, Tensor | None], name: str) -> tuple[int, int, int]:
    """How many references there are to the tensor, to its storage in Python, and to that in C++."""
    tensor = buffers[name]
    assert tensor is not None
    storage = tensor.untyped_storage()
    return sys.getrefcount(tensor), sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


_OWN = _references({"": torch.empty(1)}, "")


def _references_at_an_end() -> tuple[int, int, int]:
    """``_references`` as what is called at the end of a tensor that shares the memory finds them."""
    buffers, seen = {"": torch.empty(1)}, []
    other = buffers[""].detach()
    weakref.finalize(other, lambda: seen.append(_references(buffers, "")))
    del other
    return seen[0] if seen else _OWN


_AT_AN_END = _references_at_an_end()


def is_own(buffers: Mapping[str, Tensor | None], name: str, *, at_an_end: bool = False) -> bool:
    """Whether nothing but ``buffers`` refers to the memory of its tensor ``name``, which must be there.

    The memory of a file, of a NumPy array or of several processes is not, as far as PyTorch knows.

    Args:
        at_an_end: nor does anything but a tensor of which this is the end.
    """
    if _references(buffers, name) != (_AT_AN_END if at_an_end else _OWN):
        return False
    memory = buffers[name].untyped_storage()  # pyrefly: ignore [missing-attribute]
    return memory.resizable() and not memory.is_shared()
