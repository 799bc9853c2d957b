"""The benchmark of the passes' time: its split by step, and its figures of growth."""

from __future__ import annotations

import gc
import math

import pytest

pytest.importorskip("torchao")
pytest.importorskip("transformers")

from benchmarks.pass_time import STEPS, Stopwatch, capture, growth, time_passes
from fx_quant.passes import pipeline
from fx_quant.target import named_target


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_step_within_a_step_is_charged_to_itself_only():
    clock = Clock()
    watch = Stopwatch(clock)

    def tick(seconds):
        clock.now += seconds

    def outer():
        tick(1)
        watch.timed("select", tick)(10)
        tick(2)

    with watch.running():
        watch.timed("sites", outer)()
        tick(4)
    ms = watch.ms()
    assert (ms["sites"], ms["select"], ms["rest"], ms["passes"]) == (3000, 10000, 4000, 17000)
    assert all(
        getattr(pipeline, name).__module__ != "benchmarks.pass_time" for names in STEPS.values() for name in names
    )


def test_the_collector_is_a_step_of_its_own():
    watch = Stopwatch(Clock())
    before = list(gc.callbacks)
    with watch.running():
        assert len(gc.callbacks) == len(before) + 1
    assert gc.callbacks == before


@pytest.mark.parametrize("was_on", [True, False])
def test_the_passes_leave_the_collector_as_it_was(was_on):
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(AssertionError), pipeline.collector_paused():
            assert gc.isenabled(), "so that the block ends by an exception"
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


@pytest.mark.parametrize("exponent", [1, 2])
def test_growth_is_the_exponent(exponent):
    assert growth([8, 16, 64], [3 * n**exponent for n in (8, 16, 64)]) == pytest.approx(exponent)
    assert math.isnan(growth([8], [1.0]))


@pytest.mark.slow
def test_every_step_of_the_passes_is_seen():
    captured = capture(2, "int8", dynamic=False)
    ms, counts = time_passes(captured, named_target("x86_vnni"), repeats=1)
    assert counts == {"sites": 14, "recognised": 0, "misses": 0}
    assert all(ms[step] > 0 for step in STEPS)
    assert sum(taken for step, taken in ms.items() if step != "passes") == pytest.approx(ms["passes"])
    assert ms["rest"] < ms["passes"] / 3
