"""How long the passes of fx_quant take on a Llama, and what share of its compile that is.

``python benchmarks/pass_time.py [--layers N ...] [--compile N ...] [--json FILE]`` (or ``make bench-passes``). The
model is transformers' Llama with random weights, its seven linears a layer quantized by torchao. It is narrow, because
the time of a pass depends on the number of ops and not on their sizes; layers and ops are those of the real model.

Two tables. The first compiles whole models with all caches off, and compares the time in the passes with that of the
compile. The second captures the graphs of more layers, rewrites copies of each, splits the time by step, and fits
``ms ~ layers ** exponent``; it is in time of the processor, which other programs on the machine do not stretch.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import Graph

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from encoder import Fp8Linear

from benchmarks.machine import described, machine
from fx_quant.backend import RewritePass
from fx_quant.compat import copy_graph, static_input_indices
from fx_quant.config import Options
from fx_quant.diagnose.capture import run_captured, run_eagerly
from fx_quant.kernels.machine import detect_target
from fx_quant.passes import pipeline
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.target import Target, named_target

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The functions that ``fx_quant.passes.pipeline`` calls, by the step that they are part of.
STEPS: dict[str, tuple[str, ...]] = {
    "merge": ("common_subexpressions_merged", "remove_identities"),
    "copy": ("copy_graph", "replace_contents"),
    "annotate": ("Annotation", "classify_inputs"),
    "sites": ("find_sites",),
    "select": ("select",),
    "canonicalize": ("canonicalize",),
    "quantize": ("quantizers_of", "rewrite_quantizers", "collapse_reshapes", "merge_duplicates"),
    "assign": ("assign",),
    "fold": ("fold_constants",),
    "verify": ("verify",),
    "report": ("report_on",),
}


def _int8(model: nn.Module) -> None:
    """int8 W8A8 by torchao: dynamic activations per token, weights per channel."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_quantized)


def _fp8(model: nn.Module) -> None:
    """float8 W8A8 by hand, as torchao refuses CPUs: dynamic activations per token, weights per channel."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and _is_quantized(module, name):
            model.set_submodule(name, Fp8Linear(module))


def _int4(model: nn.Module) -> None:
    """int4 weights in groups of 32 by torchao, float activations."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    # torchao defines its dtypes at run time, where type checkers do not see them.
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=PerGroup(32))  # noqa: B009
    quantize_(model, config, filter_fn=_is_quantized)


def _is_quantized(_: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in LINEARS


QUANTIZED: dict[str, Callable[[nn.Module], None]] = {"int8": _int8, "fp8": _fp8, "int4": _int4}


class Decoder(nn.Module):
    """A Llama's decoder, hidden size 256: ``forward(ids[batch, t]) -> [batch, t, 256]``, every op as in the real one.

    Args:
        layers: number of decoder layers.
        quantized: a name of ``QUANTIZED``.
    """

    def __init__(self, layers: int, quantized: str) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=704,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=layers,
            vocab_size=512,
            use_cache=False,
        )
        self.model: nn.Module = LlamaModel(config)
        self.model.bfloat16().eval().requires_grad_(False)
        QUANTIZED[quantized](self.model)

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden states."""
        return self.model(input_ids=ids, use_cache=False).last_hidden_state


def token_ids(*, dynamic: bool) -> Tensor:
    """``[1, 64]`` ids; with ``dynamic`` the number of tokens is a symbolic size of the graph."""
    ids = torch.arange(64).remainder(512)[None]
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 1)
    return ids


@dataclass
class Stopwatch:
    """Seconds spent in each step of the passes, in Python's garbage collector (``gc``) meanwhile, and in all of them.

    A step within another is charged to itself only. The collector runs when a number of objects was made since it ran
    last, and then looks at all objects of the process: which step it falls on is chance.

    Args:
        clock: seconds of what is to be measured.
    """

    clock: Callable[[], float]
    total: float = 0.0
    steps: dict[str, float] = field(default_factory=lambda: dict.fromkeys([*STEPS, "gc"], 0.0))
    # When each open step began, and the time in it that belongs to others.
    _open: list[list[float]] = field(default_factory=list)

    def start(self) -> None:
        """Open a step."""
        self._open.append([self.clock(), 0.0])

    def stop(self, step: str) -> None:
        """Close the step opened last, as ``step``."""
        began, of_others = self._open.pop()
        taken = self.clock() - began
        self.steps[step] += taken - of_others
        if self._open:
            self._open[-1][1] += taken

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time added to ``step``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.start()
            try:
                return function(*args, **kwargs)
            finally:
                self.stop(step)

        return call

    def _collecting(self, phase: str, _: object) -> None:
        if phase == "start":
            self.start()
        else:
            self.stop("gc")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what runs inside as all of the passes."""
        with contextlib.ExitStack() as patches:
            for step, names in STEPS.items():
                for name in names:
                    patches.enter_context(mock.patch.object(pipeline, name, self.timed(step, getattr(pipeline, name))))
            gc.callbacks.append(self._collecting)
            patches.callback(gc.callbacks.remove, self._collecting)
            start = self.clock()
            yield
            self.total += self.clock() - start

    def ms(self) -> dict[str, float]:
        """Milliseconds of each step, of what is in none (``rest``), and of all."""
        steps = {step: 1e3 * taken for step, taken in self.steps.items()}
        return {**steps, "rest": 1e3 * self.total - sum(steps.values()), "passes": 1e3 * self.total}


