"""Many named jobs in a few processes, each job in one of them, though a job may end its process."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def in_workers(
    names: Sequence[str],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    jobs: int,
    done: Callable[[str, Any], None],
    died: Callable[[str, BaseException], None],
) -> None:
    """Call ``done`` with ``work(name, *arguments)`` of each of ``names`` as it ends, ``died`` where its process did.

    A worker that dies takes the others' jobs with it, so each of those left then has a worker to itself.
    """
    left = dict.fromkeys(names)

    def ended(name: str, result: Any) -> None:
        del left[name]
        done(name, result)

    with contextlib.suppress(BrokenProcessPool):
        _in_one_pool(names, work, arguments, jobs, ended)
    for name in list(left):
        try:
            _in_one_pool([name], work, arguments, 1, ended)
        except BrokenProcessPool as error:
            died(name, error)


def _in_one_pool(
    names: Sequence[str],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    jobs: int,
    ended: Callable[[str, Any], None],
) -> None:
    """Call ``ended`` with the result of each of ``names`` as it is done.

    Raises:
        BrokenProcessPool: a worker died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(jobs, len(names))), context, initializer=_quiet) as pool:
        futures = {pool.submit(work, name, *arguments): name for name in names}
        for future in as_completed(futures):
            ended(futures[future], future.result())


def _quiet() -> None:
    """A worker with one thread, which leaves the talking to the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
