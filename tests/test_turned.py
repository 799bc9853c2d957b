"""Linears that are spelled as something else: a weight on the left, convolutions of one element, ``mv``, ``baddbmm``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_quant
from fx_quant.passes.turned import turn
from tests.graphs import assert_same_meaning, calls, copy_of, prove, rewrite, run_in_float64, trace

aten = torch.ops.aten
B, N, K, T, G = 2, 24, 64, 3, 16
Graph = Callable[..., Tensor]


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) / 50 + 0.01


def decoded(w: Tensor, s: Tensor) -> Tensor:
    return w.float() * s


def by_group(w: Tensor, s: Tensor) -> Tensor:
    return (w.float().unflatten(1, (-1, G)) * s[..., None]).flatten(1)


def quantized(x: Tensor) -> Tensor:
    """An activation that is quantized by one static scale and decoded, as PT2E leaves it."""
    return (x / 0.05).round().clamp(-128, 127).to(torch.int8).float() * 0.05


def said(graph: Graph, *inputs: Tensor) -> str:
    """What is found of ``graph``, which must mean what it meant."""
    source = trace(graph, *inputs)
    proven = prove(source)
    assert_same_meaning(source, proven.graph, inputs)
    found = [f"{site.words} -> {site.numerics}" for site in proven.found.sites]
    return "; ".join([*found, *(f"miss: {miss.rule}" for miss in proven.found.misses)]) or "nothing"


W, S = bytes_of(N, K), scales(N, 1)
CHANNELS, GROUPS = "float32 x int8 per_channel -> reassociated", "float32 x int8 per_group(16) -> reassociated"
INT8 = "int8 per_tensor (static) x int8 per_channel -> reassociated"
LINEARS: dict[str, tuple[Graph, tuple[Tensor, ...], str]] = {
    "left": (lambda x, w, s: decoded(w, s) @ x, (torch.randn(K, T), W, S), CHANNELS),
    "left of a batch": (lambda x, w, s: decoded(w, s) @ x, (torch.randn(B, K, T), W, S), CHANNELS),
    "left of groups": (lambda x, w, s: by_group(w, s) @ x, (torch.randn(B, K, T), W, scales(N, K // G)), GROUPS),
    "left, scaled after": (
        lambda x, w, s: (w.float() @ x) * s,
        (torch.randn(B, K, T), W, S),
        "float32 x int8 unscaled -> same_accum",
    ),
    "left by einsum": (lambda x, w, s: torch.einsum("nk,bkt->bnt", decoded(w, s), x), (torch.randn(B, K, T), W, S), CHANNELS),
    "left of a quantized one": (lambda x, w, s: decoded(w, s) @ quantized(x), (torch.randn(B, K, T), W, S), INT8),
    "left and transposed": (lambda x, w, s: (decoded(w, s) @ x.mT).mT, (torch.randn(B, T, K), W, S), CHANNELS),
    "conv1d": (lambda x, w, s: F.conv1d(x, decoded(w, s)[..., None]), (torch.randn(B, K, T), W, S), CHANNELS),
    "conv1d of groups": (
        lambda x, w, s: F.conv1d(x, by_group(w, s)[..., None]),
        (torch.randn(B, K, T), W, scales(N, K // G)),
        GROUPS,
    ),
    "conv2d": (
        lambda x, w, s, b: F.conv2d(x, decoded(w, s), b),
        (torch.randn(B, K, 3, 2), W[..., None, None], S[..., None, None], torch.randn(N)),
        CHANNELS,
    ),
    "conv2d of channels last": (
        lambda x, w, s, b: F.conv2d(x, decoded(w, s), b),
        (torch.randn(B, 3, 2, K).movedim(-1, 1), W[..., None, None], S[..., None, None], torch.randn(N)),
        CHANNELS,
    ),
    "conv2d of one image": (
        lambda x, w, s: F.conv2d(x, decoded(w, s)),
        (torch.randn(K, 3, 2), W[..., None, None], S[..., None, None]),
        CHANNELS,
    ),
    "conv2d of a quantized one": (
        lambda x, w, s, b: F.conv2d(quantized(x), decoded(w, s), b).relu(),
        (torch.randn(B, K, 3, 2), W[..., None, None], S[..., None, None], torch.randn(N)),
        INT8,
    ),
    "conv3d": (
        lambda x, w, s, b: F.conv3d(x, decoded(w, s), b),
        (torch.randn(B, K, 2, 3, 2), W[..., None, None, None], S[..., None, None, None], torch.randn(N)),
        CHANNELS,
    ),
    "viewed after": (
        lambda x, w, s: F.conv2d(x, decoded(w, s)).view(B, N, 6),
        (torch.randn(B, K, 3, 2), W[..., None, None], S[..., None, None]),
        CHANNELS,
    ),
    "mv": (lambda x, w, s: torch.mv(decoded(w, s), x), (torch.randn(K), W, S), CHANNELS),
    "mv of groups": (lambda x, w, s: by_group(w, s) @ x, (torch.randn(K), W, scales(N, K // G)), GROUPS),
    "mv of a quantized one": (lambda x, w, s: decoded(w, s) @ quantized(x), (torch.randn(K), W, S), INT8),
    "mv of a square": (lambda x, w, s: decoded(w, s) @ x, (torch.randn(K), bytes_of(K, K), scales(K, 1)), CHANNELS),
    "addmv": (lambda x, w, s, b: torch.addmv(b, decoded(w, s), x), (torch.randn(K), W, S, torch.randn(N)), CHANNELS),
    "baddbmm": (
        lambda x, w, s, b: torch.baddbmm(b, x, decoded(w, s).t().expand(B, K, N)),
        (torch.randn(B, T, K), W, S, torch.randn(N)),
        CHANNELS,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("graph", "inputs", "found"), LINEARS.values(), ids=LINEARS)
def test_a_linear_is_one_however_it_is_spelled(graph, inputs, found):
    assert said(graph, *inputs) == found


CONVOLUTION = "miss: a convolution of a weight that is decoded from stored codes, which no rule rewrites"
LEFT = "miss: the quantized weight is the left operand of the matmul"
IMAGE, KERNEL, OF_KERNEL = torch.randn(B, K, 4, 4), W[..., None, None], S[..., None, None]
NO_LINEARS: dict[str, tuple[Graph, tuple[Tensor, ...], str]] = {
    "a larger kernel": (lambda x, w, s: F.conv2d(x, decoded(w, s)), (IMAGE, bytes_of(N, K, 2, 2), OF_KERNEL), CONVOLUTION),
    "a long kernel": (lambda x, w, s: F.conv2d(x, decoded(w, s)), (IMAGE, bytes_of(N, K, 1, 2), OF_KERNEL), CONVOLUTION),
    "padding": (lambda x, w, s: F.conv2d(x, decoded(w, s), padding=(0, 1)), (IMAGE, KERNEL, OF_KERNEL), CONVOLUTION),
    "a stride": (lambda x, w, s: F.conv2d(x, decoded(w, s), stride=(1, 2)), (IMAGE, KERNEL, OF_KERNEL), CONVOLUTION),
    "groups": (lambda x, w, s: F.conv2d(x, decoded(w, s), groups=2), (IMAGE, KERNEL[:, : K // 2], OF_KERNEL), CONVOLUTION),
    "a transposed one": (
        lambda x, w, s: F.conv_transpose2d(x, decoded(w, s)),
        (IMAGE, bytes_of(K, N, 1, 1), scales(K, 1, 1, 1)),
        CONVOLUTION,
    ),
    "another weight for each of a batch": (
        lambda x, w, s: torch.bmm(decoded(w, s), x),
        (torch.randn(B, K, T), bytes_of(B, N, K), scales(B, N, 1)),
        "miss: a batched matmul whose second operand differs from batch to batch",
    ),
    "another bias for each of a batch": (
        lambda x, w, s, b: torch.baddbmm(b, x, decoded(w, s).t().expand(B, K, N)),
        (torch.randn(B, T, K), W, S, torch.randn(B, 1, N)),
        "miss: baddbmm adds a matrix, not a bias along n",
    ),
    "a bias that is multiplied": (
        lambda x, w, s, b: torch.baddbmm(b, x, decoded(w, s).t().expand(B, K, N), beta=2),
        (torch.randn(B, T, K), W, S, torch.randn(N)),
        "miss: baddbmm with alpha or beta other than 1",
    ),
    "scales along k": (
        lambda x, w, s: decoded(w, s) @ x,
        (torch.randn(K, T), W, scales(1, K)),
        "miss: the scale of b varies along k, so it cannot leave the sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("graph", "inputs", "found"), NO_LINEARS.values(), ids=NO_LINEARS)
def test_what_is_no_linear_is_left_with_its_reason(graph, inputs, found):
    assert said(graph, *inputs).startswith(found)


NO_KERNEL = "arm"


def test_one_that_no_kernel_runs_stays_as_it_was():
    inputs = torch.randn(1, K, 4, 4), W, scales(N, K // G)
    state = rewrite(trace(lambda x, w, s: F.conv2d(x, by_group(w, s)[..., None, None]), *inputs), target=NO_KERNEL)
    (miss,) = state.misses
    assert not state.rows
    assert not state.recognised
    assert miss.gemm.target is aten.convolution.default
    assert miss.rule.startswith(f"as a matmul: no kernel of {NO_KERNEL} runs this scheme")


def test_of_two_only_the_one_that_is_rewritten_is_turned():
    def graph(x, w, s, along_k):
        return decoded(w, s) @ x, F.conv1d(x[None], decoded(w, along_k)[..., None])

    inputs = torch.randn(K, T), W, S, scales(1, K)
    source = trace(graph, *inputs)
    state = rewrite(source)
    assert [row.site.words for row in state.rows.values()] == ["float32 x int8 per_channel"]
    (miss,) = state.misses
    assert miss.gemm.target is aten.convolution.default
    assert miss.rule == "as a matmul: the scale of b varies along k, so it cannot leave the sum"
    assert_same_meaning(source, state.graph, inputs)
    assert calls(state.graph, aten.convolution.default)
    assert not calls(state.graph, aten.mm.default)


def test_floats_and_activations_are_not_turned():
    def graph(x, w, s):
        return w.float() @ x, F.conv1d(x[None], s[..., None]), decoded(w, s) @ (decoded(w, s).t() * 2)

    source = trace(graph, torch.randn(K, T), W, scales(N, K))
    work = copy_of(source)
    assert turn(work, frozenset([2]), {}).matmuls == {}
    assert str(work) == str(source)


@pytest.mark.parametrize("count", [128, 129])
def test_many_rows_of_floats_are_not_moved_for_a_weight(count):
    inputs = torch.randn(1, K, count), W, S
    state = rewrite(trace(lambda x, w, s: decoded(w, s) @ x, *inputs))
    assert len(state.rows) == (count == 128)
    reason = "as a matmul it may have more than 128 rows of floats, where decoding the weight is not worth moving them"
    assert [miss.rule for miss in state.misses] == ([] if count == 128 else [reason])


def test_free_rows_of_codes_are_turned():
    def graph(x, w, s):
        return decoded(w, s) @ quantized(x).mT

    inputs = torch.randn(5, K), W, S
    source = trace(graph, *inputs, dynamic=True)
    state = rewrite(source)
    assert len(state.rows) == 1, state.misses
    for new, old in zip(run_in_float64(state.graph, *inputs)[0], run_in_float64(source, *inputs)[0], strict=True):
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)
        assert new.stride() == old.stride()


class Mixer(nn.Module):
    """Channels first: a 1x1 convolution of codes beside a weight on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", bytes_of(N, K, 1))
        self.register_buffer("scale", scales(N, 1, 1))
        self.register_buffer("mix", bytes_of(K, K))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d((self.mix.float() * 0.01) @ quantized(x), self.weight.float() * self.scale).view(B, -1)


def test_turned_weights_are_packed_again_after_a_write(op_by_op):
    model, x = Mixer(), torch.randn(B, K, T)
    report = fx_quant.explain(model, x)
    assert [site.notes for site in report.sites] == [
        ("bmm as a matmul with the weight on the right",),
        ("convolution as a matmul with the weight on the right",),
    ], report
    compiled = torch.compile(model, backend="fx_quant")
    with torch.no_grad():
        for write in (lambda: None, model.weight[3:4].neg_, lambda: model.scale.mul_(3), model.mix.neg_):
            write()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-2)