@dataclass(frozen=True)
class CapturedGraph:
    """A joint graph as Inductor hands it to the passes.

    Args:
        graph: with fake tensors; not to be changed.
        static: positions of the inputs that are parameters or buffers.
    """

    graph: Graph
    static: frozenset[int] | None


def capture(layers: int, quantized: str, *, dynamic: bool) -> CapturedGraph:
    """The joint graph of a ``Decoder``, without generating code for it.

    Raises:
        RuntimeError: the model was not captured as one graph.
    """
    found: list[CapturedGraph] = []

    def keep(graph: Graph) -> None:
        found.append(CapturedGraph(copy_graph(graph)[0], static_input_indices(graph)))

    torch._dynamo.reset()
    model = Decoder(layers, quantized)
    run_captured(model, (token_ids(dynamic=dynamic),), {}, on_graph=keep, inner_compile=run_eagerly)
    if len(found) != 1:
        raise RuntimeError(f"the decoder must be one graph, got {len(found)}; look at torch._dynamo.explain of it")
    return found[0]


def time_passes(captured: CapturedGraph, target: Target, repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median milliseconds of each step over ``repeats`` rewrites of copies of the graph, and what was found in it."""
    runs, counts = [], {}
    for _ in range(repeats):
        copy, _ = copy_graph(captured.graph)
        gc.collect()
        watch = Stopwatch(time.thread_time)
        with watch.running():
            report = rewrite_graph(copy, target, Options(), captured.static)
        runs.append(watch.ms())
        counts = {"sites": len(report.sites), "recognised": len(report.recognised), "misses": len(report.misses)}
    return {step: statistics.median(run[step] for run in runs) for step in runs[0]}, counts


def growth(layers: Sequence[int], ms: Sequence[float]) -> float:
    """The exponent of ``ms ~ layers ** exponent`` by least squares of the logarithms; NaN for fewer than two points."""
    if len(layers) < 2:
        return math.nan
    return statistics.linear_regression([math.log(n) for n in layers], [math.log(t) for t in ms]).slope


def passes_rows(quantized: str, layers: Sequence[int], target: Target, repeats: int, *, dynamic: bool) -> list[dict]:
    """One row for each number of layers, of the passes alone."""
    rows = []
    for n in layers:
        print(f"{quantized}, {n} layers: capturing", file=sys.stderr, flush=True)
        captured = capture(n, quantized, dynamic=dynamic)
        ms, counts = time_passes(captured, target, repeats)
        rows.append({"model": quantized, "layers": n, "nodes": len(captured.graph.nodes), **counts, "ms": ms})
    return rows


def compile_row(quantized: str, layers: int, *, dynamic: bool) -> dict[str, Any]:
    """The time of one whole cold compile, from Dynamo to the loaded kernels and the first run, and the passes' part."""
    from torch._inductor.utils import fresh_cache

    print(f"{quantized}, {layers} layers: compiling", file=sys.stderr, flush=True)
    torch._dynamo.reset()
    elapsed, watch = Stopwatch(time.perf_counter), Stopwatch(time.thread_time)
    call = RewritePass.__call__

    def timed(self: RewritePass, graph: Graph) -> None:
        with elapsed.running(), watch.running():
            call(self, graph)

    model, ids = Decoder(layers, quantized), token_ids(dynamic=dynamic)
    compiled = torch.compile(model, backend="fx_quant")
    no_caches = torch._inductor.config.patch(force_disable_caches=True)
    with fresh_cache(), no_caches, mock.patch.object(RewritePass, "__call__", timed):
        start, cpu = time.perf_counter(), _cpu_seconds()
        compiled(ids)
        taken, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    return {
        "model": quantized,
        "layers": layers,
        "compile_s": taken,
        "compile_cpu_s": cpu,
        "elapsed_ms": elapsed.ms(),
        "ms": watch.ms(),
        "share": elapsed.total / taken,
        "cpu_share": watch.total / cpu,
    }


def _cpu_seconds() -> float:
    """Processor time of this process and of the compilers that it waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def print_compiles(rows: Sequence[dict[str, Any]]) -> None:
    """The table of whole compiles: by the clock, and in processor time, which other programs do not stretch."""
    headers = ("model", "layers", "compile s", "passes ms", "share", "compile CPU s", "passes CPU ms", "CPU share")
    cells = [
        (
            row["model"],
            row["layers"],
            f"{row['compile_s']:.1f}",
            f"{row['elapsed_ms']['passes']:.0f}",
            f"{row['share']:.2%}",
            f"{row['compile_cpu_s']:.1f}",
            f"{row['ms']['passes']:.0f}",
            f"{row['cpu_share']:.2%}",
        )
        for row in rows
    ]
    print(tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True))


def print_passes(rows: Sequence[dict[str, Any]]) -> None:
    """The table of the passes' steps, with their growth in the last row."""
    steps = [*STEPS, "gc", "rest", "passes"]
    headers = ("model", "layers", "nodes", "sites", "recognised", *steps, "ms / layer")
    cells = [
        (
            row["model"],
            row["layers"],
            row["nodes"],
            row["sites"],
            row["recognised"],
            *(f"{row['ms'][step]:.1f}" for step in steps),
            f"{row['ms']['passes'] / row['layers']:.2f}",
        )
        for row in rows
    ]
    layers = [row["layers"] for row in rows]
    # What takes no time grows by noise only.
    exponents = [
        f"{growth(layers, ms):.2f}" if min(ms) > 0.1 else "" for ms in ([row["ms"][s] for row in rows] for s in steps)
    ]
    cells.append(("exponent", "", "", "", "", *exponents, ""))
    print(tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True))


