"""Predicates over FX nodes that the passes share. None adds a guard: symbolic sizes are only compared where known."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_quant.problem import Size
from fx_quant.scheme import FLOAT_DTYPES

aten = torch.ops.aten
prims = torch.ops.prims

CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})
# Not lift_fresh_copy: no other op may be given a tensor that stands in the code.
COPIES = frozenset({aten.clone.default, aten.alias.default, aten.detach.default})
RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
PERMUTES = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
EXPANDS = frozenset({aten.expand.default})
VIEWS = RESHAPES | PERMUTES | EXPANDS | COPIES

MULTIPLICATIONS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar})
ADDITIONS = frozenset({aten.add.Tensor, aten.add.Scalar})
SUBTRACTIONS = frozenset({aten.sub.Tensor, aten.sub.Scalar})
ANDS = frozenset({aten.bitwise_and.Scalar, aten.bitwise_and.Tensor, aten.__and__.Scalar})
RIGHT_SHIFTS = frozenset(
    {aten.bitwise_right_shift.Tensor_Scalar, aten.bitwise_right_shift.Tensor, aten.__rshift__.Scalar}
)
# What adds its first argument to the product of the other two.
ADDING_MATMULS = frozenset({aten.addmm.default, aten.baddbmm.default})
JOINS = frozenset({aten.cat.default, aten.stack.default})


def is_op(node: object, *targets: object) -> TypeGuard[Node]:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def qualified_name(target: object) -> str:
    """``aten.mm.default`` -> ``aten.mm``, as a report names an op."""
    return str(target).removesuffix(".default")


def tensor(node: object) -> torch.Tensor | None:
    """The fake tensor that ``node`` produces, or None when it is not one tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def returned(graph: Graph) -> list[Any]:
    """What ``graph`` returns, in order: nodes and numbers."""
    (output,) = graph.find_nodes(op="output")
    values = output.args[0]
    return list(values) if isinstance(values, (list, tuple)) else [values]


def args_of(node: Node) -> tuple[Any, ...]:
    """The positional arguments of ``node``; FX types them as a union that every use would have to narrow."""
    return node.args


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of an op by the names of its schema, defaults filled in, however they were spelled."""
    defaults = {name: default for name, _, default in _parameters(node.target)}
    return defaults | dict(zip(defaults, node.args, strict=False)) | dict(node.kwargs)


def spell_by_schema(node: Node) -> None:
    """Give ``node`` its arguments in one spelling: by position what may be so given, and no defaults at the end."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    parameters = _parameters(node.target)
    if not node.kwargs and len(node.args) == sum(
        not parameter.keyword_only and parameter.default is _REQUIRED for parameter in parameters
    ):
        return
    given = arguments(node)
    positional = [parameter for parameter in parameters if not parameter.keyword_only]
    while positional and _is_default(positional[-1], given):
        positional.pop()
    named = [parameter for parameter in parameters if parameter.keyword_only and not _is_default(parameter, given)]
    node.args = tuple(given[parameter.name] for parameter in positional)
    node.kwargs = {parameter.name: given[parameter.name] for parameter in named}


class _Parameter(NamedTuple):
    name: str
    keyword_only: bool
    default: Any


_REQUIRED = object()


@functools.cache
def _parameters(target: Any) -> tuple[_Parameter, ...]:
    return tuple(
        _Parameter(
            argument.name, argument.kwarg_only, argument.default_value if argument.has_default_value() else _REQUIRED
        )
        for argument in target._schema.arguments
    )


def _is_default(parameter: _Parameter, given: Mapping[str, Any]) -> bool:
    value, default = given[parameter.name], parameter.default
    # Of 1, 1.0 and True only what is the default itself is left out.
    return default is not _REQUIRED and type(value) is type(default) and value == default


def dtype(node: object) -> torch.dtype | None:
    """The dtype of ``node``'s tensor, or None."""
    value = tensor(node)
    return None if value is None else value.dtype


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node that is known to be a tensor."""
    kind = dtype(node)
    assert kind is not None
    return kind


def shape(node: object) -> tuple[Size, ...]:
    """The sizes of ``node``'s tensor; ``()`` when it has none."""
    value = tensor(node)
    return () if value is None else tuple([_known(size) for size in value.shape])


def _known(size: Size) -> Size:
    """``size``, as an int where a guard has made it one."""
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    return size if known is None else known


def multiplied(matmul: Node) -> tuple[Any, Any]:
    """The activation ``[..., k]`` of a matmul and its weight ``[..., k, n]``, of ``mv`` ``[n, k]``."""
    if is_op(matmul, aten.mv.default):
        return args_of(matmul)[1], args_of(matmul)[0]
    first = 1 if is_op(matmul, *ADDING_MATMULS) else 0
    return args_of(matmul)[first], args_of(matmul)[first + 1]


def summed_size(matmul: Node) -> Size:
    """K of a matmul."""
    return shape(multiplied(matmul)[0])[-1]


