"""Names of a model's modules: those of ``named_modules()``, whatever way a graph's source took to them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fx_quant.compat import source_of
from fx_quant.passes.nodes import dotted_source


def named_modules_of(model: Callable[..., Any]) -> dict[str, nn.Module]:
    """Every module of ``model`` by name, tied ones under each of their names.

    ``model`` is a module, a method of one, or a function: then the modules that it closes over, holds as a bound
    argument or finds in its globals are meant; where there are several, the name of the variable comes first.
    """
    roots = _roots(model)
    named: dict[str, nn.Module] = {}
    for variable, root in roots.items():
        named.update(root.named_modules(prefix="" if len(roots) == 1 else variable, remove_duplicate=False))
    return named


def _roots(model: Any, depth: int = 3) -> dict[str, nn.Module]:
    """The outermost modules that ``model`` runs, by the variables that hold them."""
    if isinstance(model, nn.Module):
        return {"": model}
    found: dict[str, nn.Module] = {}
    for name, value in _held_by(model) if depth and callable(model) else ():
        for variable, module in _roots(value, depth - 1).items():
            found.setdefault(".".join(part for part in (name, variable) if part), module)
    within = {id(child) for module in found.values() for child in module.modules() if child is not module}
    outermost = {id(module): name for name, module in reversed(found.items()) if id(module) not in within}
    return {name: module for name, module in found.items() if outermost.get(id(module)) == name}


def _held_by(model: Any) -> Iterator[tuple[str, Any]]:
    """What a callable that is no module refers to, by name."""
    if isinstance(model, functools.partial):
        yield "", model.func
        yield from ((str(i), value) for i, value in enumerate(model.args))
        yield from model.keywords.items()
    elif isinstance(model, types.MethodType):
        yield "", model.__self__
    elif isinstance(model, types.FunctionType):
        for name, cell in zip(model.__code__.co_freevars, model.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:
                continue  # not assigned yet
        yield from ((n, model.__globals__[n]) for n in model.__code__.co_names if n in model.__globals__)
    elif hasattr(model, "__dict__") and not isinstance(model, type):
        yield from vars(model).items()


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes of ``module`` itself, by name."""
    # Under an offloading cache, looking at a parameter would copy it to the device.
    parameters = getattr(module._parameters, "offloaded_values", module._parameters)
    for held in (parameters, module._buffers, vars(module)):
        for name, value in held.items():
            if isinstance(value, Tensor):
                yield name, value


class ModuleNames:
    """Tells the modules of Dynamo's graphs.

    Args:
        modules: those of a model, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.seen: set[str] = set()
        """Names of the modules of which a graph took a tensor."""
        self._owners: dict[int, list[str]] = {}
        for name, module in modules.items():
            for _, value in tensors_of(module):
                self._owners.setdefault(id(value), []).append(name)

    def put_into(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Replace the paths in the module stacks of Dynamo's graph ``gm`` by the modules' names, where they can be told.

        A path starts at a variable of the frame that was traced, which may be that of any part of the model. Parameters
        and buffers, as inputs of the graph, have paths as well, and tell the module by what they are.
        """
        known = self._known_paths(gm, example_inputs)

        @functools.cache
        def name_of(path: str) -> str:
            parent, rest = path, ""
            while parent not in known:
                parent, dot, last = parent.rpartition(".")
                if not dot:
                    return path
                rest = f".{last}{rest}"
            return f"{known[parent]}{rest}".strip(".")

        for node in gm.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            named = {key: (name_of(dotted_source(str(path))), *rest) for key, (path, *rest) in stack.items()}
            if named:
                node.meta["nn_module_stack"] = named

    def _known_paths(self, gm: GraphModule, example_inputs: Sequence[Any]) -> dict[str, str]:
        """Names by path, of the modules whose tensors ``gm`` takes and of the parents on their paths."""
        known: dict[str, str] = {}
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
            source, owners = source_of(node), self._owners.get(id(value))
            if source is None or owners is None:
                continue
            self.seen.update(owners)
            path = dotted_source(source)
            path = next((path.partition(mark)[0] for mark in ("._parameters[", "._buffers[") if mark in path), path)
            path = path.rpartition(".")[0] if path == dotted_source(source) else path
            name = max(owners, key=lambda owner: _shared_parts(path, owner))
            while path not in known:
                known[path] = name
                (parent, dot, last), (above, _, part) = path.rpartition("."), name.rpartition(".")
                if not dot or last != part:
                    break
                path, name = parent, above
        return known


def _shared_parts(path: str, name: str) -> int:
    """How many parts, from the end, ``path`` and ``name`` share."""
    pairs = list(zip(reversed(path.split(".")), reversed(name.split(".")), strict=False))
    return next((i for i, (left, right) in enumerate(pairs) if left != right), len(pairs))
