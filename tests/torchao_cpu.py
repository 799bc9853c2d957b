"""torchao traces another matmul on each kind of CPU. Goldens are of one: with AVX-512 VNNI, without AMX."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def as_on_vnni() -> Iterator[None]:
    """torchao takes the CPU for one with VNNI and without AMX, where it was imported."""
    intmm = sys.modules.get("torchao.kernel.intmm")
    with contextlib.ExitStack() as stack:
        for name, has in (("_cpu_is_amx_tile_supported", False), ("_cpu_is_vnni_supported", True)):
            if hasattr(intmm, name):
                stack.enter_context(mock.patch.object(intmm, name, return_value=has))
        yield
