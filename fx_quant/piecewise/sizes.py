"""For which numbers of rows a piece is compiled by itself, and whether fewer rows may be padded to one of them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant.compat import as_dynamo_graph, copy_graph
from fx_quant.config import Options, PaddingPolicy
from fx_quant.kernels.subclasses import inner_tensors
from fx_quant.passes.axes import Extent, extent
from fx_quant.piecewise.independent import prove_rows
from fx_quant.piecewise.rows import MixesRowsError, Rows, State, factor, has
from fx_quant.piecewise.split import Part, Split, storages
from fx_quant.piecewise.traced import trace


class NoSizesError(Exception):
    """Why a piece is compiled for all numbers of rows only."""


@dataclass(frozen=True)
class Asked:
    """What is asked of all pieces.

    Args:
        sizes: numbers of rows, growing.
        platform: that of the machine, such as ``cpu``.
    """

    sizes: tuple[int, ...] = ()
    padding: PaddingPolicy = PaddingPolicy.AUTO
    deterministic: bool = False
    platform: str = "cpu"

    @classmethod
    def of(cls, options: Options, platform: str) -> Asked | None:
        """What ``options`` ask for; None where that is nothing."""
        if not options.compile_sizes:
            return None
        return cls(options.compile_sizes, options.padding, options.deterministic, platform)

    @property
    def unpadded(self) -> str:
        """Why no rows are padded to a size, whatever the piece; empty where they are."""
        if self.padding in (PaddingPolicy.NEVER, PaddingPolicy.CONSTANTS):
            return f"padding='{self.padding}' pads no rows"
        # A launch costs a GPU more than some rows do. A CPU computes each row that it is given.
        if self.padding is PaddingPolicy.AUTO and self.platform == "cpu":
            return "padding='auto' pads no rows on a cpu, where each costs what it costs; 'always' does"
        return ""


@dataclass(frozen=True)
class Layout:
    """Shape and strides of a tensor, in which the number of rows is a symbol or nothing is."""

    shape: tuple[Extent, ...]
    stride: tuple[Extent, ...]

    @classmethod
    def of(cls, value: Tensor) -> Layout:
        """That of a fake tensor."""
        return cls(tuple(map(extent, value.shape)), tuple(map(extent, value.stride())))

    def at(self, symbol: Any, rows: int) -> Layout:
        """The same for so many rows."""
        return Layout(*(tuple(_at(each, symbol, rows) for each in these) for these in (self.shape, self.stride)))

    def overlaps(self) -> bool:
        """Whether two places of a tensor of known sizes may be the same memory, strides of 0 aside."""
        reach = 0
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size != 1 and stride != 0:
                if stride <= reach:
                    return True
                reach += stride * (size - 1)
        return False


def _at(size: Extent, symbol: Any, rows: int) -> int:
    return size if isinstance(size, int) else int(size.xreplace({symbol: rows}))


@dataclass(frozen=True)
class SizePlan:
    """What a piece is compiled for beside all numbers of rows.

    Args:
        sizes: numbers of rows; none where ``unsized`` says why.
        unsized: why it is compiled for no number of rows in particular.
        unpadded: why fewer rows are not padded to the next of ``sizes``; empty where they are.
        symbol: the number of rows, in the sizes that Dynamo saw.
        reads: where to read it: the position of an input, its dim or None for an input that is a number, and how often
            the number is in that.
        inputs: for each input that has rows where, and its layout; None for others.
        outputs: likewise, an expression for one that is a number which depends on the rows.
        states: of the outputs, where rows may be padded.
    """

    sizes: tuple[int, ...] = ()
    unsized: str = ""
    unpadded: str = ""
    symbol: Any = None
    reads: tuple[int, int | None, int] = (0, None, 1)
    inputs: tuple[tuple[Rows, Layout] | None, ...] = ()
    outputs: tuple[Layout | Extent | None, ...] = ()
    states: tuple[State, ...] = ()


def plan_sizes(alike: Sequence[Part], cut: Split, written: Collection[int], asked: Asked) -> SizePlan:
    """What the parts ``alike``, which one artefact serves, are compiled for beside all numbers of rows.

    Args:
        written: positions of the inputs that they write to.
    """
    part = alike[0]
    try:
        if asked.deterministic:
            raise NoSizesError("deterministic=True has one plan for all numbers of rows")
        symbol = _symbol(part)
        low, high = _range(_first_size(part, symbol))
        if high == 0:
            raise NoSizesError(f"{symbol} is read off values")
        sizes = tuple(size for size in asked.sizes if low <= size <= high)
        if not sizes:
            raise NoSizesError(f"{symbol} is from {low} to {high}, and no size that was asked for is")
        reads = _reads(part, symbol)
    except NoSizesError as error:
        return SizePlan(unsized=str(error))
    outputs = tuple(_output(node.meta.get("example_value"), symbol) for node in part.outputs)
    plan = SizePlan(sizes, "", asked.unpadded, symbol, reads, (), outputs)
    if plan.unpadded:
        return plan
    try:
        _check_memory(alike, cut, written)
        inputs = _inputs(part, symbol, sizes)
        # A size is 2 or more here: of one row some ops make another graph. And it is several, or it were no symbol.
        least = max(low, 2)
        states = _prove(part, symbol, least, max(*sizes, least + 1))
        _check_outputs(part, symbol, states)
    except MixesRowsError as error:
        return SizePlan(sizes, "", str(error), symbol, reads, (), outputs)
    return SizePlan(sizes, "", "", symbol, reads, inputs, outputs, states)


def _symbol(part: Part) -> Any:
    """The only symbol in the sizes of the inputs of ``part``."""
    values = [node.meta.get("example_value") for node in part.inputs]
    symbols = sorted(set().union(*map(_symbols, values)), key=str)
    if not symbols:
        raise NoSizesError("no size is dynamic: it is compiled for its own")
    if len(symbols) > 1:
        raise NoSizesError(f"{len(symbols)} sizes are dynamic: {', '.join(map(str, symbols))}")
    return symbols[0]


def _symbols(value: Any) -> set[Any]:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(value.node.expr.free_symbols)
    found: set[Any] = set()
    for each in inner_tensors(value):
        for size in (*each.shape, *each.stride(), each.storage_offset()):
            found |= _symbols(size)
    if isinstance(value, Tensor):
        found = found.union(*map(_symbols, value.shape))
    return found


def _sized(part: Part, symbol: Any) -> list[tuple[int, int | None, Extent]]:
    """Each place of the inputs of ``part`` with ``symbol`` in it: position, dim or None for a number, and size."""
    found: list[tuple[int, int | None, Extent]] = []
    for position, node in enumerate(part.inputs):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            found.append((position, None, extent(value)))
        elif isinstance(value, Tensor):
            found += [(position, dim, extent(size)) for dim, size in enumerate(value.shape)]
    return [each for each in found if has(each[2], symbol)]


def _first_size(part: Part, symbol: Any) -> torch.SymInt:
    """A size of an input of ``part`` in which ``symbol`` is."""
    for position, dim, _ in _sized(part, symbol):
        value = part.inputs[position].meta["example_value"]
        return value if dim is None else value.shape[dim]
    raise NoSizesError(f"{symbol} is no size of its inputs")


def _range(size: torch.SymInt) -> tuple[int, int]:
    """The least value, of 0 and more, and the largest of the one symbol in ``size``; ``(0, 0)`` if read off values."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    (symbol,) = size.node.expr.free_symbols
    if free_unbacked_symbols(size):
        return 0, 0
    found = size.node.shape_env.var_to_range[symbol]
    # A number that a model is given has no bounds; one of them may be infinite.
    low, high = (int(bound) if bound.is_Integer else None for bound in (found.lower, found.upper))
    return max(low or 0, 0), sys.maxsize if high is None else high


