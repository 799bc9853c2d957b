"""However the arguments of an op are spelled, and whatever they are: a rewrite means the same, or is not made.

The calls are generated from the schemas of the ops that have a rule: each argument by position and by name, at its
default and at other values. A new rule is tested by being there.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from fx_quant.passes.nodes import arguments, spell_by_schema
from fx_quant.passes.rulebook import _RULES
from tests.graphs import assert_same_meaning, prove, run

aten, prims = torch.ops.aten, torch.ops.prims
INT8, UINT8, INT32, INT64, F32 = torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32
SIZE = 4
pytestmark = pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")


class Writer:
    """A graph that is written call by call, with its fake values."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.graph, self.mode = Graph(), FakeTensorMode()
        self.inputs = [self._placeholder(i, x) for i, x in enumerate(inputs)]

    def _placeholder(self, i: int, x: Tensor) -> Node:
        node = self.graph.placeholder(f"a{i}")
        node.meta["val"] = self.mode.from_tensor(x)
        return node

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node


def written(build: Callable[..., Node], inputs: tuple[Tensor, ...]) -> Graph:
    write = Writer(inputs)
    out = build(write, *write.inputs)
    write.graph.output([out])
    return write.graph


@dataclass(frozen=True)
class Call:
    """A call of an op in a graph that a rule may prove.

    Args:
        given: the required arguments by name, each made of ``(write, a, w, s)``: codes ``a`` and ``w`` ``[4, 4]``, int8,
            and scales ``s`` ``[4]``.
        then: what becomes of the result; a float matrix that is returned.
    """

    given: Callable[..., dict[str, Any]]
    then: Callable[..., Node]


def returned(write: Writer, out: Node, w: Node) -> Node:
    return out


def wide(write: Writer, x: Node) -> Node:
    return write(prims.convert_element_type.default, x, F32)


def as_activation(write: Writer, out: Node, w: Node) -> Node:
    """The result times the weight, in float32."""
    return write(aten.mm.default, wide(write, out), wide(write, w))


def in_float(write: Writer, out: Node, w: Node) -> Node:
    return wide(write, out)


def sums_of(write: Writer, out: Node, w: Node) -> Node:
    """``a @ w - 3 * out``, where ``out`` may be the sums of ``w``."""
    product = write(aten._int_mm.default, write.inputs[0], w)
    return wide(write, write(aten.sub.Tensor, product, write(aten.mul.Tensor, out, 3)))


def selfed(**more: Any) -> Callable[..., dict[str, Any]]:
    return lambda write, a, w, s: {"self": wide(write, a), **more}


def product(write: Writer, a: Node, w: Node) -> Node:
    return write(aten._int_mm.default, a, w)


def zero_point(write: Writer, a: Node, w: Node, s: Node) -> dict[str, Any]:
    return {"self": write(prims.convert_element_type.default, a, INT32), "other": 3}


