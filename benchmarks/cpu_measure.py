"""One case in one process: prepare every way, compare it with float64, then time all of them in turns.

``python benchmarks/cpu_measure.py FILE`` reads the case and the options from FILE, which ``cpu.py`` wrote, and writes
the rows back into it.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from ceilings import MIB, Buffer, Ceiling, fastest, last_level_cache, peak, reading
from cpu_cases import (
    KINDS,
    WIDE,
    Case,
    Operands,
    activation,
    exact,
    in_float64,
    layers_needed,
    make_operands,
    relative_error,
    wide_layers_needed,
)
from cpu_peers import Call, Way
from cpu_process import locked
from cpu_ways import ALWAYS, chosen
from torch import Tensor, nn

Found = TypeVar("Found", Case, "Settings")

SLOW = 20  # times as slow as the median way, or as ours at fewer rows: not worth a second look


@dataclass(frozen=True)
class Settings:
    """How a case is measured.

    Args:
        seconds: least time of the rounds of one row.
        cpu_time: the time of the process instead of the clock's, which neighbours do not lengthen. It is not that of
            the thread, since some runtimes run one of their own.
        peers: families, or ``all`` or ``torch``.
        quick: only the ways that are marked so.
        static: compile every way for each number of rows.
        lock: a file that is locked (flock): shared while compiling, alone while timing; empty for none.
        cache: bytes of the cache that weights must outgrow; 0 for the last-level cache's.
    """

    seconds: float = 2.0
    cpu_time: bool = False
    peers: tuple[str, ...] = ("all",)
    quick: bool = False
    static: bool = False
    lock: str = ""
    cache: int = 0


@dataclass(eq=False)
class Entry:
    """A way at one number of rows: what runs it, and what became of it."""

    run: Callable[[], object] | None = None
    once: float = 0.0
    error: float | None = None
    status: str = "ok"
    another: bool = False


def _group(case: Case, *, wide: bool) -> list[int]:
    return [m for m in sorted(case.rows) if (m >= WIDE) == wide]


def _count(case: Case, layers: Sequence[Operands], *, wide: bool) -> int:
    return min(len(layers), wide_layers_needed(case.n, case.k)) if wide else len(layers)


def prepare(case: Case, layers: Sequence[Operands], settings: Settings) -> dict[int, dict[str, Entry]]:
    """Every way built, run and compared, for each m: the small ones on all ``layers``, the wide ones on some."""
    found: dict[int, dict[str, Entry]] = {m: {} for m in case.rows}
    right: dict[tuple[int, bool], list[Tensor]] = {}
    for wide in (False, True):
        used = layers[: _count(case, layers, wide=wide)]
        for m in _group(case, wide=wide):
            x = activation(m, case.k, case.torch_dtype)
            right[m, True] = [exact(case, each, x) for each in used]
            right[m, False] = [in_float64(each, x) for each in used]
    ways = chosen(case, settings.peers, quick=settings.quick)
    for i, way in enumerate(ways):
        print(f"{case}: {way.name} ({i + 1} of {len(ways)})", file=sys.stderr, end="", flush=True)
        start = time.perf_counter()
        with locked(settings.lock, alone=False):
            for wide in (False, True):
                rows = _group(case, wide=wide)
                if rows:
                    _prepare_way(case, way, layers[: _count(case, layers, wide=wide)], rows, right, found, settings)
        gc.collect()
        print(f", {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return found


def _prepare_way(
    case: Case,
    way: Way,
    layers: Sequence[Operands],
    rows: Sequence[int],
    right: dict[tuple[int, bool], list[Tensor]],
    found: dict[int, dict[str, Entry]],
    settings: Settings,
) -> None:
    state: Any = None
    call: Call | None = None
    static = way.per_m or settings.static
    for m in rows:
        entry = found[m][way.name] = Entry(another=way.another)
        cliff = _cliff(found, way.name, m)
        if cliff is not None:
            entry.status = f"skipped: over {SLOW} times as slow as fx_quant at m = {cliff}"
            continue
        x = activation(m, case.k, case.torch_dtype)
        if not static:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            if state is None or static:
                state = way.prepare(case, layers) if state is None else state
                call = way.finish(case, state, x)
            assert call is not None
            got = call(x)
            entry.error = relative_error([torch.as_tensor(y) for y in got], right[m, way.exact])
            start = time.perf_counter()
            call(x)
            entry.once = time.perf_counter() - start
        except ImportError as error:
            entry.status = f"needs {error.name or error}"
        except Exception as error:  # noqa: BLE001  (a peer may fail in any way; the table says how)
            entry.status = failure(error)
        else:
            if not entry.error <= way.tolerance(case):
                entry.status = "wrong"
            entry.run = partial(call, x)


def failure(error: Exception) -> str:
    """The state of a way that raised ``error``."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _cliff(found: dict[int, dict[str, Entry]], name: str, m: int) -> int | None:
    """The fewer rows at which the way ``name`` was hopelessly slow, if it was."""
    if name in ALWAYS:
        return None
    for fewer in sorted(each for each in found if each < m):
        entry, ours = found[fewer].get(name), found[fewer].get("fx_quant")
        if entry and ours and entry.once > SLOW * ours.once > 0:
            return fewer
    return None


