"""Version-stable text of an FX graph: values renumbered, short op names, ``dtype[shape]`` with symbols renamed."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

_FOLD = torch.ops.fx_quant.fold.default
_SYMBOLS = "MNOPQRSTUVWXYZ"
_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u"}


def print_graph(graph: Graph) -> str:
    """``graph`` as text, one node a line; unused inputs are left out.

    Inputs are ``a0, a1, ...`` and results ``%0, %1, ...`` in order; symbolic sizes are renamed in order of appearance.
    """
    return _Printer().text(graph)


def program_lines(program: str) -> list[str]:
    """The steps of a folded program, numbered in order."""
    data = json.loads(program.replace("'", '"'))
    lines = []
    for i, (name, args, kwargs) in enumerate(data["steps"]):
        arguments = [*map(_static, args), *(f"{key}={_static(value)}" for key, value in kwargs["dict"].items())]
        lines.append(f"v{data['inputs'] + i} = {name.removesuffix('.default')}({', '.join(arguments)})")
    return [*lines, f"return [{', '.join(f'v{i}' for i in data['results'])}]"]


def _static(argument: object) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(_static, argument))}]"
    if isinstance(argument, dict):
        ((kind, content),) = argument.items()
        return f"v{content}" if kind == "value" else str(content)
    return str(argument)


class _Printer:
    def __init__(self) -> None:
        self._names: dict[Node, str] = {}
        self._symbols: dict[str, str] = {}

    def text(self, graph: Graph) -> str:
        lines = []
        inputs = results = 0
        for node in graph.find_nodes(op="placeholder"):
            self._type(node.meta.get("val"))  # names the symbols in the order of all inputs, used or not
        for node in graph.nodes:
            if node.op == "output":
                lines.append(f"return {self._argument(node.args[0])}")
            elif node.op in ("placeholder", "get_attr"):
                if node.users:
                    self._names[node] = f"a{inputs}"
                    inputs += 1
                    lines.append(f"{self._names[node]}: {self._type(node.meta.get('val'))}")
            else:
                self._names[node] = f"%{results}"
                results += 1
                program = node.args[1] if node.target is _FOLD else None
                given = node.args[:1] if program else node.args
                arguments = ", ".join([*map(self._argument, given), *self._keywords(node.kwargs.items())])
                lines.append(
                    f"{self._names[node]}: {self._type(node.meta.get('val'))} = {_op(node.target)}({arguments})"
                )
                lines += [f"    {line}" for line in program_lines(program)] if isinstance(program, str) else []
        return "\n".join(lines) + "\n"

    def _keywords(self, items: Iterable[tuple[str, object]]) -> list[str]:
        hidden = ("layout", "device", "pin_memory", "memory_format")
        return [f"{name}={self._argument(value)}" for name, value in sorted(items) if name not in hidden]

    def _argument(self, value: object) -> str:
        if isinstance(value, Node):
            return self._names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._argument, value))}]"
        if isinstance(value, torch.dtype):
            return _dtype(value)
        if isinstance(value, float):
            return f"{value:.9g}"
        return str(value)

    def _type(self, value: object) -> str:
        if isinstance(value, torch.Tensor):
            return f"{_dtype(value.dtype)}[{', '.join(map(self._size, value.shape))}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self._type, value))})"
        return self._size(value)

    def _size(self, size: object) -> str:
        text = str(size).replace(" ", "")
        text = re.sub(r"\b[su]\d+\b", lambda match: self._symbol(match[0]), text)
        # The order of a product follows the names that the symbols had.
        return re.sub(r"\w+(?:\*\w+)+", lambda match: "*".join(sorted(match[0].split("*"))), text)

    def _symbol(self, name: str) -> str:
        return self._symbols.setdefault(name, _SYMBOLS[len(self._symbols) % len(_SYMBOLS)])


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    match = re.fullmatch(r"(float|bfloat|int|uint)(\d+)(_.*)?", name)
    return name if match is None else f"{_SHORT[match[1]]}{match[2]}{match[3] or ''}"


def _op(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return "getitem" if target is operator.getitem else getattr(target, "__name__", str(target))