@torch.no_grad()
def main() -> None:
    """Measure, print the tables, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(QUANTIZED), default=["int8", "fp8", "int4"])
    parser.add_argument("--layers", nargs="*", type=int, default=[8, 16, 32, 64, 128], help="of the passes alone")
    parser.add_argument("--compile", nargs="*", type=int, default=[8, 16, 32], help="layers of whole compiles")
    parser.add_argument("--target", help="of the passes alone, such as sm90 (default: this machine)")
    parser.add_argument("--dynamic", action="store_true", help="make the number of tokens a symbolic size")
    parser.add_argument("--repeats", type=int, default=3, help="rewrites of each graph, of which the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write machine, versions and rows as JSON")
    options = parser.parse_args()
    if min([*options.layers, *options.compile, options.repeats], default=1) < 1:
        parser.error("--layers, --compile and --repeats must be 1 or more")

    target = named_target(options.target) if options.target else detect_target(torch.device("cpu"))
    where = machine("torchao", "transformers")
    print(described(where))
    result: dict[str, Any] = {"machine": where, "target": str(target), "dynamic": options.dynamic}
    result["compiles"], result["passes"] = [], []
    for name in options.models:
        if options.compile:
            compile_row(name, 1, dynamic=options.dynamic)  # imports and the like, which are no part of a model's share
            rows = [compile_row(name, n, dynamic=options.dynamic) for n in options.compile]
            result["compiles"] += rows
            print(f"\n{name}: whole compiles, caches off")
            print_compiles(rows)
        if options.layers:
            rows = passes_rows(name, options.layers, target, options.repeats, dynamic=options.dynamic)
            result["passes"] += rows
            print(f"\n{name}: passes alone for {target}, ms")
            print_passes(rows)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
