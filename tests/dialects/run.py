"""Many flows in a few processes, each flow in one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.dialects.outcome import Outcome, Verdict, failed
from tests.dialects.registry import Flow, load
from tests.dialects.table import summary
from tests.workers import in_workers


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

    def died(name: str, error: BaseException) -> None:
        note(name, [Outcome(name, which, Verdict.FAILED, False, reasons=(failed(error),))])

    in_workers(waiting, outcomes_of, (which, target, numbers), jobs, note, died)
    return {flow.name: done.get(flow.name, []) for flow in flows}


def outcomes_of(name: str, which: str, target: str | None, numbers: bool) -> list[Outcome]:
    """The outcomes of one flow, in this process."""
    from tests.dialects.capture import capture

    flow = load()[name]
    return [capture(flow, variant, target=target, numbers=numbers) for variant in flow.variants(which)]
