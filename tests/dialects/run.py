"""Many flows in a few processes, each flow in one of them."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence

from tests.dialects.outcome import Outcome
from tests.dialects.registry import Flow, load
from tests.dialects.table import summary


def run(
    flows: Sequence[Flow], which: str, target: str | None, numbers: bool, jobs: int, progress: Callable[[str], None]
) -> dict[str, list[Outcome]]:
    """The outcomes of each flow in ``few`` or ``all`` of its variants, by name; an unavailable flow has none.

    Args:
        progress: called with a line as each flow is done.
    """
    outcomes: dict[str, list[Outcome]] = {flow.name: [] for flow in flows}
    waiting = [flow.name for flow in flows if not flow.missing()]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, jobs), context, initializer=_quiet) as pool:
        futures = {pool.submit(outcomes_of, name, which, target, numbers): name for name in waiting}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            name = futures[future]
            outcomes[name] = future.result()
            took = sum(each.seconds for each in outcomes[name])
            progress(f"[{done}/{len(waiting)}] {name}: {summary(outcomes[name])} ({took:.1f} s)")
    return outcomes


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
