"""The words of a scheme say what the source does, however it spells it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels.cpu.groups_kernels import GROUP_LEVELS
from tests.graphs import assert_same_meaning, prove, rewrite, run, trace

K, N = 64, 48
INT8 = torch.int8
X, B = torch.linspace(-3, 3, 32 * K).reshape(32, K).sin(), torch.linspace(-1, 1, N)
W = torch.randint(-100, 100, (N, K), dtype=INT8, generator=torch.Generator().manual_seed(0))
S = torch.linspace(0.01, 0.02, N)


def quantized(x: Tensor, *dims: int) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(dims or (-1,), keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-128, 127).to(INT8), scale


def summed(x, w, *dims):
    q, scale = quantized(x, *dims)
    return torch._int_mm(q, w.t()), scale


def one_by_one(x, w, s, b):
    acc, scale = summed(x, w)
    return acc.float() * scale * s + b


def outer_by_matmul(x, w, s, b):
    acc, scale = summed(x, w)
    return acc.float() * (scale @ s[None]) + b


def outer_by_product(x, w, s, b):
    acc, scale = summed(x, w)
    return acc.float() * (scale * s[None]) + b


def outer_by_einsum(x, w, s, b):
    acc, scale = summed(x, w)
    return acc.float() * torch.einsum("m,n->mn", scale.flatten(), s) + b


def expanded_first(x, w, s, b):
    acc, scale = summed(x, w)
    return acc * scale.expand(len(x), N) * s + b


def addcmul_of_the_column(x, w, s, b):
    acc, scale = summed(x, w)
    return torch.addcmul(b, acc.float() * scale, s)


def addcmul_of_both(x, w, s, b):
    acc, scale = summed(x, w)
    return torch.addcmul(b, acc.float(), scale * s)


def addcmul_of_the_scale_first(x, w, s, b):
    acc, scale = summed(x, w)
    return torch.addcmul(b, scale * s, acc.float())


def asserted(x, w, s, b):
    """As ``torch.export`` leaves it."""
    acc, scale = summed(x, w)
    torch.ops.aten._assert_tensor_metadata(acc, None, None, torch.int32)
    y = acc.float() * scale
    torch.ops.aten._assert_tensor_metadata(y, None, None, torch.float32)
    return y * s + b


_SPELLINGS = (
    one_by_one,
    outer_by_matmul,
    outer_by_product,
    outer_by_einsum,
    expanded_first,
    addcmul_of_the_column,
    addcmul_of_both,
    addcmul_of_the_scale_first,
    asserted,
)


@pytest.mark.parametrize("rows", [32, 1])
@pytest.mark.parametrize("spelling", _SPELLINGS, ids=lambda f: f.__name__)
def test_scales_of_rows_and_columns_are_read_however_they_leave_the_sum(spelling, rows):
    inputs = (X[:rows], W, S, B)
    graph = trace(spelling, *inputs)
    state = rewrite(graph)
    (site,) = state.rows
    assert site.words == "int8 per_token (dynamic) x int8 per_channel"
    assert_same_meaning(state.before, state.graph, inputs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4, 1), (3, 1, 1), (1, 4, 1), (4, 1), (1, 1, 1)], ids=str)
def test_a_scale_of_some_leading_dims_is_repeated_along_the_others(sizes, dynamic):
    def scaled(a, w, scale, s):
        acc = torch._int_mm(a.reshape(-1, a.shape[-1]), w.t())
        return acc.view(a.shape[0], a.shape[1], N).float() * scale * s

    a = torch.randint(-100, 100, (3, 4, 16), generator=torch.Generator().manual_seed(1)).to(INT8)
    w = torch.randint(-100, 100, (N, 16), generator=torch.Generator().manual_seed(2)).to(INT8)
    inputs = (a, w, torch.rand(sizes, generator=torch.Generator().manual_seed(3)) + 0.5, S)
    state = rewrite(trace(scaled, *inputs, dynamic=dynamic), static=[1, 3])
    (site,) = state.rows
    kind = "per_tensor" if sizes == (1, 1, 1) else "per_token"
    assert site.words == f"int8 {kind} (dynamic) x int8 per_channel"
    assert_same_meaning(state.before, state.graph, inputs)


@pytest.mark.parametrize("rows", [32, 1])
def test_a_scale_of_the_whole_tensor_is_per_tensor_whatever_the_rows(rows):
    def per_tensor(x, w, s):
        acc, scale = summed(x, w, -2, -1)
        return acc.float() * scale * s

    (site,) = rewrite(trace(per_tensor, X[:rows], W, S)).rows
    assert site.words == "int8 per_tensor (dynamic) x int8 per_channel"


def test_a_given_scale_of_one_row_is_per_tensor():
    def static(x, w, s, scale):
        return torch._int_mm((x / scale).round().clamp(-128, 127).to(INT8), w.t()).float() * scale * s

    (site,) = rewrite(trace(static, X[:1], W, S, torch.full((1, 1), 0.05))).rows
    assert site.words == "int8 per_tensor (static) x int8 per_channel"


def test_addcmul_with_a_value_is_left_as_it_is():
    def valued(x, w, s, b):
        acc, scale = summed(x, w)
        return torch.addcmul(b, acc.float() * scale, s, value=2)

    inputs = (X, W, S, B)
    state = rewrite(trace(valued, *inputs))
    (site,) = state.rows
    # PyTorch 2.11 decomposes it, and then all of it is the site's.
    left = any(node.target is torch.ops.aten.addcmul.default for node in state.before.nodes)
    assert str(site.root.target) == ("aten.mul.Tensor" if left else "aten.add.Tensor")
    assert_same_meaning(state.before, state.graph, inputs)


def test_a_scale_that_no_rule_follows_is_not_called_unscaled():
    def scaled_by_a_matrix(x, w, scales):
        q, _ = quantized(x)
        return torch._int_mm(q, w.t()).float() * scales

    (site,) = rewrite(trace(scaled_by_a_matrix, X, W, torch.rand(32, N))).rows
    assert site.words == "int8 x int8 (scaled in a way no rule follows)"


def decoded_activation(x, w, s, dims=(-1,)):
    q, scale = quantized(x, *dims)
    weight = (w.view(N, 2, 32).float() - 3) * s.view(N, 2, 1)
    return F.linear((q.float() + 0) * scale, weight.view(N, K))


@pytest.mark.parametrize("rows", [32, 1])
@pytest.mark.parametrize(("dims", "granularity"), [((-1,), "per_token"), ((0, 1), "per_tensor")])
def test_a_quantized_activation_that_is_decoded_before_the_matmul_is_named(rows, dims, granularity):
    graph = trace(lambda x, w, s: decoded_activation(x, w, s, dims), X[:rows], W, torch.rand(2 * N))
    (site,) = prove(graph).found.sites
    assert site.words == f"int8 {granularity} (dynamic) x int8 per_group(32) asymmetric"
    # Where no kernel runs that, it is one of a float activation.
    (site,) = rewrite(graph, disabled_kernels=[level.kernel for level in GROUP_LEVELS]).rows
    assert site.words == f"float32 (decoded from int8 {granularity} (dynamic)) x int8 per_group(32) asymmetric"


def test_a_float_activation_is_not_said_to_be_decoded():
    (site,) = prove(trace(lambda x, w, s: F.linear(x.tanh(), w.float() * s[:, None]), X, W, S)).found.sites
    assert site.words == "float32 x int8 per_channel"


# --- blocks of GGUF: scale and codes side by side in bytes ------------------------------------------------------------


def q8_0(x, blocks):
    scale, codes = torch.split(blocks.reshape(-1, 34), [2, 32], dim=1)
    return F.linear(x, (scale.view(torch.float16).float() * codes.view(INT8)).reshape(N, K))


def q4_0(x, blocks):
    scale, packed = torch.split(blocks.reshape(-1, 18), [2, 16], dim=1)
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8).reshape(1, 1, 2, 1)
    codes = (packed.reshape(-1, 1, 1, 16) >> shifts & 15).reshape(-1, 32).to(INT8) - 8
    return F.linear(x, (scale.view(torch.float16).float() * codes).reshape(N, K))


@pytest.mark.parametrize(
    ("decode", "size", "words"),
    [(q8_0, 34, "float32 x int8 per_group(32)"), (q4_0, 18, "float32 x int4 per_group(32)")],
    ids=["q8_0", "q4_0"],
)
def test_groups_whose_scales_run_over_rows_and_groups_in_one_axis_are_read(decode, size, words):
    blocks = torch.randint(0, 256, (N * K // 32, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blocks[:, :2] = torch.linspace(0.01, 0.02, len(blocks)).half()[:, None].view(torch.uint8)
    graph = trace(decode, X, blocks)
    proven = prove(graph)
    (site,) = proven.found.sites
    assert site.words == words
    (expected,), _ = run(proven.before, X, blocks)
    (actual,), _ = run(proven.graph, X, blocks)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_block_that_parts_a_row_at_no_border_of_a_group_is_missed():
    """24 codes share a scale and a row has 64: groups of one row end in the next."""

    def decode(x, codes, scale):
        return F.linear(x, (codes.view(-1, 24).float() * scale[:, None]).reshape(N, K))

    found = prove(trace(decode, X, W.flatten(), torch.rand(N * K // 24))).found
    assert not found.sites
    assert len(found.misses) == 1
