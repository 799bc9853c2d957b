"""A service that embeds sentences: requests come in bursts, each burst is one batch, and no batch size recompiles.

``python examples/03_serving.py``. MiniLM-L6 in int8 is compiled in pieces, cut at its attention: six layers are one
artefact. Each piece is compiled once for every number of rows, and by itself for the sizes that are asked for, on their
first use; a burst between two sizes runs padded to the next where the piece is proven to keep its rows apart. Exits
with 1 when an embedding is not that of the eager model or something compiles after the warm-up.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from encoder import Inputs, int8, tokenize
from sentences import SENTENCES
from stopwatch import MIN_COSINE
from tabulate import tabulate
from torch._dynamo.utils import counters

import fx_quant

TOKENS = 32
SIZES = [1, 2, 4, 8]
BURSTS = [3, 1, 8, 5, 2, 7, 6, 4, 3, 8, 1, 11]
OPTIONS: dict[str, Any] = {"piecewise": True, "compile_sizes": SIZES, "padding": "always"}


def batch(first: int, count: int) -> Inputs:
    """``count`` sentences as ``(input_ids, attention_mask)``, each ``[count, 32]``; their number alone is dynamic."""
    sentences = [SENTENCES[(first + i) % len(SENTENCES)] for i in range(count)]
    ids, mask = (F.pad(x[:, :TOKENS], (0, TOKENS - min(x.shape[1], TOKENS))) for x in tokenize(sentences))
    for x in (ids, mask):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return ids, mask


def compilations() -> int:
    """How many graphs Dynamo has made."""
    return counters["stats"]["unique_graphs"]


@torch.inference_mode()
def main() -> int:
    """Warm up, serve the bursts, print what each took; returns the exit status."""
    model = int8()
    print(fx_quant.explain(model, *batch(0, 3), options=OPTIONS), "\n")
    run = torch.compile(model, backend="fx_quant", options=OPTIONS)
    start = time.perf_counter()
    for size in (*SIZES[::-1], max(BURSTS)):
        run(*batch(0, size))
    print(f"warm: sizes {SIZES} and one beyond them in {time.perf_counter() - start:.1f} s, {compilations()} graphs\n")

    warm, rows, worst = compilations(), [], 1.0
    for number, count in enumerate(BURSTS):
        inputs = batch(3 * number, count)
        start = time.perf_counter()
        embeddings = run(*inputs)
        ms = 1e3 * (time.perf_counter() - start)
        worst = min(worst, F.cosine_similarity(embeddings, model(*inputs), dim=-1).min().item())
        ran = next(
            (f"padded to {size}" if size > count else f"{size}" for size in SIZES if size >= count), "any number"
        )
        rows.append((count, ran, f"{ms:.1f}"))
    print(tabulate(rows, headers=("requests", "compiled for", "ms"), tablefmt="simple", disable_numparse=True))
    more = compilations() - warm
    print(f"\nleast cosine with the eager model {worst:.6f}; {more} graphs compiled after the warm-up")
    return int(more > 0 or not worst >= MIN_COSINE)


if __name__ == "__main__":
    sys.exit(main())
