"""The variants of a model, each in a process of its own that stays, taking turns.

What one minute of a shared machine gives to one variant, the next gives to another: only times of turns that alternate
can be compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent / "cpu_models.py"


FAILED = "failed: see the standard error"


# glibc asks for huge pages for what it allocates, and PyTorch for its tensors.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


def environment(threads: int, *, huge_pages: bool = False) -> dict[str, str]:
    """Variables of a process that runs on ``threads``, in huge pages where asked and where the kernel has them."""
    # The runtimes' thread pools read the number when they are loaded; torch is told again.
    usual = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    return usual | _HUGE_PAGES if huge_pages else usual


class Ended(Exception):
    """The process of a variant ended, or took too long."""


class Running:
    """The process of one variant.

    Args:
        asked: arguments of ``cpu_models.turns``.
        folder: for what it reads, prints and compiles; a compile time is that of a first compile.
        timeout: seconds that it may take to prepare, and for each turn.
    """

    def __init__(self, asked: Mapping[str, Any], folder: Path, timeout: float) -> None:
        self.log, self.timeout = folder / "log", timeout
        path = folder / "asked.json"
        path.write_text(json.dumps(asked))
        env = environment(asked["threads"], huge_pages=asked.get("huge_pages", False)) | {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")
        }
        with self.log.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(path)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def result(self) -> dict[str, Any]:
        """The next line that it says.

        Raises:
            Ended: there is none; the end of what it printed says why.
        """
        assert self.process.stdout is not None
        late = threading.Timer(self.timeout, self.process.kill)
        late.start()
        line = self.process.stdout.readline()
        late.cancel()
        if not line:
            raise Ended(f"the process ended with {self.process.wait()}:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def turn(self) -> dict[str, list[float]]:
        """Seconds of the calls of each phase.

        Raises:
            Ended: as for ``result``.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the result says why
            print(file=self.process.stdin, flush=True)
        return self.result()

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def started(asked: Mapping[str, Any], timeout: float) -> Iterator[Running]:
    """A variant that runs until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        running = Running(asked, Path(folder), timeout)
        try:
            yield running
        finally:
            running.end()


def measured(asked: Sequence[Mapping[str, Any]], rounds: int, timeout: float) -> list[dict[str, Any]]:
    """What became of each variant that was asked for, in order: the medians over all turns, and what preparing gave.

    They are prepared one after the other, so that each has the machine for itself. Who begins a round changes.
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        turns: dict[int, tuple[Running, dict[str, list[float]]]] = {}
        for i, each in enumerate(asked):
            print(f"{i + 1} of {len(asked)}: {each['model']}, {each['name']}", file=sys.stderr, flush=True)
            running = stack.enter_context(started(each, timeout))
            known = ("model", "threads", "layers", "prompt", "huge_pages")
            row = {"variant": each["name"], **{key: each[key] for key in known if key in each}}
            try:
                rows.append(running.result())
            except Ended as error:
                rows.append(row | {"status": FAILED})
                print(error, file=sys.stderr, flush=True)
            if rows[-1]["status"] in ("ok", "wrong"):
                turns[i] = running, {phase: [] for phase in rows[-1]["tokens"]}
        for at in range(rounds):
            print(f"round {at + 1} of {rounds}", file=sys.stderr, flush=True)
            order = list(turns)
            for i in order[at % max(1, len(order)) :] + order[: at % max(1, len(order))]:
                running, taken = turns[i]
                try:
                    for phase, seconds in running.turn().items():
                        taken[phase] += seconds
                except Ended as error:
                    rows[i]["status"] = FAILED
                    print(error, file=sys.stderr, flush=True)
                    del turns[i]
        for i, (_, taken) in turns.items():
            rows[i]["s"] = {phase: statistics.median(seconds) for phase, seconds in taken.items()}
            rows[i]["tokens_per_s"] = {phase: rows[i]["tokens"][phase] / s for phase, s in rows[i]["s"].items()}
    return rows
