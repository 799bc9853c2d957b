"""How far the compilation of many pieces is, for who looks on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

Each = TypeVar("Each")


def progress(pieces: Sequence[Each]) -> Iterable[Each]:
    """``pieces``, with a bar on the error stream where that is a terminal and there are several."""
    if len(pieces) < 2 or sys.stderr is None or not sys.stderr.isatty():
        return pieces
    from tqdm import tqdm

    return tqdm(pieces, desc="fx_quant: compiling", unit="piece", leave=False)
