"""Random programs mean what they meant and nothing is passed over, and every mistake planted in a rule is seen by them.

``python -m tests.fuzz --graphs 20000 --jobs 2`` looks at more of them.
"""

from __future__ import annotations

import logging
import os

import pytest
import torch

from tests.fuzz.catch import MOST, graphs_to_catch, shows
from tests.fuzz.grammar import draw
from tests.fuzz.oracle import judge
from tests.fuzz.planted import PLANTS
from tests.fuzz.run import smallest

GRAPHS = int(os.environ.get("FX_QUANT_EXAMPLES", "80"))

# The first program that showed each mistake when last looked for, so that it need not be looked for. Where the programs
# have changed since, it is: `python -m tests.promises` prints how many each takes.
SEEDS = {
    "axis": 15,
    "alpha": 11,
    "zero point": 26,
    "identities": 0,
    "random": 12,
    "blocks": 83,
    "int32": 41,
    "offset": 1,
    "float offset": 27,
    "point and offset": 119,
    "bias": 80,
    "groups": 13,
    "layout": 12,
    "slice": 55,
    "part": 42,
    "columns": 1,
    "inverse": 26,
    "class": 1,
    "correction": 12,
    "range": 37,
    "stale": 6,
    "padding": 204,
    "exact codes": 58,
}


@pytest.fixture(autouse=True)
def _quick():
    """One thread, as tensors are tiny, and no records of PyTorch's tracing, which pytest would keep."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def test_nothing_is_wrong_with_random_programs():
    for seed in range(GRAPHS):
        outcome = judge(draw(seed))
        if outcome.faults:
            fault = outcome.faults[0]
            pytest.fail(f"seed {seed}: {fault.kind} ({fault.where}): {fault.what}\n{smallest(draw(seed), fault)}")


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "_"))
def test_random_programs_show_a_planted_mistake(plant, record_property):
    if plant.name in SEEDS and shows(SEEDS[plant.name], plant):
        return
    needed = graphs_to_catch(plant, MOST)
    record_property("graphs", needed)
    assert needed is not None, f"{MOST} programs do not show that {plant.what}"


def test_a_program_is_what_its_seed_says():
    assert str(draw(7)) == str(draw(7))
    assert str(draw(7)) != str(draw(8))