def _reads(part: Part, symbol: Any) -> tuple[int, int | None, int]:
    places = _sized(part, symbol)
    if all(dim is None for _, dim, _ in places):
        raise NoSizesError(f"{symbol} is a number and no tensor's size")
    for position, dim, size in places:
        if times := factor(size, symbol):
            return position, dim, times
    raise NoSizesError(f"no input has {symbol} rows")


def _output(value: Any, symbol: Any) -> Layout | Extent | None:
    if isinstance(value, torch.SymInt):
        size = extent(value)
        return size if has(size, symbol) else None
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not is_traceable_wrapper_subclass(value)
    return Layout.of(value) if plain else None


def _check_memory(alike: Sequence[Part], cut: Split, written: Collection[int]) -> None:
    """That nobody can tell whether an output is memory of its own."""
    if written:
        raise MixesRowsError(f"it writes to its input {alike[0].inputs[min(written)].name}")
    returned = set(cut.graph.output_node().all_input_nodes)
    for part in alike:
        given = {each for node in part.inputs for each in storages(node.meta.get("example_value"))}
        for node in part.outputs:
            if given.intersection(storages(node.meta.get("example_value"))):
                raise MixesRowsError(f"its output {node.name} is memory of an input")
        for item in part.call.users:
            memory = set(storages(cut.made[item]))
            others = [each for each in part.call.users if each is not item and memory & set(storages(cut.made[each]))]
            if others and item in returned:
                raise MixesRowsError(f"the graph returns {item.name}, whose memory {others[0].name} has too")


