"""Fake values made again look, and share memory, as those that the ops give."""

from __future__ import annotations

import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fx_quant.passes.fakes import FakeCalls

aten, prims = torch.ops.aten, torch.ops.prims
CALLS = {
    "permute": (aten.permute.default, lambda x: (x, [1, 0])),
    "reshape_view": (aten.reshape.default, lambda x: (x, [-1])),
    "reshape_copy": (aten.reshape.default, lambda x: (x.t(), [-1])),
    "expand": (aten.expand.default, lambda x: (x[:, :1], [4, 7])),
    "slice": (aten.slice.Tensor, lambda x: (x, 1, 2, 5)),
    "cast": (prims.convert_element_type.default, lambda x: (x, torch.float64)),
    "matmul": (aten.mm.default, lambda x: (x, x.t())),
    "scalar": (aten.sum.default, lambda x: (x,)),
    "list": (aten.split.Tensor, lambda x: (x, 2)),
    "tuple": (aten.max.dim, lambda x: (x, 1)),
    "empty": (aten.mm.default, lambda x: (x[:0], x.t())),
}


def look(value):
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.layout


def many(value):
    return value if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("name", CALLS)
def test_a_value_made_again_is_as_the_op_gives_it(name):
    target, given = CALLS[name]
    with FakeTensorMode() as mode:
        operands = [given(torch.empty(4, 8)) for _ in range(3)]
    call = FakeCalls(mode)
    for args in operands:
        made = many(call(target, args, {}))
        with mode:
            expected = many(target(*args))
        for one, other in zip(made, expected, strict=True):
            assert type(one) is FakeTensor
            assert one.fake_mode is mode
            assert look(one) == look(other)
            for tensor in (each for each in args if isinstance(each, torch.Tensor)):
                memory = tensor.untyped_storage()._cdata
                shares = (one.untyped_storage()._cdata == memory, other.untyped_storage()._cdata == memory)
                assert shares[0] == shares[1]
    made = [each for args in operands for each in many(call(target, args, {}))]
    assert len({each.untyped_storage()._cdata for each in made}) >= 3, "two calls share no memory"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: (x, 1), lambda x: (x, 1.0)),
        (lambda x: (x, 1), lambda x: (x.double(), 1)),
        (lambda x: (x, 1), lambda x: (x.t(), 1)),
        (lambda x: (x, x), lambda x: (x, x[:1])),
        (lambda x: (x[:1], x), lambda x: (x, x[:1])),
    ],
)
def test_operands_that_differ_are_asked_anew(one, other):
    with FakeTensorMode() as mode:
        x = torch.empty(4, 8, dtype=torch.int32)
    call = FakeCalls(mode)
    for operands in (one, other, one):
        with mode:
            args = operands(x)
            expected = aten.add.Tensor(*args)
        assert look(call(aten.add.Tensor, args, {})) == look(expected)


def test_no_op_runs_twice_on_operands_that_look_alike(monkeypatch):
    ran = []
    with FakeTensorMode() as mode:
        operands = [torch.empty(4, 8) for _ in range(3)]
    call = FakeCalls(mode)

    def op(x):
        ran.append(x)
        return x + 1

    for x in operands:
        call(op, (x,), {})
    assert len(ran) == 1


def test_symbolic_sizes_are_asked_each_time():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    call = FakeCalls(mode)
    for rows in (3, 5):
        x = mode.from_tensor(torch.empty(rows, 8), symbolic_context=context)
        made = call(aten.permute.default, (x, [1, 0]), {})
        assert made.shape[1].node.expr == x.shape[0].node.expr


def test_an_element_of_a_list_is_that_element():
    with FakeTensorMode() as mode:
        pair = [torch.empty(2), torch.empty(3)]
    call = FakeCalls(mode)
    assert [call(operator.getitem, (pair, i), {}) is pair[i] for i in (0, 1)] == [True, True]
