"""What it costs to look for writes to weights: quantized models with and without, taking turns.

``python benchmarks/watching.py [--threads N] [--rounds N] [--json FILE]``. The bytes of weights are looked at in every
call (``fx_quant.ops.fingerprint``), which is switched off in every other call here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from encoder import int8, tokenize
from machine import described, machine
from sentences import SENTENCES

import fx_quant
from fx_quant.ops.constants import _groups

SCHEME = "int8 per_token (dynamic) x int8 per_channel"
ROWS = (
    (
        "linear 4096 x 4096, one row",
        lambda: (nn.Sequential(nn.Linear(4096, 4096, bias=False)), (torch.randn(1, 4096),)),
    ),
    ("16 linears 4096 x 4096, one row", lambda: (_several(16), (torch.randn(1, 4096),))),
)


def _several(count: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(count)])


@contextlib.contextmanager
def _not_looking() -> Iterator[None]:
    watches = [group.watches for group in _groups.values()]
    looks = [each.changed for each in watches]
    for each in watches:
        each.changed = bool
    try:
        yield
    finally:
        for each, changed in zip(watches, looks, strict=True):
            each.changed = changed


def _turns(call: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Sorted microseconds of processors that ``call`` took, with and without looking."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 * rounds):
        # The one that comes first changes places: what follows a slow moment of the machine is slow too.
        looks = i % 4 in (0, 3)
        with contextlib.nullcontext() if looks else _not_looking():
            start = time.process_time()  # of which others on the machine take none
            call()
            taken[looks].append(1e6 * (time.process_time() - start))
    return sorted(taken[True]), sorted(taken[False])


def _of_fastest(taken: list[float]) -> float:
    """The mean of the fastest tenth, which others on the machine disturb least."""
    return statistics.fmean(taken[: -(-len(taken) // 10)])


@torch.no_grad()
def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=2000, help="calls of each kind (default: 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write machine, versions and rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases: list[tuple[str, nn.Module, tuple[torch.Tensor, ...]]] = []
    for name, make in ROWS:
        model, inputs = make()
        fx_quant.quantize_(model, SCHEME)
        cases.append((name, model, inputs))
    cases += [(f"MiniLM-L6 int8, {count} sentences", int8(), tokenize(SENTENCES[:count])) for count in (1, 8)]
    rows = []
    for name, model, inputs in cases:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="fx_quant")
        torch.testing.assert_close(compiled(*inputs), compiled(*inputs))
        for _ in range(20):
            compiled(*inputs)
        looking, not_looking = _turns(lambda inputs=inputs, compiled=compiled: compiled(*inputs), options.rounds)
        medians, fastest = ([of(taken) for taken in (looking, not_looking)] for of in (statistics.median, _of_fastest))
        shares = [with_it / without - 1 for with_it, without in (medians, fastest)]
        rows.append(
            {
                "model": name,
                "looking_us": medians[0],
                "not_looking_us": medians[1],
                "share": shares[0],
                "share_of_fastest": shares[1],
            }
        )
        print(name, file=sys.stderr, flush=True)
    found = machine()
    print(described(found))
    print(
        tabulate(
            [
                (
                    r["model"],
                    f"{r['looking_us']:.1f}",
                    f"{r['not_looking_us']:.1f}",
                    f"{100 * r['share']:.2f} %",
                    f"{100 * r['share_of_fastest']:.2f} %",
                )
                for r in rows
            ],
            headers=("model", "us a call", "us without looking", "share", "of the fastest tenth"),
            disable_numparse=True,
        )
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": found, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
