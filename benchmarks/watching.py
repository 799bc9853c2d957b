"""What it costs to look for writes to weights, in quantized models.

``python benchmarks/watching.py [--threads N] [--rounds N] [--json FILE]``. Each call asks whether what is kept of a
weight is current: by memory, view and version, and by some of its bytes (``fx_quant.ops.constants``). Three kinds of
calls take turns: as they are, without a look at the bytes, and with a clock around each question. The last gives the
share of a call that goes there, to within the clock's own time; the difference of the first two is the same as a whole
sees it, to within the noise of whole calls.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from fx_quant.ops import constants

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
    watches = [group.watches for group in constants._groups.values()]
    looks = [each.changed for each in watches]
    for each in watches:
        each.changed = bool
    try:
        yield
    finally:
        for each, changed in zip(watches, looks, strict=True):
            each.changed = changed


class _Clock:
    """Nanoseconds that a function takes, all calls together."""

    def __init__(self) -> None:
        self.nanoseconds = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def timed(*args: Any) -> Any:
            start = time.perf_counter_ns()
            result = function(*args)
            self.nanoseconds += time.perf_counter_ns() - start
            return result

        return timed


@contextlib.contextmanager
def _clocked(clock: _Clock) -> Iterator[None]:
    asks = constants._is_current
    constants._is_current = clock.around(asks)
    try:
        yield
    finally:
        constants._is_current = asks


@dataclass(frozen=True)
class _Taken:
    """Microseconds of each call, sorted: as it is, without a look at the bytes, and in the questions of a call."""

    looking: list[float]
    blind: list[float]
    asking: list[float]


def _turns(call: Callable[[], Any], rounds: int) -> _Taken:
    taken: dict[str, list[float]] = {"looking": [], "blind": [], "asking": []}
    for i in range(rounds):
        # The one that comes first changes places: what follows a slow moment of the machine is slow too.
        for kind in itertools.islice(itertools.cycle(taken), i % 3, i % 3 + 3):
            clock = _Clock()
            with {"looking": contextlib.nullcontext(), "blind": _not_looking(), "asking": _clocked(clock)}[kind]:
                start = time.process_time()  # of which others on the machine take none
                call()
                whole = time.process_time() - start
            taken[kind].append(clock.nanoseconds / 1e3 if kind == "asking" else 1e6 * whole)
    return _Taken(*map(sorted, taken.values()))


@torch.no_grad()
def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=600, help="calls of each kind (default: 600)")
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
        taken = _turns(lambda inputs=inputs, compiled=compiled: compiled(*inputs), options.rounds)
        looking, blind, asking = map(statistics.median, (taken.looking, taken.blind, taken.asking))
        rows.append(
            {
                "model": name,
                "call_us": looking,
                "asking_us": asking,
                "share": asking / looking,
                "whole_calls_differ": looking / blind - 1,
            }
        )
        print(name, file=sys.stderr, flush=True)
    found = machine()
    print(described(found))
    print(
        tabulate(
            [
                (
                    row["model"],
                    f"{row['call_us']:.1f}",
                    f"{row['asking_us']:.1f}",
                    f"{100 * row['share']:.2f} %",
                    f"{100 * row['whole_calls_differ']:+.2f} %",
                )
                for row in rows
            ],
            headers=("model", "us a call", "us in questions", "share", "whole calls with and without bytes"),
            disable_numparse=True,
        )
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": found, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