def same_size(left: Size, right: Size) -> bool:
    """Whether two sizes are known to be equal, without a new guard."""
    return bool(statically_known_true(left == right))


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are known to be equal, without a new guard."""
    return len(left) == len(right) and all(map(same_size, left, right))


def is_one(size: Size) -> bool:
    """Whether a size is known to be 1."""
    return same_size(size, 1)


def is_single(node: object) -> bool:
    """Whether ``node`` is a tensor known to have one element."""
    return tensor(node) is not None and all(map(is_one, shape(node)))


def constant(value: object) -> float | int | None:
    """``value`` as a Python number, or None when it is not one."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def is_widening(source: torch.dtype, to: torch.dtype) -> bool:
    """Whether every value of float dtype ``source`` is exact in float dtype ``to``."""
    if source == to:
        return True
    return to in (torch.float32, torch.float64) and source in FLOAT_DTYPES


def through(node: Node, targets: frozenset) -> Node:
    """Walk up first arguments while ``node`` is one of ``targets``."""
    while is_op(node, *targets) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def through_widening(node: Node) -> Node:
    """Walk up exact float casts."""
    while is_op(node, *CASTS):
        source, to = dtype(args_of(node)[0]), dtype(node)
        if source is None or to is None or not is_widening(source, to):
            break
        node = args_of(node)[0]
    return node


def uniform_value(node: object) -> float | int | None:
    """The number that every element of ``node`` equals, or None when that is not known."""
    if constant(node) is not None:
        return constant(node)
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if is_op(node, aten.full.default):
        return _cast_number(constant(node.args[1]), dtype(node))
    if is_op(node, aten.scalar_tensor.default):
        return _cast_number(constant(node.args[0]), dtype(node))
    if node.target in VIEWS or node.target in CASTS:
        return _cast_number(uniform_value(node.args[0]), dtype(node))
    return None


def _cast_number(value: float | int | None, to: torch.dtype | None) -> float | int | None:
    if value is None or to is None:
        return None
    if not to.is_floating_point and (not math.isfinite(value) or int(value) not in _range(to)):
        return None  # it wraps around, or is what the machine makes of it
    return rounded_number(value, to)


def _range(to: torch.dtype) -> range:
    """The integers of an integer dtype, or bool."""
    if to is torch.bool:
        return range(2)
    info = torch.iinfo(to)
    return range(info.min, info.max + 1)


def rounded_number(value: float | int, to: torch.dtype) -> float | int:
    """``value`` as dtype ``to`` holds it."""
    return _rounded_number(value, to, math.copysign(1, value))


# The fake mode of a compile makes a tensor of each number, and a model's layers have the same few numbers.
@functools.lru_cache(maxsize=1024, typed=True)
def _rounded_number(value: float | int, to: torch.dtype, _sign: float) -> float | int:
    return torch.tensor(value, dtype=to).item()


_MODULES = re.compile(r"(?:\.__dict__)?(?:\._modules|\['_modules'\])\['((?:[^'\\]|\\.)*)'\]")
# How the frame came to the outermost module: a local or global variable, and steps that are no attribute of a module.
_ROOT = re.compile(
    r"^[LG]\['[^']*'\](?:\[\d+\]|\['[^']*'\]|\.__closure__|\.cell_contents|\.__self__|\.__func__|\.__wrapped__"
    r"|\._orig_mod|\.func|\.args|\.keywords)*"
)


def dotted_source(source: str) -> str:
    """Dynamo's name of a module's source with each step to a submodule as ``.name``."""
    return _MODULES.sub(r".\1", source)


def is_variable(path: str) -> bool:
    """Whether ``path`` is that of what a variable of the traced frame holds, and not of a submodule of it."""
    return _ROOT.fullmatch(path) is not None


def module_path(node: Node) -> str:
    """Dotted path of the module that ``node`` came from, or ``""``; from the function that was compiled."""
    stack = node.meta.get("nn_module_stack")
    return _path(list(stack.values())[-1]) if stack else ""


def module_calls(node: Node) -> Iterator[tuple[str, str, str]]:
    """Of each module that ``node`` came from, outermost first: what tells its calls apart, its path and its class."""
    for call, entry in (node.meta.get("nn_module_stack") or {}).items():
        yield call, _path(entry), getattr(entry[1], "__name__", str(entry[1])).rpartition(".")[2]


def _path(entry: Sequence[Any]) -> str:
    path = _ROOT.sub("", dotted_source(str(entry[0])))
    return path.replace("']", "").replace("['", ".").replace("[", ".").replace("]", "").strip(".")


def source_line(node: Node) -> str:
    """``file:line`` of the user's code that ``node`` came from, or ``""``."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    parts = lines[-1].split(",")
    return f"{parts[0].removeprefix('File ').strip(chr(34))}:{parts[1].removeprefix(' line ')}"
