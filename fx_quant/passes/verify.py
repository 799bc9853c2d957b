"""What must hold of a graph after the passes; a violation is a bug in them, and the original graph compiles instead."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from fx_quant.passes.canonical import CANONICAL
from fx_quant.passes.memory import Memory
from fx_quant.passes.nodes import returned, same_shape


class VerificationError(AssertionError):
    """A rewritten graph breaks an invariant."""


def verify(graph: Graph, before: Graph, assigned: Collection[str] = ()) -> None:
    """Raise unless ``graph`` is well-formed, canonical ops are gone and its outputs are like those of ``before``.

    They look alike, and share memory with the same inputs and outputs: a caller may write to any of them.

    Args:
        assigned: names of the canonical ops that were given a kernel. One of ``before`` that was not is left there.

    Raises:
        VerificationError: names the output.
    """
    graph.lint()
    left = {node.name for node in _canonical_ops(before)}.difference(assigned)
    leftover = [node for node in _canonical_ops(graph) if node.name not in left]
    if leftover:
        raise VerificationError(f"canonical ops must all be assigned a kernel, found {leftover}")
    for old, new in zip(returned(before), returned(graph), strict=True):
        _same_metadata(old if isinstance(old, Node) else None, new if isinstance(new, Node) else None)
    for i, (was, now) in enumerate(zip(Memory(before).outputs(), Memory(graph).outputs(), strict=True)):
        if was != now:
            raise VerificationError(f"output {i} must keep the memory of {was}, got that of {now}")


def _canonical_ops(graph: Graph) -> list[Node]:
    return [node for op in CANONICAL for node in graph.find_nodes(op="call_function", target=op)]


def _same_metadata(old: Node | None, new: Node | None) -> None:
    if (old is None) != (new is None):
        raise VerificationError(f"output {old} became {new}")
    if old is None or new is None:
        return
    was, now = old.meta.get("val"), new.meta.get("val")
    if not isinstance(was, torch.Tensor) and not isinstance(now, torch.Tensor):
        return
    if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor):
        raise VerificationError(f"output {old} became {new}")
    if was.dtype != now.dtype or not same_shape(was.shape, now.shape) or was.device != now.device:
        raise VerificationError(f"output {old} was {_text(was)}, became {_text(now)}")


def _text(value: torch.Tensor) -> str:
    return f"{value.dtype}{list(value.shape)} on {value.device}"