VIEWED = as_activation
CALLS: dict[Any, list[Call]] = {
    aten.mm.default: [Call(lambda write, a, w, s: {"self": wide(write, a), "mat2": wide(write, w)}, returned)],
    aten._int_mm.default: [Call(lambda write, a, w, s: {"self": a, "mat2": w}, in_float)],
    aten.addmm.default: [
        Call(lambda write, a, w, s: {"self": s, "mat1": wide(write, a), "mat2": wide(write, w)}, returned)
    ],
    aten.mv.default: [
        Call(
            lambda write, a, w, s: {"self": wide(write, w), "vec": write(aten.select.int, wide(write, a), 0, 0)},
            returned,
        )
    ],
    aten.baddbmm.default: [
        Call(
            lambda write, a, w, s: {
                "self": s,
                "batch1": write(aten.unsqueeze.default, wide(write, a), 0),
                "batch2": write(aten.unsqueeze.default, wide(write, w), 0),
            },
            returned,
        )
    ],
    aten.select.int: [
        Call(
            lambda write, a, w, s: {"self": write(aten.unsqueeze.default, a, 0), "dim": 0, "index": 0},
            as_activation,
        )
    ],
    aten.clamp_min.default: [Call(lambda write, a, w, s: {"self": wide(write, a), "min": -8}, as_activation)],
    aten.bmm.default: [
        Call(
            lambda write, a, w, s: {
                "self": write(aten.unsqueeze.default, wide(write, a), 0),
                "mat2": write(aten.unsqueeze.default, wide(write, w), 0),
            },
            returned,
        )
    ],
    aten._weight_int8pack_mm.default: [
        Call(lambda write, a, w, s: {"self": wide(write, a), "mat2": w, "scales": s}, returned)
    ],
    aten.sum.dim_IntList: [
        Call(lambda write, a, w, s: {"self": w, "dim": [0], "dtype": INT32}, sums_of),
        Call(lambda write, a, w, s: {"self": w, "dim": [1], "dtype": INT32}, sums_of),
        Call(lambda write, a, w, s: {"self": w, "dim": None, "dtype": INT32}, sums_of),
    ],
    aten.expand.default: [Call(selfed(size=[SIZE, SIZE]), VIEWED)],
    aten.view.default: [Call(selfed(size=[SIZE, SIZE]), VIEWED)],
    aten.reshape.default: [Call(selfed(shape=[SIZE, SIZE]), VIEWED)],
    aten._unsafe_view.default: [Call(selfed(size=[SIZE, SIZE]), VIEWED)],
    aten.unsqueeze.default: [
        Call(selfed(dim=0), lambda write, out, w: VIEWED(write, write(aten.squeeze.dim, out, 0), w))
    ],
    aten.squeeze.default: [Call(selfed(), VIEWED)],
    aten.squeeze.dim: [Call(selfed(dim=0), VIEWED)],
    aten.squeeze.dims: [Call(selfed(dim=[0]), VIEWED)],
    aten.permute.default: [Call(selfed(dims=[1, 0]), VIEWED), Call(selfed(dims=[-2, -1]), VIEWED)],
    aten.t.default: [Call(selfed(), VIEWED)],
    aten.transpose.int: [Call(selfed(dim0=0, dim1=1), VIEWED), Call(selfed(dim0=-1, dim1=-1), VIEWED)],
    aten.clone.default: [Call(selfed(), VIEWED)],
    aten.alias.default: [Call(selfed(), VIEWED)],
    aten.detach.default: [Call(selfed(), VIEWED)],
    aten.lift_fresh_copy.default: [Call(selfed(), VIEWED)],
    prims.convert_element_type.default: [Call(lambda write, a, w, s: {"a": a, "dtype": F32}, VIEWED)],
    aten._to_copy.default: [Call(lambda write, a, w, s: {"self": a, "dtype": F32}, VIEWED)],
    aten.slice.Tensor: [Call(selfed(), VIEWED)],
    aten.bitwise_and.Scalar: [Call(lambda write, a, w, s: {"self": a, "other": 15}, as_activation)],
    aten.bitwise_and.Tensor: [Call(lambda write, a, w, s: {"self": a, "other": w}, as_activation)],
    aten.__and__.Scalar: [Call(lambda write, a, w, s: {"self": a, "other": 15}, as_activation)],
    **{
        op: [
            Call(
                lambda write, a, w, s, bits=bits: {
                    "self": write(prims.convert_element_type.default, a, UINT8),
                    "other": bits,
                },
                as_activation,
            )
            for bits in (4, 0)
        ]
        for op in (aten.bitwise_right_shift.Tensor_Scalar, aten.__rshift__.Scalar)
    },
    aten.bitwise_right_shift.Tensor: [
        Call(
            lambda write, a, w, s: {
                "self": write(prims.convert_element_type.default, a, UINT8),
                "other": write(aten.full.default, [], 4, dtype=UINT8),
            },
            as_activation,
        )
    ],
    aten.cat.default: [
        Call(
            lambda write, a, w, s: {"tensors": [write(aten.slice.Tensor, a, 0, 0, 2)] * 2},
            lambda write, out, w: as_activation(write, write(aten.reshape.default, out, [-1, SIZE]), w),
        )
    ],
    aten.stack.default: [
        Call(
            lambda write, a, w, s: {"tensors": [a, a]},
            lambda write, out, w: as_activation(write, write(aten.reshape.default, out, [-1, SIZE]), w),
        )
    ],
    aten.index.Tensor: [
        Call(
            lambda write, a, w, s: {
                "self": s,
                "indices": [write(prims.convert_element_type.default, write(aten.bitwise_and.Scalar, a, 3), INT64)],
            },
            as_activation,
        )
    ],
    aten.clamp.default: [Call(lambda write, a, w, s: {"self": wide(write, a), "min": -8, "max": 7}, as_activation)],
    aten.clamp_max.default: [Call(lambda write, a, w, s: {"self": wide(write, a), "max": 7}, as_activation)],
    aten.addcmul.default: [
        Call(lambda write, a, w, s: {"self": s, "tensor1": wide(write, product(write, a, w)), "tensor2": s}, returned)
    ],
}
for _op in (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar):
    CALLS[_op] = [Call(zero_point, as_activation), Call(selfed(other=3), as_activation)]
