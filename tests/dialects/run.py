"""Many flows in a few processes, each flow in one of them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tests.dialects.outcome import Outcome, Verdict, failed
from tests.dialects.registry import Flow, load
from tests.dialects.table import summary


def run(
    flows: Sequence[Flow], which: str, target: str | None, numbers: bool, jobs: int, progress: Callable[[str], None]
) -> dict[str, list[Outcome]]:
    """The outcomes of each flow in ``few`` or ``all`` of its variants, by name; an unavailable flow has none.

    Args:
        progress: called with a line as each flow is done.
    """
    waiting = [flow.name for flow in flows if not flow.missing()]
    done: dict[str, list[Outcome]] = {}

    def note(name: str, outcomes: list[Outcome]) -> None:
        done[name] = outcomes
        took = sum(each.seconds for each in outcomes)
        progress(f"[{len(done)}/{len(waiting)}] {name}: {summary(outcomes)} ({took:.1f} s)")

    with contextlib.suppress(BrokenProcessPool):
        _in_processes(waiting, jobs, (which, target, numbers), note)
    # A worker that dies takes the others' flows with it, so each of those left has a worker to itself.
    for name in [name for name in waiting if name not in done]:
        try:
            _in_processes([name], 1, (which, target, numbers), note)
        except BrokenProcessPool as error:
            note(name, [Outcome(name, which, Verdict.FAILED, False, reasons=(failed(error),))])
    return {flow.name: done.get(flow.name, []) for flow in flows}


def _in_processes(
    names: Sequence[str],
    jobs: int,
    arguments: tuple[str, str | None, bool],
    note: Callable[[str, list[Outcome]], None],
) -> None:
    """Call ``note`` with the outcomes of each flow in ``names`` as it is done.

    Raises:
        BrokenProcessPool: a worker died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(jobs, len(names))), context, initializer=_quiet) as pool:
        futures = {pool.submit(outcomes_of, name, *arguments): name for name in names}
        for future in as_completed(futures):
            note(futures[future], future.result())


def outcomes_of(name: str, which: str, target: str | None, numbers: bool) -> list[Outcome]:
    """The outcomes of one flow, in this process."""
    from tests.dialects.capture import capture

    flow = load()[name]
    return [capture(flow, variant, target=target, numbers=numbers) for variant in flow.variants(which)]


def _quiet() -> None:
    """A worker with one thread, which leaves the talking to the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
