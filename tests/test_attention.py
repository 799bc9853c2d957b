"""Attention of one query beside quantized matmuls: where it is ours, where it is left, and that it is right."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_quant
from fx_quant.backend import RewritePass, compile_with
from fx_quant.config import Options
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.passes.rewriting import Rewriting
from fx_quant.report import Report
from fx_quant.scheme import Numerics
from fx_quant.target import named_target
from tests.graphs import Captured, calls, capture, run, trace
from tests.tolerances import assert_within

SINGLE = torch.ops.fx_quant.single_query_attention.default


class Attending(nn.Module):
    """A quantized projection behind the attention of ``q`` over a cache."""

    def __init__(self, heads: int = 4, head: int = 32, **call) -> None:
        super().__init__()
        self.out = nn.Linear(heads * head, 48)
        self.call = call
        fx_quant.quantize_(self, "int8 per_token (dynamic) x int8 per_channel")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.call)
        return self.out(y.transpose(1, 2).flatten(2))


def operands(q_heads=4, heads=4, length=75, head=32, batch=2, rows=1, dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, q_heads, rows, head)
    k, v = (torch.randn(batch, heads, length, head) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v)]


def reporting(found: list[Report], gm, inputs):
    """The backend, which hands its reports on."""
    return compile_with(gm, inputs, RewritePass(Options(), on_report=found.append))


def reference(q, k, v, mask=None, scale=None) -> Tensor:
    """In float64, with zeros where the mask leaves nothing."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -math.inf) if mask.dtype is torch.bool else mask.double())
    return torch.softmax(scores, -1).nan_to_num() @ v


FIRST = torch.arange(75) < 40
RANDOM = torch.Generator().manual_seed(1)
MASKS = {
    "none": None,
    "first": FIRST[None, None, None],
    "two dims": FIRST[None],
    "last key alone": (torch.arange(75) == 74)[None, None, None],
    "per batch": torch.stack((FIRST, ~FIRST))[:, None, None],
    "per head": torch.rand(1, 4, 1, 75, generator=RANDOM) < 0.5,
    "numbers": torch.randn(2, 4, 1, 75, generator=RANDOM),
    "expanded": torch.linspace(-3, 3, 75).expand(2, 4, 1, 75),
    "a row without keys": torch.stack((FIRST, torch.zeros(75, dtype=torch.bool)))[:, None, None],
}