for _op in (aten.add.Tensor, aten.sub.Tensor):
    # A bias, and a correction.
    CALLS[_op] += [
        Call(lambda write, a, w, s: {"self": wide(write, product(write, a, w)), "other": s}, returned),
        Call(
            lambda write, a, w, s: {
                "self": product(write, a, w),
                "other": write(aten.mul.Tensor, write(aten.sum.dim_IntList, w, [0], dtype=INT32), 3),
            },
            in_float,
        ),
    ]
for _op in (aten.mul.Tensor, aten.div.Tensor):
    CALLS[_op] = [
        Call(lambda write, a, w, s: {"self": wide(write, product(write, a, w)), "other": s}, returned),
        Call(selfed(other=2.0), as_activation),
    ]
for _op in (aten.mul.Scalar, aten.div.Scalar):
    CALLS[_op] = [Call(selfed(other=2.0), as_activation)]

# Ops whose rule proves nothing, or whose calls the dialects' own tests make.
NOTHING_TO_REWRITE = {
    operator.getitem,
    *(op for op in _RULES if "fake_quantize" in str(op)),
    # float8, which has tests of its own for each argument: tests/test_algebra_soundness.py
    aten._scaled_mm.default,
    *([aten._scaled_mm_v2.default] if hasattr(aten, "_scaled_mm_v2") else []),
}

NEVER_REWRITTEN = {
    aten.bitwise_and.Tensor,
    aten.index.Tensor,
    aten.clamp.default,
    aten.clamp_max.default,
    aten.clamp_min.default,
}


def values_of(argument: Any) -> list[Any]:
    """Values of an optional argument that are not its default."""
    kind = str(argument.type)
    if "dtype" in argument.name or "memory_format" in argument.name or "layout" in argument.name:
        return []
    by_kind = {
        "number": [2, 0.5],
        "Optional[number]": [2, 0.5],
        "bool": [True],
        "int": [1],
        "Optional[int]": [1],
        "SymInt": [2],
        "Optional[SymInt]": [1],
    }
    return [value for value in by_kind.get(kind, []) if value != argument.default_value]


def spellings(op: Any, given: dict[str, Any]) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """``(args, kwargs)`` with the arguments ``given``: the first few by position, the others by name."""
    schema = list(op._schema.arguments)
    positional = [argument for argument in schema if not argument.kwarg_only]
    for count in range(len(positional) + 1):
        first = positional[:count]
        filled = {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in first}
        args = tuple(filled.values())
        yield args, {name: value for name, value in given.items() if name not in filled}


