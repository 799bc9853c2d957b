"""How far something is, for who looks on: a bar on the error stream where that is a terminal, and nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

Each = TypeVar("Each")


def progress(items: Iterable[Each], doing: str, unit: str) -> Iterable[Each]:
    """``items``, with a bar while they are taken, unless there is but one."""
    if not _is_watched() or (isinstance(items, Sized) and len(items) < 2):
        return items
    return _tqdm()(items, **_looks(doing, unit))


@contextlib.contextmanager
def counting(doing: str, unit: str, total: int | None = None) -> Iterator[Callable[[], object]]:
    """A function to call for each ``unit`` that is done, with a bar in the meantime."""
    if not _is_watched():
        yield lambda: None
        return
    with _tqdm()(total=total, **_looks(doing, unit)) as bar:
        bar.refresh()
        yield bar.update


def _is_watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _looks(doing: str, unit: str) -> dict[str, Any]:
    return {"desc": f"fx_quant: {doing}", "unit": f" {unit}", "leave": False, "dynamic_ncols": True, "file": sys.stderr}


def _tqdm() -> Any:
    # Not loaded where nobody looks on.
    from tqdm import tqdm

    return tqdm
