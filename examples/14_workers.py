"""Workers of one machine that share one packed copy of the weights: forked behind the first call.

``python examples/14_workers.py`` (``--workers 4 --layers 8 --width 2048``; Linux). A process quantizes, compiles and
calls the model once, then forks: kernels, packed weights and compiled code are there in each worker, on the same
pages, as nothing writes to them. Memory is the proportional share (PSS) of all processes together, beside that of the
first before it forked. ``--spawn`` starts workers that load for themselves instead, and share nothing. Exits with 1
where a worker has another result, or forked workers take more than 1.3 times the memory of one.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fx_quant

SCHEME = "int8 per_token (dynamic) x int8 per_channel"
MOST = 1.3


def share() -> float:
    """The proportional share of memory of this process, in MiB: a page of four processes counts a quarter to each."""
    (line,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 2**10


def build(layers: int, width: int) -> nn.Module:
    """Linears in int8, packed for this machine."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).eval().requires_grad_(False)
    fx_quant.quantize_(model, SCHEME)
    return model


@torch.inference_mode()
def work(pipe: Connection, model: Any, sizes: tuple[int, int], x: torch.Tensor) -> None:
    """One worker: its result, then, when all have one, its share of the memory."""
    torch.set_num_threads(1)
    run = model or torch.compile(build(*sizes), backend="fx_quant")
    pipe.send(run(x).tolist())
    pipe.recv()
    pipe.send(share())
    pipe.recv()


@torch.inference_mode()
def main(argv: Sequence[str] = ()) -> int:
    """Warm up, start the workers, compare and measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--spawn", action="store_true", help="workers that load for themselves")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/smaps_rollup").exists():
        print("needs /proc/self/smaps_rollup, as Linux has it")
        return 0
    # A forked process has the memory of OpenMP's threads and none of the threads: they must not have been started.
    torch.set_num_threads(1)
    sizes = (arguments.layers, arguments.width)
    model, x = build(*sizes), torch.randn(4, arguments.width)
    print(fx_quant.explain(model, x).summary())
    run = torch.compile(model, backend="fx_quant")
    expected = run(x).tolist()
    gc.collect()
    gc.freeze()  # looking for garbage would write to the pages of every object
    alone = share()
    method: Any = multiprocessing.get_context("spawn" if arguments.spawn else "fork")
    pipes, processes = [], []
    for _ in range(arguments.workers):
        ours, theirs = method.Pipe()
        process = method.Process(target=work, args=(theirs, None if arguments.spawn else run, sizes, x))
        process.start()
        pipes.append(ours)
        processes.append(process)
    same = all(pipe.recv() == expected for pipe in pipes)
    for pipe in pipes:
        pipe.send("measure")
    together = sum(pipe.recv() for pipe in pipes) + share()
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("end")
        process.join()
    gc.unfreeze()
    print(
        f"one process: {alone:.0f} MiB; with {arguments.workers} {'spawned' if arguments.spawn else 'forked'} workers: "
        f"{together:.0f} MiB together, {together / alone:.2f} times; same results: {same}"
    )
    return int(not same or (not arguments.spawn and together > MOST * alone))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
