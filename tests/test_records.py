"""Codes and scales in one buffer of bytes, as GGUF stores them: 34 bytes a block, a float16 in front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import assert_same_meaning, prove, trace

N, K, G = 8, 64, 32
F16, INT8 = torch.float16, torch.int8
Graph = Callable[[Tensor, Tensor], Tensor]


def records(lead: int = 2, *, between: int = 0) -> Tensor:
    """``[n k / 32, lead + 32]`` bytes: halves that are scales, then codes; ``between`` bytes before the next."""
    scales = torch.rand(N * K // G, lead // 2).to(F16) + 0.5
    codes = torch.randint(-128, 128, (N * K // G, G), dtype=INT8)
    parts = (scales.view(torch.uint8), codes.view(torch.uint8), torch.zeros(N * K // G, between, dtype=torch.uint8))
    return torch.cat(parts, 1)


def said(graph: Graph, b: Tensor) -> str:
    inputs = torch.randn(3, K), b
    source = trace(graph, *inputs)
    proven = prove(source, [1])
    assert_same_meaning(source, proven.graph, inputs)
    found = [f"{site.words} -> {site.numerics}" for site in proven.found.sites]
    return "; ".join([*found, *(f"miss: {miss.rule}" for miss in proven.found.misses)]) or "nothing"


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.reshape(N, K))


GROUPS = "float32 x int8 per_group(32) -> reassociated"
RECORDS: dict[str, tuple[Tensor, Graph]] = {
    "sliced": (records(), lambda x, b: linear(x, b[:, :2].view(F16).float() * b[:, 2:].view(INT8))),
    "split": (
        records(),
        lambda x, b: linear(x, b.split([2, 32], 1)[0].view(F16).float() * b.split([2, 32], 1)[1].view(INT8)),
    ),
    "narrow": (records(), lambda x, b: linear(x, b.narrow(1, 0, 2).view(F16).float() * b.narrow(1, 2, 32).view(INT8))),
    "flat": (
        records(),
        lambda x, b: linear(x, b.view(-1, 34)[:, :2].view(F16).float() * b.view(-1).view(INT8).view(-1, 34)[:, 2:]),
    ),
    "other bytes between": (
        records(between=6),
        lambda x, b: linear(x, b[:, :2].view(F16).float() * b[:, 2:34].view(INT8)),
    ),
    "whole, then parts": (
        records(),
        lambda x, b: linear(x, b.view(INT8)[:, 2:].float() * b.view(F16)[:, :1]),
    ),
}


@pytest.mark.parametrize(("b", "graph"), RECORDS.values(), ids=RECORDS)
def test_codes_beside_their_scale_are_codes(b, graph):
    assert said(graph, b) == GROUPS


def test_a_scale_and_the_least_value_before_the_codes():
    def graph(x, b):
        return linear(x, b[:, :2].view(F16).float() * b[:, 4:] + b[:, 2:4].view(F16).float())

    assert said(graph, records(4)) == "float32 x uint8 per_group(32) with offset -> reassociated"


NOT_GROUPS: dict[str, tuple[Tensor, Graph, str]] = {
    "every other byte": (
        records(2, between=32),
        lambda x, b: linear(x, b[:, :2].view(F16).float() * b[:, 2:66:2].view(INT8)),
        GROUPS,  # other codes, and groups all the same
    ),
    "the scale of the next block": (
        records(),
        lambda x, b: linear(x, b[:, :2].view(F16).float().roll(1, 0) * b[:, 2:].view(INT8)),
        GROUPS,
    ),
    "a stride that is not that of the blocks": (
        records(between=30),
        lambda x, b: linear(x, b.view(-1)[: 17 * 60].view(17, 60)[:16, :2].view(F16).float() * b[:, 2:34].view(INT8)),
        GROUPS,
    ),
    "codes as halves": (
        records(),
        lambda x, b: linear(x, b[:, :2].view(F16).float() * b[:, 2:].view(F16).repeat(1, 2)),
        "nothing",
    ),
}


@pytest.mark.parametrize(("b", "graph", "found"), NOT_GROUPS.values(), ids=NOT_GROUPS)
def test_what_else_is_read_of_the_bytes_is_what_it_is(b, graph, found):
    assert said(graph, b) == found
