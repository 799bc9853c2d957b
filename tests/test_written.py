"""New tensors that are filled slice by slice, as HQQ and BitNet unpack their codes: what they are, and what not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graphs import assert_same_meaning, calls, capture, prove, run, trace

aten = torch.ops.aten
N, K = 8, 16
Graph = Callable[[Tensor, Tensor], Tensor]
UINT8 = torch.uint8


def put(base: Tensor, part: Tensor, start: int | None, end: int | None, dim: int = 0, step: int = 1) -> Tensor:
    return torch.slice_scatter(base, part, dim, start, end, step)


def empty(*sizes: int, dtype: torch.dtype = UINT8) -> Tensor:
    return torch.empty(sizes, dtype=dtype)


def zeros(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=UINT8)


def linear(x: Tensor, codes: Tensor) -> Tensor:
    return F.linear(x, codes.float() * 0.5)


def said(graph: Graph, *, static: tuple[int, ...] = (1,)) -> tuple[str, int]:
    """What is found of ``graph``, and how many writes are left."""
    inputs = torch.randn(3, K), torch.randint(0, 256, (N // 2, K), dtype=UINT8)
    source = trace(graph, *inputs)
    proven = prove(source, static)
    assert_same_meaning(source, proven.graph, inputs)
    found = [str(site.scheme) for site in proven.found.sites] + [miss.rule for miss in proven.found.misses]
    return "; ".join(found), len(calls(proven.graph, aten.slice_scatter.default))


INT4 = "float32 x int4 per_tensor asymmetric"
FILLED: dict[str, Graph] = {
    "an empty tensor": lambda x, p: linear(x, put(put(empty(N, K), p >> 4, 0, 4), p & 15, 4, 8)),
    "zeros": lambda x, p: linear(x, put(put(zeros(N, K), p >> 4, 0, 4), p & 15, 4, 8)),
    "backwards": lambda x, p: linear(x, put(put(empty(N, K), p >> 4, 4, None), p & 15, None, -4)),
    "past the end": lambda x, p: linear(x, put(put(empty(N, K), p >> 4, 0, 4), p & 15, 4, 2**63 - 1)),
    "twice": lambda x, p: linear(x, put(put(put(empty(N, K), p, 0, 4), p >> 4, 0, 4), p & 15, 4, 8)),
    "along another dim": lambda x, p: linear(
        x, put(put(empty(N // 2, 2 * K), p >> 4, 0, K, 1), p & 15, K, 2 * K, 1).view(N, K)
    ),
    "copied": lambda x, p: linear(
        x, put(put(empty(N, K), aten.copy(empty(4, K), p >> 4), 0, 4), aten.copy(empty(4, K), p[:1] & 15), 4, 8)
    ),
    "copied as floats": lambda x, p: F.linear(
        x,
        put(
            put(empty(N, K, dtype=torch.float32), aten.copy(empty(4, K, dtype=torch.float32), p >> 4), 0, 4),
            aten.copy(empty(4, K, dtype=torch.float32), p & 15),
            4,
            8,
        )
        * 0.5,
    ),
}


@pytest.mark.parametrize("graph", FILLED.values(), ids=FILLED)
def test_what_fills_a_new_tensor_is_its_cat(graph):
    assert said(graph) == (INT4, 0)


BYTES = "float32 x uint8 per_tensor"
CHANGES = "the dequantized operand changes from call to call; only weights are rewritten"
LEFT: dict[str, tuple[Graph, str, int]] = {
    "a part only": (lambda x, p: linear(x, put(put(zeros(N, K), p >> 4, 0, 4), p[:3] & 15, 5, 8)), BYTES, 2),
    "overlapping": (lambda x, p: linear(x, put(put(zeros(N, K), p >> 4, 2, 6), p & 15, 4, 8)), BYTES, 2),
    "a step": (lambda x, p: linear(x, put(put(zeros(N, K), p >> 4, 0, 8, 0, 2), p & 15, 1, 8, 0, 2)), BYTES, 2),
    "two dims": (
        lambda x, p: linear(x, put(put(zeros(N, K), p >> 4, 0, 4), (p & 15).reshape(N, 8), 0, 8, 1)),
        BYTES,
        2,
    ),
    "one that was there": (lambda x, p: linear(x, put(put(torch.cat((p, p)), p >> 4, 0, 4), p & 15, 4, 8)), BYTES, 2),
}


@pytest.mark.parametrize(("graph", "found", "writes"), LEFT.values(), ids=LEFT)
def test_other_writes_are_left(graph, found, writes):
    inputs = torch.randn(3, K), torch.randint(0, 256, (N // 2, K), dtype=UINT8)
    source = trace(graph, *inputs)
    proven = prove(source, [1])
    assert_same_meaning(source, proven.graph, inputs)
    assert [str(site.scheme) for site in proven.found.sites] == [found]
    assert len(calls(proven.graph, aten.slice_scatter.default)) == writes


def test_a_write_in_between_keeps_what_was_copied_before():
    def graph(x, p):
        codes = put(empty(N, K), aten.copy(empty(4, K), p), 0, 4)
        p.zero_()
        return linear(x, put(codes, p & 15, 4, 8)), p

    inputs = torch.randn(3, K), torch.randint(1, 256, (N // 2, K), dtype=UINT8)
    source = trace(graph, *inputs)
    proven = prove(source, [1])
    expected, _ = run(source, *inputs)
    actual, _ = run(proven.graph, *inputs)
    assert torch.equal(actual[0], expected[0])
    assert expected[0].abs().sum() > 0


class BitLinear(nn.Module):
    """As transformers has it: two bits a code, the rows in four quarters, one less."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(0, 256, (16, 64), dtype=UINT8))

    def forward(self, x: Tensor) -> Tensor:
        by = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        codes = (x * by).round().clamp(-128, 127).to(torch.int8)
        rows = self.weight.shape[0]
        unpacked = torch.zeros((4 * rows, 64), dtype=UINT8)
        for i in range(4):
            unpacked[i * rows : (i + 1) * rows] = (self.weight & (3 << 2 * i)) >> (2 * i)
        return F.linear(codes.to(x.dtype), unpacked.to(x.dtype) - 1) / (by * 0.7)


def test_ternary_codes_of_one_zero_point_are_multiplied_as_they_are():
    (captured,) = capture(BitLinear(), torch.randn(5, 64))
    (row,) = captured.state.rows.values()
    assert str(row.site.words) == "int8 per_token (dynamic) x int4 unscaled"
    assert row.site.problem.scheme.weight.symmetric
    assert not calls(captured.state.graph, aten.sub.Tensor)  # but in what is folded