def warm_path() -> Callable[[], None]:
    """A call that leaves weights out of the cache and the way to a kernel in it.

    The weights of the ways, which take turns, drive the interpreter and PyTorch's dispatch out of the cache each time.
    In a model one call covers all layers, so a linear that pays for that alone would be timed as something else.
    """
    linear, x = nn.Linear(64, 64), torch.randn(4, 64)
    narrow, y = nn.Linear(64, 64).to(torch.bfloat16), x.to(torch.bfloat16)
    compiled = torch.compile(linear, dynamic=False)
    compiled(x)

    def call() -> None:
        for _ in range(3):
            compiled(x)
            linear(x)
            narrow(y)
            torch.empty(4, 64)

    return call


def timed(
    entries: dict[str, Entry],
    around: dict[str, Ceiling],
    evict: Callable[[], object],
    warm: Callable[[], object],
    settings: Settings,
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a call of each entry, and the rate of each ceiling, all in turns.

    What takes over ``SLOW`` times the median of its first call is left at that call.
    """
    clock = time.process_time if settings.cpu_time else time.perf_counter
    runs = {name: entry.run for name, entry in entries.items() if entry.run is not None}
    usual = statistics.median(entries[name].once for name in runs)
    once = {name: entries[name].once for name in runs if entries[name].once > SLOW * usual}
    runs = {name: run for name, run in runs.items() if name not in once}
    for name in list(runs):
        # A way that compiles again when it is called again would be timed as something else than what was compared.
        with torch.compiler.set_stance("fail_on_recompile"):
            try:
                runs[name]()
            except Exception as error:  # noqa: BLE001
                entries[name].status = failure(error)
                del runs[name]
    taken: dict[str, list[float]] = {name: [] for name in (*runs, *around)}
    end, rounds = time.perf_counter() + settings.seconds, 0
    while rounds < 5 or (rounds < 100 and time.perf_counter() < end):
        # Once a round; and whoever comes next changes.
        evict()
        turns = [*runs.items(), *((name, ceiling.run) for name, ceiling in around.items())]
        first = rounds % len(turns)
        for name, run in turns[first:] + turns[:first]:
            warm()
            start = clock()
            run()
            taken[name].append(clock() - start)
        rounds += 1
    medians = {name: statistics.median(taken[name]) for name in runs}
    rates = {name: ceiling.amount / statistics.median(taken[name]) / 1e9 for name, ceiling in around.items()}
    return {**medians, **once}, rates


@torch.no_grad()
def measure(case: Case, settings: Settings) -> list[dict[str, Any]]:
    """One row for each m of ``case``: milliseconds, errors and states of the ways, and the ceilings of that moment."""
    torch.set_num_threads(case.threads)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run eagerly and be timed
    kind, cache = KINDS[case.scheme], settings.cache or last_level_cache()
    first = make_operands(kind, case.dtype, case.n, case.k, 0)
    count = layers_needed(first.nbytes, cache)
    layers = [first, *(make_operands(kind, case.dtype, case.n, case.k, seed) for seed in range(1, count))]
    nbytes = first.nbytes
    found = prepare(case, layers, settings)
    counts = {wide: _count(case, layers, wide=wide) for wide in (False, True)}
    del layers, first

    buffer = Buffer(max(512 * MIB, 16 * cache), huge=True)  # an eighth, which is read at a time, evicts the cache
    warm = warm_path()
    rows = []
    for m in sorted(case.rows):
        used = counts[m >= WIDE]
        with locked(settings.lock, alone=True):
            instruction = fastest(kind.instruction[case.dtype != "bfloat16"], case.threads)
            around = {"read": reading(buffer, case.threads)}
            compute = peak(instruction, case.threads)
            if compute is not None:
                around["peak"] = compute
            cold = used * nbytes < 4 * cache and m < WIDE
            evict = around["read"].run if cold else lambda: None
            seconds, rates = timed(found[m], around, evict, warm, settings)
        ways = {
            name: {
                "status": entry.status,
                "error": entry.error,
                "another": entry.another,
                "ms": 1e3 * seconds[name] / used if name in seconds else None,
            }
            for name, entry in found[m].items()
        }
        row = {"threads": case.threads, "scheme": case.scheme, "dtype": case.dtype, "n": case.n, "k": case.k, "m": m}
        row |= {
            "layers": used,
            "bytes": nbytes,
            "cache": cache,
            "ceilings": {**rates, "instruction": instruction},
            "ways": ways,
        }
        rows.append(row)
    return rows


def from_json(kind: type[Found], fields: dict[str, Any]) -> Found:
    """A ``kind`` of ``fields``, whose tuples became lists in JSON."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def main() -> None:
    """Measure the case of the file, and put its rows in."""
    path = Path(sys.argv[1])
    asked = json.loads(path.read_text())
    case, settings = from_json(Case, asked["case"]), from_json(Settings, asked["settings"])
    path.write_text(json.dumps({"rows": measure(case, settings)}))


if __name__ == "__main__":
    main()
