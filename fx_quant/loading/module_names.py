"""Names of a model's modules: those of ``named_modules()``, whatever way a graph's source took to them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fx_quant.compat import source_of
from fx_quant.passes.nodes import dotted_source, is_variable


def named_modules_of(model: Callable[..., Any]) -> dict[str, nn.Module]:
    """Every module of ``model`` by name, tied ones under each of their names.

    ``model`` is a module, a method of one, or a function: then the modules that it closes over, holds as a bound
    argument or finds in its globals are meant; where there are several, the name of the variable comes first.
    """
    roots = roots_of(model)
    named: dict[str, nn.Module] = {}
    for variable, root in roots.items():
        named.update(root.named_modules(prefix="" if len(roots) == 1 else variable, remove_duplicate=False))
    return named


def roots_of(model: Any, depth: int = 3) -> dict[str, nn.Module]:
    """The outermost modules that ``model`` runs, by the variables that hold them."""
    if isinstance(model, nn.Module):
        return {"": model}
    found: dict[str, nn.Module] = {}
    for name, value in _held_by(model) if depth and callable(model) else ():
        for variable, module in roots_of(value, depth - 1).items():
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
        """Names of the modules of which a call of a graph took a tensor."""
        self._owners: dict[int, list[str]] = {}
        for name, module in modules.items():
            for _, value in tensors_of(module):
                self._owners.setdefault(id(value), []).append(name)

    def put_into(self, gm: GraphModule, inputs: Sequence[Any]) -> GraphNames:
        """Put the modules' names into the module stacks of Dynamo's graph ``gm``, as far as they can be told.

        A path starts at a variable of the frame that was traced, which may be that of any part of the model. Parameters
        and buffers, as inputs of the graph, have paths as well, and tell the module by what they are.
        """
        paths = [_module_of(source_of(node)) for node in gm.graph.find_nodes(op="placeholder")]
        graph = GraphNames(self, paths, inputs)
        # What the traced function does itself has no stack, though it may be the forward of any part of the model.
        frames = [path for path in graph.first if is_variable(path)]
        own = {frames[0]: (frames[0], nn.Module)} if len(frames) == 1 else {}
        for node in gm.graph.nodes:
            stack = node.meta.get("nn_module_stack") or own
            named = {
                key: (renamed(dotted_source(str(path)), graph.first), *rest) for key, (path, *rest) in stack.items()
            }
            if named:
                node.meta["nn_module_stack"] = named
        return graph

    def by_path(self, paths: Sequence[str], inputs: Sequence[Any]) -> dict[str, str]:
        """Names by path, of the modules whose tensors are ``inputs`` and of the parents on their ``paths``."""
        known: dict[str, str] = {}
        for path, value in zip(paths, inputs, strict=False):
            owners = self._owners.get(id(value))
            if path and owners is not None:
                self.seen.update(owners)
                _learn(known, path, max(owners, key=lambda owner, path=path: _shared_parts(path, owner)))
        return known


class GraphNames:
    """Of which modules one of Dynamo's graphs was made, and for which it is called.

    One graph serves every module that its guards let pass, so that one layer's is that of all that are alike.

    Args:
        names: of the model.
        paths: for each input, the path of the module that holds it; empty where none does.
        inputs: with which the graph was made.
    """

    def __init__(self, names: ModuleNames, paths: Sequence[str], inputs: Sequence[Any]) -> None:
        self._names, self._paths = names, paths
        self.first = names.by_path(paths, inputs)

    def renaming(self, inputs: Sequence[Any]) -> dict[str, str]:
        """For a call with ``inputs``, the modules that stand in the place of those that the graph was made of."""
        found = self._names.by_path(self._paths, inputs)
        renaming: dict[str, str] = {}
        for path, name in self.first.items():
            if found.get(path, name) != name:
                renaming[name] = found[path]
        return renaming


def renamed(path: str, names: Mapping[str, str]) -> str:
    """``path`` with the longest beginning that is in ``names`` replaced; itself where there is none."""
    parent, rest = path, ""
    while parent not in names:
        parent, dot, last = parent.rpartition(".")
        if not dot:
            return path
        rest = f".{last}{rest}"
    return f"{names[parent]}{rest}".strip(".")


def _module_of(source: str | None) -> str:
    """The path of the module that holds the tensor that Dynamo names ``source``."""
    path = dotted_source(source or "")
    for mark in ("._parameters[", "._buffers["):
        if mark in path:
            return path.partition(mark)[0]
    return path.rpartition(".")[0]


def _learn(known: dict[str, str], path: str, name: str) -> None:
    """Note that ``path`` is the module ``name``, and likewise of its parents."""
    while path not in known:
        known[path] = name
        (parent, dot, last), (above, _, part) = path.rpartition("."), name.rpartition(".")
        if not dot or last != part:
            return
        path, name = parent, above


def _shared_parts(path: str, name: str) -> int:
    """How many parts, from the end, ``path`` and ``name`` share."""
    pairs = list(zip(reversed(path.split(".")), reversed(name.split(".")), strict=False))
    return next((i for i, (left, right) in enumerate(pairs) if left != right), len(pairs))
