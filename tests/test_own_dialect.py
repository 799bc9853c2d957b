"""Dialects from outside: what they say is read, one op has one of them, and a cached graph is that of the same dialects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fx_quant.errors import FxQuantError
from fx_quant.passes import dialects
from fx_quant.passes.dialects import register_dialect, registered
from fx_quant.passes.rulebook import rule_of, starts_codes
from fx_quant.passes.values import Unknown


def _rule(_, node):
    return Unknown(node, "told so")


@pytest.fixture(autouse=True)
def _as_before():
    yield
    register_dialect("acme")
    assert registered() == ()


def _node(target):
    graph = torch.fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"),))


class Named:
    """An op that prints as its library names it."""

    def __init__(self, name):
        self.name = self.__name__ = name

    def __str__(self):
        return self.name

    def __call__(self, *_):
        return None


def test_a_dialect_is_read_at_once_and_a_later_one_takes_its_place():
    node = _node(Named("acme.unpack.default"))
    assert rule_of(node) is None and not starts_codes(node)
    register_dialect("acme", rules={"acme.unpack.default": _rule})
    assert rule_of(node) is _rule and starts_codes(node)
    assert registered() == (("acme", ("acme.unpack.default",)),)
    register_dialect("acme", matmul_rules={"acme.mm.default": _rule})
    assert rule_of(node) is None
    assert registered() == (("acme", ("acme.mm.default",)),)


def test_an_op_has_one_dialect():
    before = dict(dialects.MATMUL_RULES)
    with pytest.raises(FxQuantError, match=r"'?quanto.qbytes_mm.default has one already"):
        register_dialect("acme", matmul_rules={"quanto.qbytes_mm.default": _rule})
    assert before == dialects.MATMUL_RULES


def test_what_is_cached_knows_the_dialects_from_outside():
    from fx_quant.backend import inductor_pass

    before = inductor_pass().uuid()
    register_dialect("acme", own_kernels={"acme.linear.default": "Acme's own linear"})
    assert inductor_pass().uuid() != before
    register_dialect("acme")
    assert inductor_pass().uuid() == before


def test_what_an_entry_point_names_is_loaded_before_a_graph_is_read(monkeypatch):
    class Point:
        def load(self):
            register_dialect("acme", rules={"acme.unpack.default": _rule})

    real = dialects.importlib.metadata.entry_points

    def found(**asked):
        return [Point()] if asked.get("group") == "fx_quant.dialects" else real(**asked)

    monkeypatch.setattr(dialects.importlib.metadata, "entry_points", found)
    dialects.load_dialects.cache_clear()
    try:
        import fx_quant

        fx_quant.explain(nn.ReLU(), torch.ones(2))
        assert registered() == (("acme", ("acme.unpack.default",)),)
    finally:
        dialects.load_dialects.cache_clear()
