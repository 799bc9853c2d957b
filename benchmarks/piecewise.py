"""Compile time and step time of a decoder compiled whole and in pieces, by its number of layers.

``python benchmarks/piecewise.py`` compiles each (number of layers, way) in a process of its own, with an empty folder
of caches but for what Inductor makes once for all, and reports the seconds until the first prompt is through: Dynamo,
the passes, code generation and the C++ compiler. Then the ways of one number of layers take turns, in rounds, at a
decode of one token and at a prefill; the median counts. One thread. Results of the two ways are compared first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cpu_decoder import Size, decoder
from benchmarks.machine import described, machine

PROMPT = 128
WAYS = ("whole", "piecewise", "inductor")
PHASES = ("decode", "prefill")


def serve(way: str, layers: int, hidden: int) -> Generator[dict[str, Any], int, None]:
    """The seconds of the compile and the logits; then the median ms of each phase over as many calls as asked for."""
    import fx_quant

    torch.set_num_threads(1)
    size = Size(hidden=hidden, layers=layers, ffn=hidden * 11 // 4, heads=hidden // 64, vocab=4 * hidden)
    model = decoder(size)
    fx_quant.quantize_(model, "int8 per_token (dynamic) x int8 per_channel")
    ids = torch.randint(0, size.vocab, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    inputs = {"prefill": (ids, torch.arange(PROMPT)), "decode": (ids[:, :1].clone(), torch.tensor([PROMPT]))}
    if way == "inductor":
        run = torch.compile(model, dynamic=True)
    else:
        run = torch.compile(model, backend="fx_quant", dynamic=True, options={"piecewise": way == "piecewise"})
    with torch.no_grad(), no_graph_cache():
        torch.compile(torch.neg)(torch.ones(64))  # Inductor tries the compiler and precompiles its header once
        start = time.perf_counter()
        logits = run(*inputs["prefill"])
        taken = time.perf_counter() - start
        run(*inputs["decode"])  # a graph of its own
        calls = yield {"compile_s": taken, "logits": logits.flatten()[:64].tolist()}
        while calls:
            ms = {}
            for phase in PHASES:
                times = []
                for _ in range(calls if phase == "decode" else max(1, calls // 8)):
                    start = time.perf_counter()
                    run(*inputs[phase])
                    times.append(1e3 * (time.perf_counter() - start))
                ms[phase] = statistics.median(times)
            calls = yield ms


@contextlib.contextmanager
def no_graph_cache() -> Iterator[None]:
    """No graph is read from a cache; a kernel that two pieces share is compiled once, as for a user.

    With ``force_disable_caches`` Inductor would give each piece a folder of its own and compile such a kernel twice.
    """
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def child(way: str, layers: int, hidden: int) -> None:
    """``serve`` over the standard streams, one line of JSON for each question."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        server = serve(way, layers, hidden)
        print(json.dumps(next(server)), flush=True)
        for line in sys.stdin:
            print(json.dumps(server.send(int(line))), flush=True)


class Way:
    """One process that has the model compiled its way."""

    def __init__(self, way: str, layers: int, hidden: int) -> None:
        command = [sys.executable, __file__, "--child", way, "--layers", str(layers), "--hidden", str(hidden)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.compiled = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of the process.

        Raises:
            RuntimeError: it ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self.process.wait()}; its error is above")
        return json.loads(line)

    def ask(self, calls: int) -> dict[str, float]:
        """The median ms of each phase over ``calls`` calls."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def rows(layers: int, ways: list[str], hidden: int, rounds: int, calls: int) -> list[dict[str, Any]]:
    """One row for each way: compiled one after the other, run in turns.

    Raises:
        RuntimeError: the ways' logits are not those of the first.
    """
    running: dict[str, Way] = {}
    try:
        for way in ways:
            print(f"{layers} layers, {way}: compiling", file=sys.stderr, flush=True)
            running[way] = Way(way, layers, hidden)
        logits = {way: torch.tensor(one.compiled["logits"]) for way, one in running.items()}
        first = logits[ways[0]]
        for way, values in logits.items():
            if (values - first).norm() > 0.05 * first.norm():
                raise RuntimeError(f"{layers} layers: the logits of {way} are not those of {ways[0]}")
        turns = [{way: one.ask(calls) for way, one in running.items()} for _ in range(rounds)]
        return [
            {
                "layers": layers,
                "way": way,
                "compile_s": one.compiled["compile_s"],
                **{phase: statistics.median(turn[way][phase] for turn in turns) for phase in PHASES},
            }
            for way, one in running.items()
        ]
    finally:
        for one in running.values():
            one.close()


def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["whole", "piecewise"])
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=24, help="decodes in a turn; an eighth as many prefills")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write machine, versions and rows as JSON")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.layers[0], options.hidden)
        return
    if min([*options.layers, options.rounds, options.calls]) < 1 or options.hidden % 64:
        parser.error("--layers, --rounds and --calls must be 1 or more, and --hidden a multiple of 64")
    where = machine("torchao", "transformers")
    print(described(where))
    result = [
        row for n in options.layers for row in rows(n, options.ways, options.hidden, options.rounds, options.calls)
    ]
    headers = ("layers", "way", "compile s", "decode ms", "prefill ms")
    cells = [
        (row["layers"], row["way"], f"{row['compile_s']:.1f}", f"{row['decode']:.2f}", f"{row['prefill']:.1f}")
        for row in result
    ]
    print(tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True))
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "rows": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
