"""What the proof says of rows: which graphs may be padded, and the node by which each near miss may not."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fx_quant  # noqa: F401  its ops
from fx_quant.piecewise.independent import prove_rows
from fx_quant.piecewise.rows import MixesRowsError, Rows
from fx_quant.piecewise.traced import fresh_size, trace_function

D = 8


def prove(function, *inputs):
    """Where the outputs of ``function`` have the rows."""
    rows, mode = fresh_size(2, 64, avoid={1, 2, 3, 4, D})
    with mode:
        given = [materialise(each, rows) for each in inputs]
    return prove_rows(trace_function(function, given, rows, mode))


def materialise(spec, rows):
    """A fake tensor of ``(dtype, *shape)``, where ``"m"`` is the number of rows and ``"4m"`` four times that."""
    dtype, *shape = spec
    sizes = [rows * int(size[:-1] or 1) if isinstance(size, str) else size for size in shape]
    return torch.empty(sizes, dtype=dtype)


def x(*shape):
    return (torch.float32, *shape)


def i(*shape):
    return (torch.int64, *shape)


def plan(*dims, **more):
    return tuple(None if dim is None else Rows(dim, **more) for dim in dims)


# --- proven -------------------------------------------------------------------------------------------------------


PROVEN = {
    "pointwise": (lambda a: torch.sigmoid(a) * 2 + a, [x("m", D)], plan(0)),
    "a linear": (F.linear, [x("m", D), x(4, D), x(4)], plan(0)),
    "a linear of a batch of tokens": (F.linear, [x(3, "m", D), x(4, D), x(4)], plan(1)),
    "a linear of a dynamic batch": (F.linear, [x("m", 3, D), x(4, D), x(4)], plan(0)),
    "a norm": (lambda a, w: F.layer_norm(a, (D,), w), [x("m", D), x(D)], plan(0)),
    "an RMS norm": (lambda a, w: F.rms_norm(a, (D,), w), [x(3, "m", D), x(D)], plan(1)),
    "softmax of each row": (lambda a: a.softmax(-1), [x("m", D)], plan(0)),
    "a view as heads": (lambda a: a.view(*a.shape[:2], 2, 4).transpose(1, 2), [x(3, "m", D)], plan(2)),
    "rows and batch joined": (lambda a: a.reshape(-1, D), [x(3, "m", D)], plan(0, outer=3)),
    "joined and taken apart": (lambda a: a.reshape(-1, D).reshape(a.shape) * a, [x(3, "m", D)], plan(1)),
    "joined behind the rows": (lambda a: a.flatten(0, 1), [x("m", 3, D)], plan(0, inner=3)),
    "q, k and v": (
        lambda a: a.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0),
        [x(2, "m", 12)],
        plan(2, 2, 2),
    ),
    "rotary embedding": (
        lambda a, cos: torch.cat([-a[..., 4:], a[..., :4]], -1) * cos + a,
        [x(1, 2, "m", D), x(1, 1, "m", D)],
        plan(2),
    ),
    "complex rotation": (
        lambda a, f: torch.view_as_real(torch.view_as_complex(a.reshape(-1, 4, 2)) * f).flatten(1),
        [x("m", D), (torch.complex64, 4)],
        plan(0),
    ),
    "an embedding": (F.embedding, [i("m"), x(16, D)], plan(0)),
    "a table read by position": (lambda p, t: t[p], [i(1, "m"), x(16, D)], plan(1)),
    "per-token dynamic quantization": (
        lambda a: (a / (a.abs().amax(-1, keepdim=True) / 127)).round().clamp(-127, 127).to(torch.int8),
        [x("m", D)],
        plan(0),
    ),
    "static per-tensor quantization": (lambda a, s: (a / s).round(), [x("m", D), x(1)], plan(0)),
    "an int8 product": (
        lambda a, b, s: torch._int_mm(a, b).float() * s,
        [(torch.int8, "m", 16), (torch.int8, 16, D), x("m", 1)],
        plan(0),
    ),
    "batch norm in eval mode": (
        lambda a, mean, var: F.batch_norm(a, mean, var, training=False),
        [x("m", D), x(D), x(D)],
        plan(0),
    ),
    "dropout in eval mode": (lambda a: F.dropout(a, 0.5, training=False) + 1, [x("m", D)], plan(0)),
    "writes to memory of its own": (lambda a: (a + 1).mul_(2).add_(a), [x("m", D)], plan(0)),
    "numbers of rows": (lambda a: torch.arange(a.shape[0]), [x("m", D)], plan(0, positional=True)),
    "one for each row": (lambda a: torch.ones(a.shape[0], 1) * a, [x("m", D)], plan(0)),
    "nothing of the rows": (lambda a, w: (w * 2, a), [x("m", D), x(D)], plan(None, 0)),
    "flip and roll of each row": (lambda a: a.flip(-1).roll(1, -1), [x("m", D)], plan(0)),
    "sort of each row": (lambda a: a.sort(-1), [x("m", D)], plan(0, 0)),
    "gather in each row": (lambda a, p: a.gather(-1, p), [x("m", D), i("m", 2)], plan(0)),
    "rows beside rows": (lambda a, b: torch.cat([a, b], -1), [x("m", D), x("m", D)], plan(0)),
    "the rows as columns": (lambda a, w: w @ a.t(), [x("m", D), x(4, D)], plan(1)),
    "a triangle of each row": (torch.tril, [x("m", D)], plan(0, positional=True)),
}


def half_written(a):
    out = torch.empty_like(a)
    out[:, :4] = a[:, 4:]
    out[:, 4:] = 1
    return out


PROVEN["half of a row written"] = (half_written, [x("m", D)], plan(0))


@pytest.mark.parametrize("name", PROVEN)
def test_rows_are_proven_independent(name):
    function, inputs, expected = PROVEN[name]
    assert prove(function, *inputs) == expected


# --- near misses --------------------------------------------------------------------------------------------------


def quantized_per_tensor(a, w):
    scale = a.abs().amax() / 127
    codes = (a / scale).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, w).float() * scale


class Quantized(nn.Module):
    def forward(self, a):
        codes, scale = torch.ops.fx_quant.quantize.dynamic(
            a,
            dtype=torch.int8,
            granularity="per_tensor",
            divisor=127.0,
            divide_dtype=torch.float32,
            floor=0.0,
            floor_on="none",
            scale_dtype=torch.float32,
            reciprocal=False,
            lo=-127.0,
            hi=127.0,
        )
        return codes * scale


NEAR_MISSES = {
    "per-tensor dynamic quantization": (
        quantized_per_tensor,
        [x("m", 16), (torch.int8, 16, D)],
        "aten.amax reduces all dims, the rows with them, at amax",
    ),
    "the same as one op": (Quantized(), [x("m", D)], "fx_quant.quantize.dynamic takes one scale of all rows"),
    "softmax over the rows": (
        lambda a: a.softmax(0),
        [x("m", D)],
        "aten._softmax works along dim 0, in which the rows",
    ),
    "sum over the rows": (lambda a: a + a.sum(0), [x("m", D)], "aten.sum.dim_IntList reduces dim 0, in which the rows"),
    "mean of all": (lambda a: a - a.mean(), [x("m", D)], "aten.mean reduces all dims"),
    "mean over tokens, of a batch": (lambda a: a - a.mean(1, keepdim=True), [x(2, "m", D)], "reduces dim 1"),
    "cumsum over the rows": (lambda a: a.cumsum(0), [x("m", D)], "aten.cumsum works along dim 0"),
    "norm of all": (lambda a: F.normalize(a.flatten(), dim=0), [x("m", D)], "aten.linalg_vector_norm reduces dim 0"),
    "batch norm in train mode": (
        lambda a: F.batch_norm(a, None, None, training=True),
        [x("m", D)],
        "takes mean and variance of all rows",
    ),
    "a norm over the rows": (
        lambda a: F.group_norm(a.t()[None], 2),
        [x("m", D)],
        "aten.native_group_norm takes the number of rows as a value",
    ),
    "dropout": (lambda a: F.dropout(a, 0.5, training=True), [x("m", D)], "draws random numbers"),
    "PyTorch's attention, which drops no scores": (
        lambda a: F.scaled_dot_product_attention(a, a, a),
        [x(1, 2, "m", D)],
        "is an op of which it is not known whether it mixes rows",
    ),
    "roll of rows": (lambda a: a.roll(1, 0), [x("m", D)], "aten.roll works along dim 0"),
    "roll of all": (lambda a: a.roll(1), [x("m", D)], "aten.roll moves values from row to row"),
    "flip of rows": (lambda a: a.flip(0), [x("m", D)], "aten.flip works along dim 0"),
    "sort of rows": (lambda a: a.sort(0).values, [x("m", D)], "aten.sort works along dim 0"),
    "topk of rows": (lambda a: a.topk(2, 0).values, [x("m", D)], "aten.topk works along dim 0"),
    "gather along rows": (lambda a, p: a.gather(0, p), [x("m", D), i("m", D)], "aten.gather chooses along dim 0"),
    "rows chosen by rows": (lambda a, p: a[p], [x("m", D), i("m")], "aten.index.Tensor chooses among rows"),
    "rows chosen by a mask": (lambda a: a[a > 0], [x("m", D)], "aten.index.Tensor chooses by a mask"),
    "the last row": (lambda a: a[-1], [x("m", D)], "aten.select.int takes some of dim 0"),
    "all rows but the first": (lambda a: a[1:], [x("m", D)], "aten.slice.Tensor takes some of dim 0"),
    "cat along rows": (lambda a: torch.cat([a, a]), [x("m", D)], "aten.cat joins tensors along dim 0"),
    "attention": (lambda a: (a @ a.t()).softmax(-1) @ a, [x("m", D)], "multiplies each row with all rows"),
    "softmax over rows that are columns": (lambda a: a.t().softmax(-1), [x("m", D)], "works along dim 1"),
    "gram matrix": (lambda a: a.t() @ a, [x("m", D)], "sums over the rows"),
    "a view that cuts rows": (lambda a: a.view(2, -1, D // 2) * 1, [x("m", D)], "which cuts rows or joins them"),
    "batch and rows swapped by a view": (
        lambda a: a.reshape(a.shape[1], 3, D) + 1,
        [x(3, "m", D)],
        "which cuts rows or joins them",
    ),
    "rows brought to other rows": (
        lambda a, b: a.reshape(-1, D) + b.transpose(0, 1).reshape(-1, D),
        [x(3, "m", D), x(3, "m", D)],
        "brings different rows together",
    ),
    "a mask of rows against rows": (
        lambda p: p[:, None] >= p[None, :],
        [i("m")],
        "brings different rows together",
    ),
    "divided by the number of rows": (lambda a: a / a.shape[0], [x("m", D)], "takes the number of rows as a value"),
    "filled with the number of rows": (
        lambda a: a + torch.full((1, D), a.shape[0]),
        [x("m", D)],
        "takes the number of rows as a value",
    ),
    "numbers of rows from their end": (
        lambda a: torch.arange(-a.shape[0], 0),
        [x("m", D)],
        "takes the number of rows as a value",
    ),
    "a table read by the number of a row": (
        lambda a, t: a + t[torch.arange(a.shape[0])],
        [x("m", D), x(16, D)],
        "reads at the number of a row, which padding may put out of range",
    ),
    "an embedding of the number of a row": (
        lambda a, t: a + F.embedding(torch.arange(a.shape[0]) + 3, t),
        [x("m", D), x(16, D)],
        "reads at the number of a row",
    ),
    "integers divided by the number of a row": (
        lambda a: 100 // (20 - torch.arange(a.shape[0])),
        [x("m", D)],
        "divides integers by what tells rows apart by their number",
    ),
    "a write to an input": (lambda a: a.add_(1), [x("m", D)], "the piece writes to its inputs"),
    "a cache written to": (
        lambda c, p, a: c.index_copy_(0, p, a),
        [x(16, D), i("m"), x("m", D)],
        "the piece writes to its inputs",
    ),
    "a window over rows": (lambda a: a.unfold(0, 2, 1), [x("m", D)], "is an op of which it is not known"),
    "differences of rows": (lambda a: a.diff(dim=0), [x("m", D)], "aten.slice.Tensor takes the number of rows"),
    "rows padded": (lambda a: F.pad(a, (0, 0, 0, 3)), [x("m", D)], "pads dim 0, in which the rows are"),
    "median of all": (lambda a: a > a.median(), [x("m", D)], "aten.median reduces all dims"),
    "whether all are finite": (lambda a: a * a.isfinite().all(), [x("m", D)], "aten.all reduces all dims"),
    "rows interpolated": (
        lambda a: F.interpolate(a.t()[None], scale_factor=2.0),
        [x("m", D)],
        "takes the number of rows as a value",
    ),
    "an argmax over rows": (lambda a: a.argmax(0), [x("m", D)], "aten.argmax reduces dim 0"),
    "an input with rows twice": (lambda a: a + 1, [x("m", "m")], "has the rows in several dims"),
    "other ops for fewer rows": (
        F.conv2d,
        [x("m", 3, 5, 5), x(4, 3, 2, 2)],
        "aten.convolution is an op of which it is not known whether it mixes rows",
    ),
    "cut from a view of itself": (lambda a: a.as_strided((2, D), (D, 1)), [x("m", D)], "aten.as_strided"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_mixes_rows_is_named(name):
    function, inputs, says = NEAR_MISSES[name]
    with pytest.raises(MixesRowsError) as caught:
        prove(function, *inputs)
    assert says in str(caught.value)


# --- what is proven holds -----------------------------------------------------------------------------------------

# Steps on [3, m, 8] or on whatever the steps before made of it; half of them mix rows, at some shapes at least.
STEPS = (
    lambda a: a * torch.sigmoid(a),
    lambda a: a.softmax(-1),
    lambda a: a.softmax(0),
    lambda a: a.transpose(0, 1),
    lambda a: a.transpose(-1, -2),
    lambda a: a.transpose(0, -1),
    lambda a: a.reshape(-1, a.shape[-1]),
    lambda a: a.reshape(3, -1, D),
    lambda a: a.reshape(-1, 3, D),
    lambda a: a.reshape(-1, 2, 4),
    lambda a: a.reshape(-1, 4),
    lambda a: a.flatten(),
    lambda a: a.flatten(0, 1),
    lambda a: a - a.amax(-1, keepdim=True),
    lambda a: a - a.amax(0, keepdim=True),
    lambda a: a.sum(1),
    lambda a: a.cumsum(-1),
    lambda a: a.flip(0),
    lambda a: a.flip(-1),
    lambda a: a.roll(1, 1),
    lambda a: torch.cat([a, a * 2], -1),
    lambda a: torch.cat([a, a * 2], 0),
    lambda a: torch.stack([a, a + 1], 1),
    lambda a: a.repeat(2, *[1] * (a.dim() - 1)),
    lambda a: a[..., 1:],
    lambda a: a[0],
    lambda a: a[:, -1],
    lambda a: a.unsqueeze(0),
    lambda a: a.unbind(0)[-1],
    lambda a: a.chunk(2, -1)[0],
    lambda a: a @ a.transpose(-1, -2),
    lambda a: a @ torch.ones(a.shape[-1], 2),
    lambda a: a + torch.arange(a.shape[0]).reshape(-1, *[1] * (a.dim() - 1)),
    lambda a: a * torch.ones(a.shape).tril(),
    lambda a: a.expand(2, *a.shape),
    lambda a: a.sort(-1).values,
    lambda a: a.gather(0, torch.zeros_like(a, dtype=torch.int64)),
    lambda a: a[torch.arange(a.shape[0])],
    lambda a: a.clone().mul_(2),
)


def rows_of(value, at, rows):
    """The first ``rows`` rows of a result."""
    if at is None:
        return value
    split = value.unflatten(at.dim, (at.outer, -1, at.inner))
    return split.narrow(at.dim + 1, 0, rows)


@settings(max_examples=int(os.environ.get("FX_QUANT_EXAMPLES", "60")), deadline=None)
@given(st.lists(st.sampled_from(range(len(STEPS))), min_size=1, max_size=7), st.sampled_from([(2, 3), (4, 9), (5, 8)]))
def test_the_rows_of_what_is_proven_do_not_see_padding(steps, sizes):
    def program(a):
        for step in steps:
            a = STEPS[step](a)
        return a

    rows, padded = sizes
    a = torch.randn(3, padded, D, generator=torch.Generator().manual_seed(len(steps)))
    a[:, rows:] = a[:, rows - 1 : rows]
    try:
        expected = program(a[:, :rows].clone())
        (at,) = prove(program, x(3, "m", D))
    except (MixesRowsError, RuntimeError, IndexError):
        return
    found = program(a)
    torch.testing.assert_close(rows_of(found, at, rows), rows_of(expected, at, rows))


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_each_step_is_proven_at_some_shape_or_mixes_rows(step):
    """The steps of the test above do run: each gives an answer at one of two shapes."""
    answers = []
    for shape in [(3, "m", D), ("m", 3, D)]:
        try:
            prove(STEPS[step], x(*shape))
            answers.append("proven")
        except MixesRowsError as error:
            answers.append("not traced" if "could not be traced" in str(error) else "mixes")
    assert set(answers) != {"not traced"}
