"""Recording what a function of tensors calls, on the tensors themselves: as ``make_fx`` does, several times as fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.graph import Graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten


def record(function: Callable[..., Any], inputs: Mapping[str, Tensor], table: Mapping[Any, Callable]) -> GraphModule:
    """The decomposed graph of ``function``, with a fake tensor for each node.

    Args:
        inputs: what it is called with, in order, by the names of their placeholders; what it mutates is mutated. Their
            sizes are constants of the graph.
        table: decompositions.

    Raises:
        NotImplementedError: the function asks for the value of a tensor.
    """
    module = torch.nn.Module()
    recorder = _Recorder(module, table)
    for name, x in inputs.items():
        recorder.keep(x, recorder.graph.placeholder(name))
    with torch.no_grad(), recorder:
        results = function(*inputs.values())
    recorder.graph.output(tree_map(recorder.node_of, results))
    recorder.graph.eliminate_dead_code()
    return GraphModule(module, recorder.graph)


class _Recorder(TorchDispatchMode):
    """Appends each call to a graph, after it was made."""

    def __init__(self, module: torch.nn.Module, table: Mapping[Any, Callable]) -> None:
        super().__init__()
        self.graph = Graph(module)
        self._module = module
        self._table = table
        self._mode = FakeTensorMode()
        self._nodes: dict[int, Node] = {}
        # Held, so that no other tensor or memory gets the same address.
        self._tensors: list[Tensor] = []
        self._memory: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        decomposition = self._table.get(func)
        if decomposition is not None:
            with self:
                found = decomposition(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if torch.Tag.data_dependent_output in func.tags:
            raise NotImplementedError(f"{func} reads a tensor")
        if func is aten.lift_fresh.default:
            func = aten.lift_fresh_copy.default
        given, named = tree_map(self.node_of, (args, kwargs))
        name = self.graph._target_to_str(func.overloadpacket.__name__)
        node = self.graph.create_node("call_function", func, given, named, name)
        out = func(*args, **kwargs)
        self.keep(out, node)
        return out

    def node_of(self, value: Any) -> Any:
        """The node of a tensor; one that nothing gave is a constant."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            name = f"_tensor_constant{len(dict(self._module.named_buffers()))}"
            self._module.register_buffer(name, value)
            self.keep(value, self.graph.get_attr(name))
        return self._nodes[id(value)]

    def keep(self, value: Any, node: Node) -> None:
        """``node`` gave ``value``: a tensor, or several."""
        if isinstance(value, Tensor):
            node.meta["val"] = self._fake(value)
            self._tensors.append(value)
            self._nodes[id(value)] = node
        elif isinstance(value, (list, tuple)):
            node.meta["val"] = type(value)(self._fake(x) if isinstance(x, Tensor) else x for x in value)
            for i, x in enumerate(value):
                part = self.graph.call_function(getitem, (node, i))
                self.keep(x, part)
                part.meta["val"] = node.meta["val"][i]
        else:
            node.meta["val"] = value

    def _fake(self, x: Tensor) -> FakeTensor:
        """A fake tensor like ``x``, of the same memory as others are whose tensors share it."""
        storage = x.untyped_storage()
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        known = self._memory.get(storage._cdata)
        if known is None:
            self._memory[storage._cdata] = storage, meta.untyped_storage()
        else:
            meta.set_(known[1], x.storage_offset(), x.shape, x.stride())
        return FakeTensor(self._mode, meta, x.device)