def generated(op: Any, call: Call, number: int) -> Iterator[tuple[str, Callable[..., Node]]]:
    """Each spelling of the call with its required arguments, and with each optional argument at other values."""
    optional = [argument for argument in op._schema.arguments if argument.has_default_value()]
    changes: list[dict[str, Any]] = [{}, {a.name: a.default_value for a in optional}]
    changes += [{a.name: value} for a in optional for value in values_of(a)]
    for change, spelling in itertools.product(changes, range(len(op._schema.arguments) + 1)):

        def build(write, a, w, s, change=change, spelling=spelling):
            given = {**change, **call.given(write, a, w, s)}
            every = list(spellings(op, given))
            args, kwargs = every[min(spelling, len(every) - 1)]
            return call.then(write, write(op, *args, **kwargs), w)

        yield f"{number} {change} {spelling}", build


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    a, w = (torch.randint(-100, 100, (SIZE, SIZE), dtype=INT8) for _ in range(2))
    return a, w, torch.rand(SIZE) + 0.5


@pytest.mark.parametrize("op", CALLS, ids=str)
def test_every_spelling_and_value_of_an_argument_keeps_its_meaning(op):
    tried = rewritten = 0
    given = inputs()
    for number, call in enumerate(CALLS[op]):
        for name, build in generated(op, call, number):
            try:
                source = written(build, given)
                run(source, *given)
            except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
                continue  # a call that PyTorch refuses
            tried += 1
            proven = prove(source, static=(1, 2))
            rewritten += bool(proven.found.sites)
            try:
                assert_same_meaning(source, proven.graph, given)
            except AssertionError as error:
                raise AssertionError(f"{op} with {name}:\n{source}\n{proven.graph}\n{error}") from None
    assert tried, f"no call of {op} runs: its arguments here are wrong"
    assert rewritten or op in NEVER_REWRITTEN, f"no call of {op} is rewritten: its graph here is no test"


def test_every_op_with_a_rule_is_called_here():
    assert set(_RULES) <= set(CALLS) | NOTHING_TO_REWRITE | {aten.round.default}


@pytest.mark.parametrize("op", [aten.sub.Scalar, aten.sub.Tensor, aten.add.Scalar, aten.add.Tensor], ids=str)
def test_a_zero_point_times_alpha_is_none(op):
    def build(write, a, w, s):
        whole = write(prims.convert_element_type.default, a, INT32)
        moved = write(op, whole, 3, 2) if op in (aten.sub.Scalar, aten.add.Scalar) else write(op, whole, 3, alpha=2)
        return as_activation(write, moved, w)

    given = inputs()
    source = written(build, given)
    proven = prove(source, static=(1, 2))
    assert_same_meaning(source, proven.graph, given)
    assert [str(site.scheme) for site in proven.found.sites] == ["float32 x int8 unscaled"]


def test_arguments_have_the_names_of_the_schema_and_its_defaults():
    write = Writer(inputs())
    a = write.inputs[0]
    for node in (write(aten.sub.Scalar, a, 3, 2), write(aten.sub.Scalar, self=a, other=3, alpha=2)):
        assert arguments(node) == {"self": a, "other": 3, "alpha": 2}
    assert arguments(write(aten.sub.Tensor, a, a)) == {"self": a, "other": a, "alpha": 1}


def test_a_call_is_spelled_by_position_and_without_its_defaults():
    write = Writer(inputs())
    a = write.inputs[0]
    node = write(aten.sum.dim_IntList, self=a, dim=[1], keepdim=False, dtype=INT32)
    spell_by_schema(node)
    assert (node.args, node.kwargs) == ((a, [1]), {"dtype": INT32})
    node = write(aten.sub.Scalar, self=a, other=3, alpha=2)
    spell_by_schema(node)
    assert (node.args, node.kwargs) == ((a, 3, 2), {})
    node = write(aten.sum.dim_IntList, a, [1], keepdim=True)
    spell_by_schema(node)
    assert (node.args, node.kwargs) == ((a, [1], True), {})