def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention, and what can be fused behind it."""
    return torch.ops.fx_quant.single_query_attention(q, k, v, mask, scale=scale) + 0


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """By the kernel, compiled for any number of keys, heads and rows of a batch."""
    operands = [x.clone() if x.is_contiguous() else x for x in (q, k, v)]
    for x in operands:
        torch._dynamo.mark_static(x, 3)
    with torch.no_grad():
        return torch.compile(f, dynamic=True)(*operands, mask, scale)


def added(mask: Tensor | None) -> Tensor | None:
    """``mask`` as what is added."""
    return mask if mask is None or mask.is_floating_point() else torch.where(mask, 0.0, -math.inf)


@pytest.mark.parametrize("name", MASKS)
def test_the_kernel_is_the_attention_of_float64(name) -> None:
    q, k, v = operands()
    mask = MASKS[name]
    assert_within(attend(q, k, v, added(mask)), reference(q, k, v, mask).float(), Numerics.REASSOCIATED)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 257])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_number_of_keys_and_of_heads_that_share_them(length, heads) -> None:
    q, k, v = operands(heads=heads, length=length)
    assert_within(attend(q, k, v, None, 0.3), reference(q, k, v, scale=0.3).float(), Numerics.REASSOCIATED)


def test_scores_of_any_size() -> None:
    q, k, v = operands()
    assert_within(attend(q * 1e3, k, v, None), reference(q * 1e3, k, v).float(), Numerics.REASSOCIATED)
    assert attend(q * torch.nan, k, v, None).isnan().all()
    k[0, 0, 70] = torch.nan
    assert torch.equal(
        attend(q, k, v, None).isnan(), reference(q, k, v.clone()).isnan() | attend(q, k, v, None).isnan()
    )
    assert attend(q, k, v, None)[0, 0].isnan().all() and attend(q, k, v, None)[1].isfinite().all()


def test_keys_that_a_mask_leaves_out_are_not_read() -> None:
    q, k, v = operands()
    mask = added(FIRST[None, None, None])
    expected = attend(q, k, v, mask)
    k[:, :, 64:], v[:, :, 64:] = torch.nan, torch.inf
    assert torch.equal(attend(q, k, v, mask), expected)


def test_bfloat16_and_strides_of_a_cache() -> None:
    q, k, v = operands(dtype=torch.bfloat16)
    got = attend(q, k, v, added(FIRST[None, None, None]).bfloat16())
    assert_within(got, reference(q, k, v, FIRST).bfloat16(), Numerics.REASSOCIATED)
    # [b, l, h, d], and rows that are not adjacent.
    laid = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attend(*laid, None), attend(q, k, v, None))
    wide = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
    assert torch.equal(attend(*wide, None), attend(q, k, v, None))


def test_heads_of_other_sizes_are_left_to_pytorch() -> None:
    q, k, v = operands(head=20)
    assert_within(attend(q, k, v, None), reference(q, k, v).float(), Numerics.REASSOCIATED)


# --- in a model ---------------------------------------------------------------------------------------------------


def test_what_follows_is_fused_and_the_model_is_right() -> None:
    model, (q, k, v) = Attending(), operands()
    mask, found = FIRST[None, None, None], []
    with torch.no_grad():
        got = torch.compile(model, backend=partial(reporting, found))(q, k, v, mask)
    (report,) = found
    assert report.attention == 1 and len(report.sites) == 1
    assert "1 call of attention with one query by cpu_attention" in str(report)
    assert Report.from_json(report.to_json()).attention == 1
    expected = model.out(reference(q, k, v, mask).float().transpose(1, 2).flatten(2))
    assert_within(got, expected, Numerics.APPROXIMATE)  # codes may round to the other side


def repeated(x: Tensor, times: int) -> Tensor:
    """As transformers repeats the heads of keys and values."""
    b, heads, length, head = x.shape
    return x[:, :, None].expand(b, heads, times, length, head).reshape(b, heads * times, length, head)


class Repeating(Attending):
    """Whose keys and values are of fewer heads; ``order`` is that of the heads that share them."""

    order = "beside"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.order == "beside":
            return super().forward(q, repeated(k, 2), repeated(v, 2), mask)
        return super().forward(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask)


def rewritten(f, inputs, **options) -> tuple[Captured, Rewriting]:
    """The graph of ``f`` as it was, and what the passes make of it."""
    with torch.no_grad():
        (captured,) = capture(f, *inputs, options=options)
    return captured, captured.state


def same(captured: Captured) -> None:
    """Both graphs give the same."""
    inputs = captured.inputs
    assert_within(run(captured.state.graph, *inputs)[0][0], run(captured.source, *inputs)[0][0], Numerics.REASSOCIATED)


@pytest.mark.parametrize("order", ["beside", "apart"])
def test_repeated_heads_are_read_where_they_are(order) -> None:
    model, inputs = Repeating(), operands(heads=2)
    model.order = order
    captured, state = rewritten(model, inputs)
    assert state.attended == 1
    (call,) = calls(state.graph, SINGLE)
    assert call.args[1].meta["val"].shape[1] == (2 if order == "beside" else 4)
    same(captured)


class Writing(Repeating):
    """Which writes to its keys first."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, new: Tensor, at: Tensor) -> Tensor:
        k.index_copy_(2, at, new)
        return super().forward(q, k, v)


def test_a_cache_that_is_written_is_read_behind_the_write() -> None:
    q, k, v = operands(heads=2)
    captured, state = rewritten(Writing(), (q, k, v, torch.randn(2, 2, 1, 32), torch.tensor([3])))
    assert state.attended == 1
    same(captured)


LEFT = {
    "two queries": ({}, {"rows": 2}, {}),
    "causal": ({"is_causal": True}, {}, {}),
    "exactly": ({}, {}, {"numerics": "exact"}),
    "deterministic": ({}, {}, {"deterministic": True}),
    "switched off": ({}, {}, {"disabled_kernels": ["cpu_attention"]}),
    "no kernel of ours": ({}, {}, {"disabled_kernels": ["cpu"]}),
}


@pytest.mark.parametrize("name", LEFT)
def test_where_it_is_left(name) -> None:
    call, sizes, options = LEFT[name]
    _, state = rewritten(Attending(**call), operands(**sizes), **options)
    assert state.attended == 0 and not calls(state.graph, SINGLE)


def test_a_graph_without_quantized_matmuls_is_left() -> None:
    graph = trace(F.scaled_dot_product_attention, *operands())
    before = str(graph)
    assert rewrite_graph(graph, named_target("x86_vnni"), Options(), None).attention == 0
    assert str(graph) == before
