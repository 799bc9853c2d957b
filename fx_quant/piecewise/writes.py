"""Which inputs a part writes to, and whether memory that others see may be cut there."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from fx_quant.kernels.subclasses import inner_tensors
from fx_quant.piecewise.split import NotSplitError, Part, Split, storages

# Higher-order ops, which have no schema, that write to nothing.
_PURE = ("flex_attention",)


class _Writes(TorchDispatchMode):
    """Notes the memory that ops write to, by their schema."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.opaque: str = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None:
            self.opaque = self.opaque or ("" if str(func) in _PURE else str(func))
        else:
            given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    values = given.get(argument.name)
                    for value in values if isinstance(values, (list, tuple)) else [values]:
                        self.written.update(storages(value))
        if any(map(is_traceable_wrapper_subclass, args)):
            return NotImplemented  # the ops that it stands for come here too
        return func(*args, **kwargs)


def written_inputs(part: Part) -> frozenset[int]:
    """The positions of the inputs of ``part`` that it writes to, found by running it on fake tensors.

    Raises:
        NotSplitError: it does not run so, or holds an op that does not say what it writes to, or is to be compiled and
            writes to memory that it is given twice.
    """
    values = [node.meta.get("example_value") for node in part.inputs]
    # Of all that it makes: a part may be given nothing but the sizes of what it makes.
    made = (node.meta.get("example_value") for node in part.module.graph.nodes)
    mode = next((each.fake_mode for value in made for each in _fakes(value)), None)
    env = None if mode is None else mode.shape_env
    ignoring = contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()
    before = [_view(value) for value in values]
    writes = _Writes()
    try:
        # As Dynamo runs them: ops of C++ that other ops make up may ask a size that is not known.
        with mode or contextlib.nullcontext(), enable_python_dispatcher(), ignoring, writes:
            Interpreter(part.module, garbage_collect_values=False).run(*values)
    except Exception as error:
        raise NotSplitError(f"{part.call.target} does not run on fake tensors: {error!r}") from error
    if writes.opaque:
        raise NotSplitError(f"{writes.opaque} does not say what it writes to")
    if before != [_view(value) for value in values]:
        raise NotSplitError(f"{part.call.target} changes what memory an input shows, in place")
    found = frozenset(i for i, value in enumerate(values) if writes.written.intersection(storages(value)))
    uses = Counter(each for value in values for each in set(storages(value)))
    if not part.is_cut and any(uses[each] > 1 for i in found for each in storages(values[i])):
        raise NotSplitError(f"{part.call.target} writes to memory that two of its inputs share")
    return found


def _view(value: Any) -> Any:
    strided = isinstance(value, Tensor) and value.layout is torch.strided
    return (value.shape, value.stride(), value.storage_offset(), *storages(value)) if strided else None


def _fakes(value: Any) -> list[FakeTensor]:
    return [inner for inner in inner_tensors(value) if isinstance(inner, FakeTensor)]


def check_writes(cut: Split, written: Mapping[Part, frozenset[int]]) -> None:
    """That no part writes to memory of which an earlier part made a view: it may have been given a copy.

    Raises:
        NotSplitError: one does.
    """
    owners: dict[int, list[Node]] = {}
    for node, value in cut.made.items():
        for storage in storages(value):
            owners.setdefault(storage, []).append(node)
    order = {part.call: number for number, part in enumerate(cut.parts)}
    for part in cut.parts:
        for position in written[part]:
            node = part.call.args[position]
            assert isinstance(node, Node)
            views = [view for storage in storages(cut.made[node]) for view in owners[storage]]
            earlier = [view for view in views if view.op == "call_function" and order[view.args[0]] < order[part.call]]  # type: ignore[index]
            if len(set(views)) > 1 and earlier:
                raise NotSplitError(f"{part.call.target} writes to memory that {earlier[0]} shares, made before it")
