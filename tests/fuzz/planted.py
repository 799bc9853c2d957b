"""Rules and passes broken on purpose, one at a time: what the programs must show, if they are to show anything."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_quant.passes.nodes import RESHAPES, args_of, aten, constant, is_op, same_shape, shape
from fx_quant.passes.rules.steps import as_affine
from fx_quant.passes.values import Axis
from fx_quant.scheme import Numerics


@dataclass(frozen=True)
class Plant:
    """One mistake.

    Args:
        where: ``module:function`` within ``fx_quant``.
        broken: what the function becomes, given what it was.
        what: the mistake in words.
    """

    name: str
    where: str
    broken: Callable[[Any], Any]
    what: str

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """The mistake in every place that names the function.

        Raises:
            AttributeError: there is no such function any more.
        """
        module, _, name = self.where.partition(":")
        old = getattr(importlib.import_module(f"fx_quant.{module}"), name)
        new = self.broken(old)
        undo = [_put(table, key, new) for table in _tables() for key in [key for key in table if table[key] is old]]
        try:
            yield
        finally:
            for back in undo:
                back()


def _put(table: dict[Any, Any], key: Any, value: Any) -> Callable[[], None]:
    old = table[key]
    table[key] = value

    def back() -> None:
        table[key] = old

    return back


def _tables() -> list[dict[Any, Any]]:
    """The globals of every module that may name a rule or a pass, and the tables of rules in them."""
    found: list[dict[Any, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.startswith(("fx_quant", "tests.graphs")):
            found.append(vars(module))
            found += [value for key, value in vars(module).items() if "RULES" in key and isinstance(value, dict)]
    return found


# --- the mistakes -----------------------------------------------------------------------------------------------


def _swapped_axes(old: Any) -> Any:
    def axis_of(factor: object, like: Node) -> Axis | None:
        axis, sizes = old(factor, like), shape(like)
        if axis in (Axis.ROW, Axis.COLUMN) and len(sizes) == 2 and sizes[0] == sizes[1]:
            return Axis.COLUMN if axis is Axis.ROW else Axis.ROW
        return axis

    return axis_of


def _without_alpha(old: Any) -> Any:
    def shift(env: Any, node: Node) -> Any:
        args, kwargs = node.args, node.kwargs
        node.args, node.kwargs = args[:2], {}
        try:
            return old(env, node)
        finally:
            node.args, node.kwargs = args, kwargs

    return shift


def _no_zero_point(old: Any) -> Any:
    return lambda value, node, other, subtracts: as_affine(value)


def _all_identities(old: Any) -> Any:
    def remove_identities(graph: Graph) -> None:
        for node in list(graph.nodes):
            source = node.args[0] if node.args else None
            if not isinstance(source, Node) or not is_op(node, *RESHAPES, aten.mul.Tensor, aten.clone.default):
                continue
            before, after = source.meta["val"], node.meta["val"]
            if before.dtype != after.dtype or not same_shape(before.shape, after.shape):
                continue
            if not is_op(node, aten.mul.Tensor) or constant(node.args[1]) == 1:
                node.replace_all_uses_with(source)
                graph.erase_node(node)

    return remove_identities


def _all_pure(old: Any) -> Any:
    return lambda target: old(target) or getattr(target, "namespace", "") == "fuzz"


def _transposed_blocks(old: Any) -> Any:
    def weight_blocks(emitter: Any, product: Any, site: Any, to: torch.dtype) -> Node:
        node = old(emitter, product, site, to)
        if shape(node)[0] != shape(node)[1]:
            return node
        return emitter.call(aten.permute.default, node, [1, 0], like=site.root)

    return weight_blocks


def _always(old: Any) -> Any:
    return lambda *_, **__: True


def _no_rest(old: Any) -> Any:
    return lambda *args: dataclasses.replace(old(*args), rest=None)


def _negated(old: Any) -> Any:
    def number(emitter: Any, value: float, like: Node, to: torch.dtype) -> Node:
        return old(emitter, -value if to is torch.int32 else value, like, to)

    return number


def _scale_before_bias(old: Any) -> Any:
    def scale_product(product: Any, *rest: Any) -> Any:
        bare = old(dataclasses.replace(product, bias=None), *rest)
        return None if bare is None else dataclasses.replace(bare, bias=product.bias)

    return scale_product


def _neighbours(old: Any) -> Any:
    def block_size(parts: Any) -> Any:
        found = old(parts)
        if found != 0:
            return found
        whole = 1
        for part in parts:
            whole *= part.size
        for part in parts:
            whole = whole // part.size if part.factor is not None else whole
        return whole

    return block_size


def _transposed_square(old: Any) -> Any:
    def matrix_base(node: Node, dims: Any = None) -> tuple[Node, bool] | None:
        found = old(node, dims)
        if found is None or shape(found[0])[0] != shape(found[0])[1]:
            return found
        return found[0], not found[1]

    return matrix_base


def _any_slice(old: Any) -> Any:
    return lambda env, node: env.value(args_of(node)[0])


def _any_columns(old: Any) -> Any:
    return lambda node: len(shape(node)) == len(shape(args_of(node)[0]))


def _never_inverse(old: Any) -> Any:
    return lambda codes, node, operand, inverse=False: old(codes, node, operand, inverse=False)


def _exact(old: Any) -> Any:
    return lambda *_, **__: Numerics.EXACT


def _any_multiplier(old: Any) -> Any:
    def correct(product: Any, node: Node, other: object, correction: Any, subtracts: bool) -> Any:
        return old(product, node, other, dataclasses.replace(correction, multiplier=product.offset), subtracts)

    return correct


def _any_sign(old: Any) -> Any:
    return lambda affine, node, other, subtracts, to: old(affine, node, other, False, to)


def _without_points(old: Any) -> Any:
    def scale_and_offset(emitter: Any, site: Any, product: Any) -> Any:
        return old(emitter, site, dataclasses.replace(product, b_zero_points=()))

    return scale_and_offset


def _one_less(old: Any) -> Any:
    def recognise_quantizer(codes: Node) -> Any:
        found = old(codes)
        if isinstance(found, str) or found.arguments["dtype"] is not torch.int8:
            return found
        return dataclasses.replace(found, arguments=found.arguments | {"hi": found.arguments["hi"] - 1})

    return recognise_quantizer


def _drops_any_padding(old: Any) -> Any:
    def rule(env: Any, node: Node) -> Any:
        source, dim = args_of(node)[0], args_of(node)[1]
        dims = dict(env.of(source))
        if dim in dims and not same_shape(shape(source), shape(node)):
            env.ends[node] = dims.pop(dim).pad
        return dims

    return rule


def _first_parts(old: Any) -> Any:
    def operands_of_part(node: Node, cut: Any) -> Any:
        parts = old(node, cut)
        return parts and {source: dataclasses.replace(part, start=0) for source, part in parts.items()}

    return operands_of_part


def _never_stale(old: Any) -> Any:
    return lambda group, tensors: not any(mark.storage.expired() for mark in group.marks)


PLANTS = (
    Plant("axis", "passes.matrices:axis_of", _swapped_axes, "rows and columns change places where both fit"),
    Plant("alpha", "passes.rules.arithmetic:_shift", _without_alpha, "alpha of add and sub is not read"),
    Plant("zero point", "passes.rules.arithmetic:_zero_point", _no_zero_point, "a zero point is dropped"),
    Plant("identities", "passes.rewrite:remove_identities", _all_identities, "an output becomes an input"),
    Plant("random", "ops.purity:is_pure", _all_pure, "two calls of a random op become one"),
    Plant("blocks", "passes.canonicalize:_weight_blocks", _transposed_blocks, "square block scales are transposed"),
    Plant("int32", "passes.canonicalize:_point", _no_rest, "what int32 has no room for of a zero point is dropped"),
    Plant("offset", "passes.arrange:number", _negated, "the offset of codes has the wrong sign"),
    Plant("float offset", "passes.rules.arithmetic:_offset", _any_sign, "an offset that is subtracted is added"),
    Plant("point and offset", "passes.canonicalize:_scale_and_offset", _without_points, "a zero point beside an offset is dropped"),
    Plant("bias", "passes.rules.arithmetic:_scale_product", _scale_before_bias, "a bias that was scaled is added as it is"),
    Plant("groups", "passes.axes:block_size", _neighbours, "codes that share a scale are taken to be neighbours"),
    Plant("layout", "passes.matrices:matrix_base", _transposed_square, "a square weight is packed transposed"),
    Plant("slice", "passes.rules.views:_slice", _any_slice, "a slice is taken for the whole"),
    Plant("part", "passes.slices:operands_of_part", _first_parts, "each part of a weight is its first"),
    Plant("columns", "passes.rules.views:_keeps_columns", _any_columns, "a view that moves columns is taken for none"),
    Plant("inverse", "passes.rules.steps:scale_of", _never_inverse, "division by a scale is taken for multiplication"),
    Plant("class", "passes.rules.matmuls:_moved_out_class", _exact, "scales that leave the sum are said to be exact"),
    Plant("correction", "passes.rules.arithmetic:_correct", _any_multiplier, "any multiple of column sums is a correction"),
    Plant("range", "passes.quantizers:recognise_quantizer", _one_less, "the upper bound of codes is one less"),
    Plant("stale", "ops.constants:_is_current", _never_stale, "a weight that was written to is not packed again"),
    Plant("padding", "passes.rules.padded:_slice", _drops_any_padding, "any slice of padded rows is taken to drop the padding"),
    Plant("exact codes", "passes.matrices:holds_exactly", _always, "a cast that wraps codes around is taken for none"),
)  # fmt: skip
