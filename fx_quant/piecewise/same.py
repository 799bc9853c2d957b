"""When two pieces are the same graph: one artefact serves both, called with the parameters of each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant.compat import is_static_input
from fx_quant.passes.nodes import module_path
from fx_quant.piecewise.split import Part, attribute, storages


class _Equal:
    """Compares as Dynamo does where it guards a tensor subclass: by type and ``==``."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Equal) and type(self.value) is type(other.value) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(type(self.value))


_ATOMS = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def key_of(part: Part) -> Hashable:
    """Equal for parts that one artefact serves: the same ops on inputs of the same kind, whatever their values.

    What is not known to be equal is different: objects by identity, sizes by their symbols. Which inputs share memory
    must agree too.
    """
    numbers: dict[int, int] = {}
    memory = [[numbers.setdefault(each, len(numbers)) for each in storages(_value(node))] for node in part.inputs]
    return _key(part.module), tuple(map(tuple, memory))


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _key(module: GraphModule) -> Hashable:
    numbers: dict[Node, int] = {}
    key: list[Hashable] = []
    for node in module.graph.nodes:
        numbers[node] = len(numbers)
        value = _value(node)
        if node.op == "placeholder":
            key.append(("input", is_static_input(node), _kind(value)))
            continue
        target = node.target
        if node.op in ("get_attr", "call_module"):
            held = attribute(module, str(target))
            target = _key(held) if isinstance(held, GraphModule) else id(held)
        symbol = _symbol(value) if isinstance(value, _SYMBOLS) else None
        key.append((node.op, target, _constant((node.args, node.kwargs), numbers), symbol))
    return tuple(key)


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _constant(argument: Any, numbers: Mapping[Node, int]) -> Hashable:
    """``argument`` of a call as something that tells 1, 1.0, True and -0.0, 0.0 apart."""
    if isinstance(argument, Node):
        return "node", numbers[argument]
    if isinstance(argument, (tuple, list)):
        return type(argument).__name__, *[_constant(each, numbers) for each in argument]
    if isinstance(argument, dict):
        return "dict", *[(_constant(k, numbers), _constant(v, numbers)) for k, v in argument.items()]
    if isinstance(argument, slice):
        return "slice", *[_constant(each, numbers) for each in (argument.start, argument.stop, argument.step)]
    if isinstance(argument, _SYMBOLS):
        return _symbol(argument)
    if isinstance(argument, _ATOMS):
        return type(argument), repr(argument)
    return type(argument), id(argument)


def _symbol(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> Hashable:
    """The expression of ``value``; a size that was found to be a number is that number."""
    expression = value.node.expr
    return (int, str(expression)) if expression.is_Integer else (type(value), str(expression))


def _kind(value: Any) -> Hashable:
    """All that code may have been compiled for of an input, but for its values."""
    if not isinstance(value, Tensor):
        return _constant(value, {})
    kind = (
        type(value),
        isinstance(value, torch.nn.Parameter),
        _constant(tuple(value.shape), {}),
        value.dtype,
        value.device,
        value.layout,
        value.requires_grad,
        value.is_inference(),
        value.is_conj(),
        value.is_neg(),
    )
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        return *kind, *[(name, _kind(getattr(value, name))) for name in names], _Equal(context)
    if value.layout is torch.strided:
        return *kind, _constant(value.stride(), {}), _constant(value.storage_offset(), {})
    return *kind, id(value)


def renaming(first: Part, other: Part) -> dict[str, str]:
    """The names of the modules of ``other``, by those of the modules of ``first``, which is the same graph."""
    names: dict[str, str] = {}
    for ours, theirs in zip(first.module.graph.nodes, other.module.graph.nodes, strict=True):
        if ours.op not in ("placeholder", "output"):
            names.setdefault(module_path(ours), module_path(theirs))
    return names
