"""Zero points may lie anywhere: a sum of integers has room for them, or they are taken off it in another way."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.passes.pipeline import to_kernels
from fx_quant.passes.ranges import bounds_of
from fx_quant.passes.values import Codes
from fx_quant.scheme import Scheme
from fx_quant.weights import pack_int4
from tests.graphs import assert_same_meaning, calls, copy_of, prove, rewrite, run, trace

aten, fxq = torch.ops.aten, torch.ops.fx_quant
INT8, UINT8, INT16, INT32, INT64, F32 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32
M, N = 3, 5
FAR = (7, 300, -40000, 300_000, 2**31 - 200, -(2**31) + 200)
FARTHER = (-(2**40), 2**62)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def codes(rows: int, k: int, dtype: torch.dtype = INT8) -> Tensor:
    return torch.randint(0 if dtype is UINT8 else -128, 256 if dtype is UINT8 else 128, (rows, k), dtype=dtype)


def int_mm(a: Tensor, w: Tensor) -> Tensor:
    return torch._int_mm(a, w.t())


def meant(a: Tensor, w: Tensor, z: Tensor | float, y: Tensor | float, s: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_k (a - z) (w - y) * s`` in float64, and the sum of the magnitudes of its terms."""
    left, right = a.double() - z, w.double() - y
    return left @ right.t() * s, left.abs() @ right.t().abs() * s


def assert_right(graph: Callable[..., Tensor], inputs: tuple[Tensor, ...], expected: Tensor, terms: Tensor) -> None:
    """The rewritten graph is as near to ``expected`` as a float32 sum of such terms can be said to be."""
    state = rewrite(trace(graph, *inputs))
    assert state.rows, state.misses
    canonical = copy_of(state.graph)
    to_kernels(state)
    for each in (canonical, state.graph):
        (out,), _ = run(each, *inputs)
        assert out.isfinite().all()
        assert ((out.double() - expected).abs() <= 2.0**-20 * terms).all()


# --- wherever zero points come from --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [INT32, INT64])
@pytest.mark.parametrize("shape", [(), (1,), (M, 1)], ids=str)
@pytest.mark.parametrize("a_dtype", [INT8, UINT8])
def test_a_zero_point_of_the_activation_may_be_anything(kind, shape, a_dtype):
    a, w, s = codes(M, 4096, a_dtype), codes(N, 4096), torch.rand(N)
    for value in FAR + FARTHER * (kind is INT64):
        z = torch.full(shape, value, dtype=kind)
        if len(shape) == 2:
            z[0] = 3
        inputs = (a, w, z, s)
        assert_right(lambda a, w, z, s: (a.float() - z) @ w.float().t() * s, inputs, *meant(a, w, z.double(), 0, s))


@pytest.mark.parametrize("kind", [INT32, INT64])
@pytest.mark.parametrize("shape", [(), (N, 1)], ids=str)
def test_a_zero_point_of_the_weight_may_be_anything(kind, shape):
    a, w, s = codes(M, 4096), codes(N, 4096), torch.rand(N)
    for value in FAR + FARTHER * (kind is INT64):
        y = torch.full(shape, value, dtype=kind)
        if shape:
            y[0] = 3
        inputs = (a, w, y, s)
        assert_right(lambda a, w, y, s: a.float() @ (w.float() - y).t() * s, inputs, *meant(a, w, 0, y.double(), s))


@pytest.mark.parametrize("a_dtype", [INT8, UINT8])
def test_zero_points_of_both_may_be_anything(a_dtype):
    a, w, s = codes(M, 1000, a_dtype), codes(N, 1000), torch.rand(N)
    for of_a, of_w in ((300_000, 5), (5, 300_000), (-40000, 70000), (2**31 - 200, -(2**31) + 200), (3, -4)):
        z, y = torch.full((M, 1), of_a, dtype=INT32), torch.full((N, 1), of_w, dtype=INT64)
        inputs = (a, w, z, y, s)
        assert_right(
            lambda a, w, z, y, s: (a.float() - z) @ (w.float() - y).t() * s, inputs, *meant(a, w, z, y.double(), s)
        )