def _inputs(part: Part, symbol: Any, sizes: Sequence[int]) -> tuple[tuple[Rows, Layout] | None, ...]:
    found: list[tuple[Rows, Layout] | None] = []
    for node in part.inputs:
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor) or not _symbols(value):
            found.append(None)
            continue
        if is_traceable_wrapper_subclass(value) or value.layout is not torch.strided:
            raise MixesRowsError(f"input {node.name} is a {type(value).__name__} with rows")
        layout = Layout.of(value)
        dims = [dim for dim, size in enumerate(layout.shape) if has(size, symbol)]
        times = factor(layout.shape[dims[0]], symbol) if len(dims) == 1 else None
        if times is None:
            raise MixesRowsError(f"input {node.name} of sizes {list(layout.shape)} has rows in no one dim")
        if any(layout.at(symbol, size).overlaps() for size in sizes):
            raise MixesRowsError(f"input {node.name} has several elements in one place of its memory")
        found.append((Rows(dims[0], 1, times), layout))
    return tuple(found)


def _prove(part: Part, symbol: Any, low: int, high: int) -> tuple[State, ...]:
    return prove_rows(trace(part.module, symbol, low, high))


def _check_outputs(part: Part, symbol: Any, states: Sequence[State]) -> None:
    """That each output with rows is a plain tensor that repeats no memory."""
    for node, state in zip(part.outputs, states, strict=True):
        value = node.meta.get("example_value")
        if state is None:
            continue
        layout = _output(value, symbol)
        if not isinstance(layout, Layout) or 0 in layout.stride:
            raise MixesRowsError(f"its output {node.name} is a tensor that repeats memory, or no plain one")


def copied(module: GraphModule) -> GraphModule:
    """The same piece once more, with what AOTAutograd reads off its inputs."""
    graph, copies = copy_graph(module.graph)
    piece = GraphModule(module, graph)
    as_dynamo_graph(piece, module, {copies[node].name: node for node in module.graph.find_nodes(op="placeholder")})
    return piece


def specialised(module: GraphModule, plan: SizePlan, rows: int) -> tuple[GraphModule, tuple[int, ...]]:
    """A piece for ``rows`` rows alone, and the positions of the inputs that it takes: all but numbers of rows.

    A number that depends on the rows is returned as None.
    """
    piece = copied(module)
    kept: list[int] = []
    for position, node in enumerate(piece.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and has(extent(value), plan.symbol):
            node.replace_all_uses_with(_at(extent(value), plan.symbol, rows))  # type: ignore[arg-type]
            piece.graph.erase_node(node)
        else:
            kept.append(position)
    output = piece.graph.output_node()
    returned = zip(output.args[0], plan.outputs, strict=True)  # type: ignore[arg-type]
    output.args = (tuple(each if made is None or isinstance(made, Layout) else None for each, made in returned),)
    piece.recompile()
    return piece, tuple(kept)


def numbers_at(plan: SizePlan, rows: int) -> Mapping[int, int]:
    """The outputs that are numbers which depend on the rows, by position, where there are so many."""
    sizes = [(i, each) for i, each in enumerate(plan.outputs) if each is not None and not isinstance(each, Layout)]
    return {i: _at(each, plan.symbol, rows) for i, each in sizes}
