"""What a process of the models' benchmark says of itself: its memory, and the seconds of its calls.

Nothing here needs torch, so that a peer that does not either is measured without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def locked(path: str, *, alone: bool) -> Iterator[None]:
    """Hold the lock of the file ``path``: with others, or ``alone``. Without a path, nothing."""
    if not path:
        yield
        return
    import fcntl

    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def memory(name: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``RssFile`` of those mapped from files, ``VmHWM`` the most since a reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def huge_pages() -> float:
    """MiB of this process that lie in huge pages; NaN where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) / 1024
    return float("nan")


def reset_peak() -> None:
    """Give freed memory back, and count the peak from here."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def seconds_of_calls(run: Callable[[], object], seconds: float) -> list[float]:
    """Of each call but the first, which finds the caches full of others' data, for about ``seconds``."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def settle() -> None:
    """Wait, for 5 seconds at most, until no thread of this process looks out for work, to the cost of the others."""
    end, before = time.perf_counter() + 5, time.process_time()
    while time.perf_counter() < end:
        time.sleep(0.05)
        now = time.process_time()
        if now - before < 0.005:
            return
        before = now


def answer(results: Iterator[Mapping[str, Any]]) -> None:
    """Print the first of ``results``, and another for each line that comes in, as lines of JSON.

    What anything else prints goes to the standard error.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print is no result
        print(json.dumps(next(results)), file=out, flush=True)
        for _ in sys.stdin:
            result = json.dumps(next(results))
            settle()
            print(result, file=out, flush=True)
