"""``fold``: what a graph computes of constants alone, computed once.

Libraries unpack weights, and shape their scales, inside the graph. As these depend on parameters only, the steps are
written down as a program that runs when one of them has changed, instead of in every call.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_quant.ops.constants import remembered
from fx_quant.ops.library import KEEPING_TAGS, register
from fx_quant.ops.purity import is_pure


def can_fold(node: Node) -> bool:
    """Whether ``program_of`` can write ``node`` down: a pure op of tensors and static arguments."""
    target = node.target
    if node.op != "call_function" or not is_pure(target):
        return False
    if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
        return False
    try:
        json.dumps(_encoded((node.args, node.kwargs), dict.fromkeys(node.all_input_nodes, 0)))
    except TypeError:
        return False
    return True


def program_of(
    inputs: Sequence[Node],
    steps: Sequence[Node],
    results: Sequence[Node],
    literals: Mapping[Node, Tensor] | None = None,
) -> str:
    """``steps`` in order, as text: values are numbered, the inputs first.

    Args:
        literals: the steps that are a few numbers, which stand in the program.

    Raises:
        TypeError: an argument that has no form in text.
    """
    index = {node: i for i, node in enumerate((*inputs, *steps))}
    lines = []
    for step in steps:
        if literals and step in literals:
            value = literals[step]
            lines.append([_LITERAL, _encoded((value.tolist(), value.dtype, value.device), {}), {"dict": {}}])
            continue
        name = "getitem" if step.target is operator.getitem else str(step.target)
        lines.append([name, _encoded(step.args, index), _encoded(step.kwargs, index)])
    program = {"inputs": len(inputs), "steps": lines, "results": [index[node] for node in results]}
    return _written(program)


def with_several_results(program: str) -> str:
    """``program``; where it has one result, with another, which is a single zero."""
    parts = _read(program)
    if len(parts["results"]) > 1:
        return program
    steps = [*parts["steps"], ["aten.zeros.default", [[1]], {"dict": {}}]]
    return _written({**parts, "steps": steps, "results": [*parts["results"], parts["inputs"] + len(steps) - 1]})


def packing_program(layout: str) -> str:
    """The program that packs one weight in ``layout``."""
    return _written(
        {"inputs": 1, "steps": [["fx_quant.pack.default", [{"value": 0}, layout], {"dict": {}}]], "results": [1]}
    )


def _written(program: dict[str, Any]) -> str:
    # Inductor's C++ wrapper puts a string between quotes as it is.
    return json.dumps(program, separators=(",", ":")).replace('"', "'")


def _read(program: str) -> dict[str, Any]:
    return json.loads(program.replace("'", '"'))


_LITERAL = "literal"
# Types of arguments that JSON has no form for, by the name of torch's attribute.
_NAMED = (torch.dtype, torch.memory_format, torch.layout)


def _encoded(argument: Any, index: dict[Node, int]) -> Any:
    if isinstance(argument, Node):
        return {"value": index[argument]}
    if isinstance(argument, (list, tuple)):
        return [_encoded(part, index) for part in argument]
    if isinstance(argument, dict):
        return {"dict": {name: _encoded(part, index) for name, part in argument.items()}}
    if isinstance(argument, _NAMED):
        return {"torch": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    if argument is None or isinstance(argument, (bool, int, float)):
        return argument
    if isinstance(argument, str) and not set(argument) & set("'\"\\"):
        return argument
    raise TypeError(f"a constant computation must have static arguments, got {type(argument).__name__}")


def _decoded(argument: Any, values: Sequence[Any]) -> Any:
    if isinstance(argument, list):
        return [_decoded(part, values) for part in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, content),) = argument.items()
    if kind == "value":
        return values[content]
    if kind == "dict":
        return {name: _decoded(part, values) for name, part in content.items()}
    return torch.device(content) if kind == "device" else getattr(torch, content)


@functools.lru_cache(maxsize=256)
def _parsed(program: str) -> tuple[tuple[tuple[Callable[..., Any], Any, Any], ...], tuple[int, ...]]:
    parts = _read(program)
    return tuple((_op(name), args, kwargs) for name, args, kwargs in parts["steps"]), tuple(parts["results"])


def _op(name: str) -> Callable[..., Any]:
    if name == "getitem":
        return operator.getitem
    if name == _LITERAL:
        return _literal
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _literal(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _run(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    steps, results = _parsed(program)
    values: list[Any] = list(inputs)
    with torch.no_grad():
        for op, args, kwargs in steps:
            values.append(op(*_decoded(args, values), **_decoded(kwargs, values)))
    return [_dense(values[i]) for i in results]


def _dense(result: Tensor) -> Tensor:
    # A transposed result stays so: kernels for GPUs read a weight column by column.
    step = 1
    for stride, size in sorted(pair for pair in zip(result.stride(), result.shape, strict=True) if pair[1] != 1):
        if stride != step:
            return result.contiguous()
        step *= size
    return result


def fold(inputs: list[Tensor], program: str) -> list[Tensor]:
    """The results of ``program`` on ``inputs``, dense; kept and handed out again until an input is written to.

    Do not write to the results. They never alias an input.
    """
    return remembered(inputs, (program,), lambda _: [_own(result, inputs) for result in _run(inputs, program)])


def _own(result: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    storages = {x.untyped_storage()._cdata for x in inputs}
    return result.clone() if result.untyped_storage()._cdata in storages else result.detach()


register("fold(Tensor[] inputs, str program) -> Tensor[]", fold, _run, KEEPING_TAGS)