def test_a_zero_point_that_is_a_number_is_in_the_sum_or_the_matmul_is_left():
    a, w, s = codes(M, 4096), codes(N, 4096), torch.rand(N)
    for value in FAR:
        graph = functools.partial(lambda value, a, w, s: (a.float() - value) @ w.float().t() * s, value)
        # Where float32 holds codes less the number, that is an offset of the codes, which the sum has no room for.
        if 1000 < abs(value) < 2**24:
            (miss,) = prove(trace(graph, a, w, s)).found.misses
            assert miss.rule == "the sum of integers is taken in int32, which k=4096 may leave"
        else:
            assert_right(graph, (a, w, s), *meant(a, w, value, 0, s))


def test_a_zero_point_of_each_row_may_be_anything():
    a, w, s = codes(M, 512), codes(N, 512), torch.rand(N)
    z = (torch.arange(M, dtype=INT32)[:, None] + 1) * 40000
    assert_right(lambda a, w, z, s: (a.float() - z) @ w.float().t() * s, (a, w, z, s), *meant(a, w, z.double(), 0, s))


@pytest.mark.parametrize("value", FAR)
def test_a_correction_in_64_bits_may_be_by_anything(value):
    a, w, s, z = codes(M, 4096), codes(N, 4096), torch.rand(N), torch.tensor(value, dtype=INT32)
    assert_right(
        lambda a, w, z, s: (int_mm(a, w) - z.to(INT64) * w.sum(1, dtype=INT64)).float() * s,
        (a, w, z, s),
        *meant(a, w, value, 0, s),
    )


@pytest.mark.parametrize("value", FAR)
@pytest.mark.parametrize(
    "graph",
    [
        lambda a, w, z, s: (int_mm(a, w) - z * w.sum(1, dtype=INT32)).float() * s,
        lambda a, w, z, s: ((a.to(INT32) - z) @ w.to(INT32).t()).float() * s,
        # Wrapped around before it is widened: no correction by the zero point.
        lambda a, w, z, s: (int_mm(a, w) - (z * w.sum(1, dtype=INT32)).to(INT64)).float() * s,
        lambda a, w, z, s: (int_mm(a, w).to(INT64) - z * w.sum(1, dtype=INT32)).float() * s,
    ],
)
def test_a_sum_that_wraps_around_in_its_source_wraps_around_alike(graph, value):
    inputs = (codes(M, 4096), codes(N, 4096), torch.tensor([value], dtype=INT32), torch.rand(N))
    source = trace(graph, *inputs)
    proven = prove(source)
    assert proven.found.sites
    assert torch.equal(run(proven.graph, *inputs)[0][0], run(source, *inputs)[0][0])


