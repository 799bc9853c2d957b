"""Parts of a decoded weight are parts of its codes; what is no such part stays, and is missed with its reason."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

import fx_quant
from fx_quant.passes.nodes import aten
from fx_quant.passes.slices import cut_of, decode_parts
from tests.graphs import assert_same_meaning, copy_of, prove, run, trace

N, K, G = 24, 64, 16
Weight = Callable[..., Tensor]


def bytes_of(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)


def floats(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def by_channel(w: Tensor, s: Tensor) -> Tensor:
    return w.float() * s


def by_group(w: Tensor, s: Tensor) -> Tensor:
    return (w.float().unflatten(-1, (-1, G)) * s[..., None]).flatten(-2)


def by_block(w: Tensor, s: Tensor) -> Tensor:
    return (w.float().view(3, 8, K // G, G) * s[:, None, :, None]).view(N, K)


def by_nibble(w: Tensor, s: Tensor) -> Tensor:
    codes = torch.stack([w & 15, w >> 4], -1).view(N, K)
    return ((codes.to(torch.int8) - 8).float().view(N, -1, G) * s[..., None]).view(N, K)


def said(graph: Callable[..., list[Tensor]], *inputs: Tensor) -> list[str]:
    """What is found of ``graph``, which must mean what it meant."""
    source = trace(graph, *inputs)
    proven = prove(source)
    assert_same_meaning(source, proven.graph, inputs)
    found = [f"{site.words} -> {site.numerics}" for site in proven.found.sites]
    return [*found, *(f"miss: {miss.rule}" for miss in proven.found.misses)]


def linears(parts: Callable[[Tensor], list[Tensor]], decoded: Weight) -> Callable[..., list[Tensor]]:
    return lambda x, *weight: [x[..., : part.shape[-1]] @ part.t() for part in parts(decoded(*weight))]


CHANNELS, GROUPS = "float32 x int8 per_channel -> reassociated", "float32 x int8 per_group(16) -> reassociated"
TENSOR = "float32 x int8 per_tensor -> reassociated"
W, S = bytes_of(N, K), floats(N, 1)
EXPERTS = bytes_of(3, 8, K), floats(3, 8, 1)
PARTS: dict[str, tuple[Callable[[Tensor], list[Tensor]], Weight, tuple[Tensor, ...], str, int]] = {
    "chunk": (lambda w: list(w.chunk(3)), by_channel, (W, S), CHANNELS, 3),
    "split": (lambda w: list(w.split([8, 4, 12])), by_channel, (W, S), CHANNELS, 3),
    "split unevenly": (lambda w: list(w.split(10)), by_channel, (W, S), CHANNELS, 3),
    "narrow": (lambda w: [w.narrow(0, 4, 8)], by_channel, (W, S), CHANNELS, 1),
    "from the end": (lambda w: [w[-8:-2]], by_channel, (W, S), CHANNELS, 1),
    "a row": (lambda w: [w[3:4]], by_channel, (W, S), TENSOR, 1),
    "every other row": (lambda w: [w[1::2]], by_channel, (W, S), CHANNELS, 1),
    "one scale": (lambda w: list(w.chunk(3)), by_channel, (W, floats(1)), TENSOR, 3),
    "groups": (lambda w: list(w.chunk(3)), by_group, (W, floats(N, K // G)), GROUPS, 3),
    "blocks": (lambda w: list(w.chunk(3)), by_block, (W, floats(3, K // G)), "float32 x int8 per_block(8, 16) -> ", 3),
    "nibbles": (
        lambda w: list(w.chunk(3)),
        by_nibble,
        (bytes_of(N, K // 2, dtype=torch.uint8), floats(N, K // G)),
        "float32 x int4 per_group(16) -> ",
        3,
    ),
    "zero points": (
        lambda w: list(w.chunk(3)),
        lambda w, s, z: (w.float() - z) * s,
        (W, S, bytes_of(N, 1)),
        "float32 x int8 per_channel asymmetric -> ",
        3,
    ),
    "offsets": (
        lambda w: list(w.chunk(3)),
        lambda w, s, o: torch.addcmul(o, w.float(), s),
        (W, S, floats(N, 1)),
        "float32 x int8 per_channel with offset -> ",
        3,
    ),
    "an expert": (lambda w: [w[1]], by_channel, EXPERTS, CHANNELS, 1),
    "the last expert": (lambda w: [w[-1]], by_group, (EXPERTS[0], floats(3, 8, K // G)), GROUPS, 1),
    "every expert": (lambda w: list(w.unbind()), by_channel, EXPERTS, CHANNELS, 3),
    "experts after a view": (lambda w: list(w.view(3, 8, K).unbind()), by_channel, (W, S), CHANNELS, 3),
    "interleaved": (lambda w: list(w.view(8, 3, K).unbind(1)), by_channel, (W, S), CHANNELS, 3),
    "transposed": (lambda w: [part.t() for part in w.t().chunk(3, 1)], by_channel, (W, S), CHANNELS, 3),
    "a part of a part": (lambda w: [w.chunk(3)[1][2:6]], by_channel, (W, S), CHANNELS, 1),
    "a part of an expert": (lambda w: [part for e in w.unbind() for part in e.chunk(2)], by_channel, EXPERTS, CHANNELS, 6),
    "columns": (lambda w: [w[:, :24]], by_channel, (W, S), CHANNELS, 1),
    "whole groups of columns": (lambda w: [w[:, 16:48]], by_group, (W, floats(N, K // G)), GROUPS, 1),
    "of codes that stand in int32": (
        lambda w: [w],
        lambda w, s: (w & 15)[8:].float() * s[8:],
        (bytes_of(N, K).int(), S),
        "float32 x int4 per_channel asymmetric -> ",
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "decoded", "weight", "found", "count"), PARTS.values(), ids=PARTS)
def test_parts_of_a_decoded_weight_are_weights(parts, decoded, weight, found, count):
    reasons = said(linears(parts, decoded), torch.randn(3, K), *weight)
    assert len(reasons) == count
    assert all(reason.startswith(found) for reason in reasons), reasons


def test_parts_beside_a_quantized_activation_are_multiplied_as_codes():
    def graph(x, w, s):
        scale = x.abs().amax(-1, keepdim=True) / 127
        q = (x / scale).round().clamp(-128, 127).to(torch.int8)
        return [(q.float() * scale) @ part.t() for part in by_channel(w, s).chunk(3)]

    assert said(graph, torch.randn(3, K), W, S) == ["int8 per_token (dynamic) x int8 per_channel -> reassociated"] * 3


NO_SLICE = "miss: a part of a decoded weight that is no slice of its codes, scales and zero points"
LEFT: dict[str, tuple[Callable[[Tensor], list[Tensor]], Weight, tuple[Tensor, ...]]] = {
    "columns that cut a group": (lambda w: [w[:, :24]], by_group, (W, floats(N, K // G))),
    "columns that begin in a group": (lambda w: [w[:, 8:24]], by_group, (W, floats(N, K // G))),
    "every other column of groups": (lambda w: [w[:, ::2]], by_group, (W, floats(N, K // G))),
    "rows that cut a block": (lambda w: [w[4:16]], by_block, (W, floats(3, K // G))),
    "several of interleaved rows": (lambda w: [w.view(8, 3, K)[:, :2].reshape(16, K)], by_channel, (W, S)),
    "overlapping parts": (lambda w: [w[:16], w[8:]], by_channel, (W, S)),
    "parts beside the whole": (lambda w: [w, w[8:]], by_channel, (W, S)),
}


@pytest.mark.parametrize(("parts", "decoded", "weight"), LEFT.values(), ids=LEFT)
def test_what_is_no_part_of_the_codes_is_missed(parts, decoded, weight):
    reasons = said(linears(parts, decoded), torch.randn(3, K), *weight)
    assert NO_SLICE in reasons
    assert set(reasons) <= {NO_SLICE, CHANNELS}


def moved(graph: Graph, *static: int) -> list[str]:
    """The slices of ``graph`` that are of floats, after what can has moved."""
    work = copy_of(graph)
    decode_parts(work, frozenset(static))
    work.lint()
    return [node.name for node in work.nodes if cut_of(node) and node.meta["val"].is_floating_point()]


def test_what_is_returned_or_comes_with_the_call_stays():
    def of_call(x, w, s):
        return [x @ part.t() for part in by_channel(w, s).chunk(3)]

    def returned(x, w, s):
        return (parts := by_channel(w, s).chunk(3))[0], x @ parts[1].t()

    inputs = torch.randn(3, K), W, S
    assert len(moved(trace(of_call, *inputs), 1)) == 3
    assert len(moved(trace(of_call, *inputs), 1, 2)) == 3, "of the scale, which is sliced instead"
    graph = trace(returned, *inputs)
    assert moved(graph, 1, 2) == [node.name for node in graph.nodes if cut_of(node)]


def test_a_graph_without_such_slices_is_left():
    graph = trace(lambda x, w, s: (x @ by_channel(w, s).t())[:, :4].chunk(2), torch.randn(3, K), W, S)
    before = str(graph)
    decode_parts(graph, frozenset([1, 2]))
    assert str(graph) == before


# --- any chain of steps ---------------------------------------------------------------------------------------------

SIZES = (4, 6, 8)
Step = Callable[[Tensor, Tensor], Tensor]


def _step(draw: random.Random, w: Tensor) -> tuple[Step, Tensor]:
    """A step of ``w`` and a factor that a decode may take, or a slice; and the factor."""
    dim, sizes = draw.randrange(w.dim()), list(w.shape)
    size, even = sizes[dim], sizes[dim] % 2 == 0
    factor = torch.rand([n if draw.random() < 0.5 else 1 for n in sizes][draw.randrange(w.dim()) :]) + 0.5
    start = draw.randrange(size)
    stop, by = draw.randint(start + 1, size), draw.choice((1, 1, 1, 2))
    order = draw.sample(range(w.dim()), w.dim())
    steps: list[Step] = [
        lambda w, f: w * f,
        lambda w, f: f - w,
        lambda w, f: torch.where(w > f, w, f),
        lambda w, f: w.permute(order),
        lambda w, f: w.flatten(max(dim - 1, 0), dim),
        lambda w, f: w.unsqueeze(dim).expand(*sizes[:dim], 2, *sizes[dim:]),
        lambda w, f: w.unflatten(dim, (-1, 2)) if even else w.clone(),
        lambda w, f: w.unflatten(dim, (2, -1)) if even else w.bfloat16().float(),
    ]
    slices: list[Step] = [
        lambda w, f: w.narrow(dim, start, stop - start),
        lambda w, f: aten.slice.Tensor(w, dim, start, stop, by),
        lambda w, f: w.select(dim, start) if w.dim() > 1 else w,
        lambda w, f: w.unbind(dim)[start] if w.dim() > 1 else w,
    ]
    return draw.choice(slices if draw.random() < 0.35 else steps), factor


def _chain(seed: int) -> tuple[Graph, list[Tensor]]:
    """A graph of codes that are decoded by such steps, and its inputs, all of them stored."""
    draw = random.Random(seed)
    codes = bytes_of(*(draw.choice(SIZES) for _ in range(draw.randint(1, 3))))
    steps: list[Step] = []
    inputs, w = [codes], codes.float()
    for _ in range(draw.randint(2, 9)):
        step, factor = _step(draw, w)
        steps.append(step)
        inputs.append(factor)
        w = step(w, factor)

    def graph(codes: Tensor, *factors: Tensor) -> Tensor:
        w = codes.float()
        for step, factor in zip(steps, factors, strict=True):
            w = step(w, factor)
        return w + 1

    return trace(graph, *inputs), inputs


def test_the_parts_are_those_of_the_whole_bit_for_bit():
    moves = 0
    for seed in range(40):
        source, inputs = _chain(seed)
        work = copy_of(source)
        decode_parts(work, frozenset(range(len(inputs))))
        moves += str(work) != str(source)
        assert torch.equal(run(work, *inputs)[0][0], run(source, *inputs)[0][0]), seed
    assert moves > 10


# --- through the backend ----------------------------------------------------------------------------------------------


class FusedProjection(nn.Module):
    """q, k and v of one weight that is decoded whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", bytes_of(N, K))
        self.register_buffer("scale", floats(N, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, part) for part in by_channel(self.weight, self.scale).chunk(3))


def test_parts_are_packed_once_and_again_after_a_write(op_by_op):
    model, x = FusedProjection(), torch.randn(3, K)
    report = fx_quant.explain(model, x)
    assert len(report.sites) == 3, report
    compiled = torch.compile(model, backend="fx_quant")
    with torch.no_grad():
        for write in (lambda: None, model.weight[9:10].neg_, lambda: model.scale.mul_(3)):
            write()
            for actual, expected in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)
