"""What the first compile of a process waits for and no graph decides, begun while its graph is still being traced."""

from __future__ import annotations

import contextlib
import functools
import threading

from torch._inductor.cpu_vec_isa import pick_vec_isa

from fx_quant.ops.fingerprint import prepare


@functools.cache
def prepare_in_background() -> None:
    """Ask the compiler which vectors it knows, and compile what looks at weights; once, in a thread of its own.

    Each is kept by who asks again, whose errors are those that count. A compiler takes some seconds, in which the graph
    is traced and lowered on another core.
    """
    threading.Thread(target=_prepare, name="fx_quant toolchain", daemon=True).start()


def _prepare() -> None:
    for step in (pick_vec_isa, prepare):
        with contextlib.suppress(Exception):
            step()
