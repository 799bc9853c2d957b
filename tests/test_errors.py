"""Errors: what an unknown name is answered, and what each error can be caught as."""

from __future__ import annotations

import pytest

from fx_quant.errors import (
    FxQuantError,
    MissError,
    NoKernelError,
    ToleranceError,
    UnknownNameError,
    must,
    unknown_name,
)
from fx_quant.loading.adapters.base import NotSwappableError
from fx_quant.loading.checkpoint_values import CheckpointError
from fx_quant.weights import WeightError


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("sm9", ["sm90", "x86"], "unknown target 'sm9'. Did you mean 'sm90'? Known: sm90, x86."),
        ("zzz", ["sm90", "x86"], "unknown target 'zzz'. Known: sm90, x86."),
        ("zzz", [], "unknown target 'zzz'. Known: none."),
        ("ab", ["abd", "abc"], "unknown target 'ab'. Did you mean 'abd' or 'abc'? Known: abc, abd."),
    ],
)
def test_an_unknown_name_is_answered_with_near_and_known_names(name, known, message):
    assert str(unknown_name("target", name, known)) == message


def test_unknown_name_takes_any_iterable_once():
    assert "Known: a, b." in str(unknown_name("option", "c", iter(["b", "a"])))


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(UnknownNameError, ValueError), (NoKernelError, ValueError), (ToleranceError, AssertionError)],
)
def test_an_error_is_also_the_builtin_that_callers_expect(error, builtin):
    assert issubclass(error, builtin)


@pytest.mark.parametrize("error", [UnknownNameError, MissError, NoKernelError, ToleranceError])
def test_every_error_can_be_caught_as_one(error):
    assert issubclass(error, FxQuantError)


@pytest.mark.parametrize("message", ["x must be 1, got 2", lambda: "x must be 1, got 2"], ids=["text", "function"])
@pytest.mark.parametrize("error", [ValueError, CheckpointError, WeightError, NotSwappableError])
def test_what_must_hold_raises_the_error_that_is_asked_for(error, message):
    must(True, lambda: pytest.fail("asked for a message that nobody reads"), error)
    with pytest.raises(error, match="^x must be 1, got 2$"):
        must(False, message, error)
