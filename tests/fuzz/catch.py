"""How many programs it takes to see each planted mistake."""

from __future__ import annotations

import functools

from tests.fuzz.grammar import draw
from tests.fuzz.oracle import Judge
from tests.fuzz.planted import Plant

# How many programs are drawn at most.
MOST = 400


@functools.lru_cache(maxsize=MOST)
def _judge(seed: int) -> Judge | None:
    """The program of ``seed``, traced; the same for every plant."""
    try:
        return Judge(draw(seed))
    except Exception:
        return None


def shows(seed: int, plant: Plant) -> bool:
    """Whether the program of ``seed`` shows the mistake."""
    judge = _judge(seed)
    if judge is None:
        return False
    with plant.planted():
        faults = {fault.key for fault in judge.outcome_now().faults}
    # What is wrong without the mistake too does not count.
    return bool(faults and faults - {fault.key for fault in judge.outcome_now().faults})


def graphs_to_catch(plant: Plant, most: int) -> int | None:
    """How many programs are drawn until one shows the mistake; None where ``most`` do not."""
    return next((seed + 1 for seed in range(most) if shows(seed, plant)), None)