@pytest.mark.parametrize("value", [*FAR, *FARTHER, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("shift", ["none", "bytes", "nibbles"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_zero_point_of_a_weight_beside_a_float_activation_may_be_anything(value, shift, groups):
    kind = INT32 if -(2**31) <= value < 2**31 else INT64
    k, x = 64, torch.randn(M, 64)
    w = torch.randint(0, 16, (N, k), dtype=UINT8) if shift == "nibbles" else codes(N, k)
    y, s = torch.full((N, groups, 1), value, dtype=kind), torch.rand(N, groups, 1)

    def graph(x, w, y, s):
        wide = (w & 15).float() if shift == "nibbles" else w.float() + (128 if shift == "bytes" else 0)
        return x @ ((wide.unflatten(1, (groups, -1)) - y) * s).flatten(1).t()

    wide = w.double() + (128 if shift == "bytes" else 0)
    dense = (wide.unflatten(1, (groups, -1)) - y.double()) * s
    expected, terms = x.double() @ dense.flatten(1).t(), x.double().abs() @ dense.flatten(1).t().abs()
    proven = prove(trace(graph, x, w, y, s))
    assert proven.found.sites
    (out,), _ = run(proven.graph, x, w, y, s)
    assert ((out.double() - expected).abs() <= 2.0**-20 * terms).all()


def test_two_zero_points_that_are_not_known_are_not_added():
    inputs = (codes(M, 64), codes(N, 64), torch.tensor([2**31 - 5]), torch.tensor([7]))
    proven = prove(trace(lambda a, w, z, y: (a.float() - z - y) @ w.float().t(), *inputs))
    assert not proven.found.sites
    assert proven.found.misses[0].rule.startswith("two zero points of one operand whose values are not known")


# --- what is proven of a zero point ---------------------------------------------------------------------------------


def split(graph: Callable[..., Tensor], z: Tensor) -> int:
    """How many zero points are split of a quantized linear whose zero point is ``graph(z)``."""
    a, w, s = codes(M, 64), codes(N, 64), torch.rand(N)
    proven = prove(trace(lambda a, w, s, z: (a.float() - graph(z)) @ w.float().t() * s, a, w, s, z))
    assert len(proven.found.sites) == 1
    return len(calls(proven.graph, fxq.split_zero_point.default))


@pytest.mark.parametrize(
    "graph",
    [
        lambda z: z.round().clamp(-128, 127).to(INT32),
        lambda z: (0 - z.round().to(INT32)).clamp_min(0).clamp_max(255).to(INT64),
        lambda z: torch.clamp(-128 - (z / 3).round(), -128, 127).to(INT8),
        lambda z: torch.clamp(z, -128.0, 127.0).round().to(INT32).view(M, 1),
        lambda z: z.to(INT8),
        lambda z: z.to(UINT8).to(INT32) + 1,
        lambda z: (z.to(INT32) & 15) + 1,
        lambda z: z.to(UINT8).to(INT64).neg(),
        lambda z: torch.minimum(torch.maximum(z, torch.full_like(z, -8)), torch.full_like(z, 7)).to(INT32),
        lambda z: torch.full_like(z, 134.0).to(INT32),
        lambda z: torch.where(z > 0, z.clamp(0, 9), z.clamp(-9, 0)).to(INT64),
    ],
)
def test_a_zero_point_that_is_proven_to_be_small_is_in_the_sum(graph):
    assert split(graph, torch.randn(M, 1) * 50) == 0


@pytest.mark.parametrize(
    "graph",
    [
        lambda z: z.to(INT32),
        lambda z: z.clamp(-128).to(INT32),
        lambda z: z.clamp(-(2.0**20), 2.0**20).to(INT64),
        lambda z: z.clamp(-128, 127).to(INT32) * 1000,
        lambda z: z.to(INT8).to(INT32) * z.to(INT32),
        lambda z: (z.to(INT32) + 5).to(INT64),
        lambda z: torch.where(z > 0, z.clamp(0, 9), z).to(INT64),
        lambda z: z.to(INT16),
    ],
)
def test_a_zero_point_that_is_not_proven_to_be_small_is_split(graph):
    assert split(graph, torch.randn(M, 1) * 50) == 1


def test_arithmetic_that_may_wrap_around_proves_no_more_than_its_dtype():
    graph = trace(lambda z: (z + 100, z.to(INT32) + 100, z * 2, z & 15, z // 2), torch.zeros(4, dtype=INT8))
    found = [bounds_of(node) for node in graph.output_node().args[0]]
    assert found == [(-128, 127), (-28, 227), (-128, 127), (0, 15), (-128, 127)]
    assert [bounds_of(x) for x in (5, -3.0, float("inf"), float("nan"))] == [(5, 5), (-3, -3), None, None]


def test_the_sum_of_a_constant_weight_is_not_taken_again_for_the_rest():
    a, w, z = codes(M, 64), codes(N, 64), torch.tensor([300_000])
    state = rewrite(trace(lambda a, w, z: (a.float() - z) @ w.float().t(), a, w, z))
    assert len(calls(state.graph, aten.sum.dim_IntList)) == 1
    to_kernels(state)
    assert not calls(state.graph, aten.sum.dim_IntList)


# --- the op, and what Inductor makes of it --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [INT16, INT32, INT64])
def test_near_and_rest_are_the_zero_point(kind):
    info = torch.iinfo(kind)
    z = torch.tensor([info.min, info.max, -129, -128, 0, 127, 128], dtype=kind)
    near, rest = fxq.split_zero_point(z, -128, 127)
    assert (near.dtype, rest.dtype) == (INT32, F32)
    assert near.tolist() == [-128, 127, -128, -128, 0, 127, 127]
    torch.testing.assert_close(rest.double() + near, z.double(), rtol=2.0**-23, atol=0)
    torch.library.opcheck(fxq.split_zero_point.default, (z, -128, 127))


def test_a_zero_point_is_split_by_integers_around_zero():
    with pytest.raises(RuntimeError, match="zero_point must be integers"):
        fxq.split_zero_point(torch.ones(3), -128, 127)
    with pytest.raises(RuntimeError, match="lo must be <= 0"):
        fxq.split_zero_point(torch.ones(3, dtype=INT32), 1, 127)


def test_compiled_code_takes_far_zero_points_off_the_sum():
    a, w, s = codes(M, 4096), codes(N, 4096), torch.rand(N)
    z, y = torch.tensor([[300_000], [5], [-40000]], dtype=INT32), torch.tensor([0, 0, 9, 0, 70_000])[:, None]

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in (("w", w), ("y", y), ("s", s)):
                self.register_buffer(name, value)

        def forward(self, a, z):
            return (a.float() - z) @ (self.w.float() - self.y).t() * self.s

    out = torch.compile(Linear(), backend="fx_quant", options={"strict": True})(a, z)
    expected, terms = meant(a, w, z.double(), y.double(), s)
    assert ((out.double() - expected).abs() <= 2.0**-20 * terms).all()


# --- eager layers ---------------------------------------------------------------------------------------------------

ASYMMETRIC = Scheme.parse("int8 per_tensor asymmetric (static) x int8 per_channel")
DYNAMIC = Scheme.parse("int8 per_token asymmetric (dynamic) x int8 per_channel")


def static_layer(zero_point: int) -> QuantizedLinear:
    point = torch.tensor(zero_point)
    return QuantizedLinear(
        ASYMMETRIC, codes(N, 64), torch.rand(N, 1) + 0.5, input_scale=torch.tensor(0.5), input_zero_point=point
    )


def test_a_static_zero_point_that_no_code_has_is_refused():
    with pytest.raises(ValueError, match="input_zero_point must be one of int8 codes, -128 to 127, .* got 300$"):
        static_layer(300)
    layer = static_layer(127)
    state = {**layer.state_dict(), "input_zero_point": torch.tensor(-(2**40))}
    with pytest.raises(RuntimeError, match="input_zero_point must be one of int8 codes"):
        layer.load_state_dict(state)


def test_a_quantizer_returns_zero_points_of_its_codes():
    def quantizer(x, scale, zero_point, *, value):
        point = torch.full((*x.shape[:-1], 1), value)
        return torch.zeros(x.shape, dtype=INT8), torch.ones(*x.shape[:-1], 1), point

    weight, scale = codes(N, 64), torch.rand(N, 1) + 0.5
    for value in (-129, 300_000, 2**40):
        layer = QuantizedLinear(DYNAMIC, weight, scale, quantizer=functools.partial(quantizer, value=value))
        with pytest.raises(ValueError, match=f"must return zero points of int8 codes, .* got {value}$"):
            layer(torch.randn(M, 64))
    layer = QuantizedLinear(DYNAMIC, weight, scale, quantizer=functools.partial(quantizer, value=-128))
    torch.testing.assert_close(layer(torch.randn(M, 64))[0], 128 * weight.sum(1) * scale[:, 0])


@pytest.mark.parametrize("value", [7, -130, 2**31 - 1, -(2**31), 2**40, -(2**40)])
@pytest.mark.parametrize("weight", ["int8 per_channel", "uint4 per_group(32)"])
def test_a_layer_keeps_zero_points_of_its_weight_whatever_they_are(weight, value):
    scheme = Scheme.parse(f"float32 x {weight} asymmetric")
    int4, x = "4" in weight, torch.randn(M, 64)
    shape = (N, 2) if int4 else (N, 1)
    w = torch.randint(0, 16, (N, 64), dtype=UINT8) if int4 else codes(N, 64)
    y, s = torch.full(shape, value), torch.rand(shape) + 0.5
    layer = QuantizedLinear(scheme, pack_int4(w) if int4 else w, s, weight_zero_point=y)
    dense = ((w.double().unflatten(1, (shape[1], -1)) - y[..., None].double()) * s[..., None]).flatten(1)
    expected, terms = x.double() @ dense.t(), x.double().abs() @ dense.t().abs()
    loaded = QuantizedLinear(scheme, pack_int4(w) if int4 else w, s, weight_zero_point=torch.zeros_like(y))
    loaded.load_state_dict(layer.state_dict())
    for each in (layer, loaded):
        assert ((each(x).double() - expected).abs() <= 2.0**-20 * terms).all()


# --- subtractions that wrap around ----------------------------------------------------------------------------------

ENDS = (2**31 - 1, 2**31 - 100, -(2**31), -(2**31) + 100)


def points_at_the_ends(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    ends = [torch.iinfo(kind).max - 5, torch.iinfo(kind).min + 5]
    return torch.tensor(ends * shape[0], dtype=kind)[: shape[0], None]


@pytest.mark.parametrize("kind", [INT32, INT64])
@pytest.mark.parametrize("w_dtype", [INT8, UINT8])
def test_a_subtraction_from_a_weight_that_may_wrap_around_is_left_with_a_reason(kind, w_dtype):
    inputs = torch.randn(M, 8), codes(N, 8, w_dtype), points_at_the_ends((N,), kind), torch.rand(N)
    graph = trace(lambda x, w, y, s: x @ ((w - y).float() * s[:, None]).t(), *inputs)
    proven = prove(graph)
    assert not proven.found.sites
    name = "int32" if kind is INT32 else "int64"
    assert [miss.rule for miss in proven.found.misses] == [
        f"the zero point of b is subtracted in {name}, where it may wrap around"
    ]


@pytest.mark.parametrize("kind", [INT32, INT64])
def test_a_subtraction_from_an_activation_that_may_wrap_around_is_left(kind):
    inputs = codes(M, 8), codes(N, 8), points_at_the_ends((M,), kind), torch.rand(N)
    source = trace(lambda a, w, z, s: (a.to(kind) - z).float() @ w.float().t() * s, *inputs)
    proven = prove(source)
    # The activation as it is may still meet the codes of the weight.
    assert not any(isinstance(site.product.a, Codes) for site in proven.found.sites)
    assert_same_meaning(source, proven.graph, inputs)


@pytest.mark.parametrize(
    "subtracted",
    [
        lambda w, y: w.float() - y,
        lambda w, y: w.to(INT64) - y.to(INT64),
        lambda w, y: w.to(INT32) - y.to(INT16).to(INT32),
        lambda w, y: w.to(INT32) - (y & 15),
        lambda w, y: w.to(INT32) - y.clamp(-(2**31) + 300, 2**31 - 300),
        lambda w, y: w.to(INT32) - 2**20,
    ],
)
def test_a_subtraction_that_is_proven_to_fit_is_rewritten(subtracted):
    inputs = torch.randn(M, 8), codes(N, 8), torch.full((N, 1), 3, dtype=INT32), torch.rand(N)
    proven = prove(trace(lambda x, w, y, s: x @ (subtracted(w, y).float() * s[:, None]).t(), *inputs))
    assert len(proven.found.sites) == 1


@pytest.mark.parametrize("value", ENDS)
def test_a_sum_in_int32_wraps_around_as_its_differences_do(value):
    inputs = codes(M, 64), codes(N, 64), torch.tensor([value], dtype=INT32), torch.rand(N)
    source = trace(lambda a, w, z, s: ((a.to(INT32) - z) @ w.to(INT32).t()).float() * s, *inputs)
    proven = prove(source)
    assert proven.found.sites
    assert torch.equal(run(proven.graph, *inputs)[0][0], run(source, *inputs)[0][0])
