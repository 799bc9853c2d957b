"""Every size may be 0: a sum over nothing is 0, to which the bias is added, and no library is asked for it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fx_quant.kernels.context import EAGER
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.layouts import layouts
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.registry import kernels
from fx_quant.kernels.select import select
from fx_quant.scheme import INT4_DTYPES, Numerics
from tests.graphs import prove, rewrite, trace
from tests.test_conformance import ALL_SCHEMES, DEVICE, EPILOGUES, HERE, RUN_HERE, operands, problem, reference
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant
INT8, F32, E4M3 = torch.int8, torch.float32, torch.float8_e4m3fn
# m, n and k.
SIZES = [sizes for sizes in itertools.product((0, 1), repeat=3) if 0 in sizes] + [(4, 32, 0), (4, 0, 32), (0, 32, 32)]
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


@pytest.fixture(autouse=True)
def nothing_packed():
    clear_packed_weights()


@every_size
@pytest.mark.parametrize("kernel", RUN_HERE, ids=lambda kernel: kernel.name)
def test_a_kernel_multiplies_what_is_empty(kernel, sizes):
    m, n, k = sizes
    for scheme, (out, bias) in itertools.product(ALL_SCHEMES, EPILOGUES[1:3]):
        asked = problem(scheme, n, k, out, bias, m)
        if kernel.requires.unmet(asked, HERE) or (scheme.weight.dtype in INT4_DTYPES and k % 2):
            continue
        given = operands(asked, m)
        selection = select(asked, HERE, force_kernel=kernel.name, context=EAGER)
        there = {name: None if x is None else x.to(DEVICE) for name, x in given.items()}
        found = run_kernel(selection, **there)
        assert_within(found.cpu(), reference(asked, given), Numerics.SAME_ACCUM)


@every_size
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_the_op_of_a_kernel_asks_no_library_for_what_is_empty(kernel, sizes):
    m, n, k = sizes
    if 0 not in (m, n, k):
        pytest.skip("nothing is empty")
    (a_dtype, _), *_ = sorted(kernel.requires.codes, key=str)
    a = torch.zeros(m, k, dtype=kernel.a_dtype or a_dtype)
    out_dtype, bias = torch.bfloat16, torch.randn(n, dtype=torch.bfloat16)
    # A weight that no library could read.
    out = kernel.overload()(a, torch.empty(0), None, torch.ones(n), bias, n, out_dtype)
    assert torch.equal(out, bias.expand(m, n))
    assert out.is_contiguous()


@every_size
@pytest.mark.parametrize("code_dtype", [INT8, E4M3])
def test_a_scaled_sum_over_nothing_is_its_bias(sizes, code_dtype):
    m, n, k = sizes
    a, b = torch.zeros(m, k).to(code_dtype), torch.zeros(k, n).to(code_dtype)
    bias = torch.randn(n)
    for block in (None, [1, 16]):
        a_scale, b_scale = (torch.ones(m, 1), torch.ones(n)) if block is None else (None, torch.ones(n, -(-k // 16)))
        out = fxq.scaled_mm(a, b, a_scale, b_scale, bias, F32, block=block)
        assert torch.equal(out, bias.expand(m, n))
    if code_dtype is INT8:
        zero_point = torch.full((m, 1), 3, dtype=torch.int32)
        out = fxq.scaled_mm(a, b, None, None, None, torch.int32, a_zero_point=zero_point)
        assert torch.equal(out, torch.zeros(m, n, dtype=torch.int32))


@every_size
@pytest.mark.parametrize("code_dtype", [INT8, torch.uint8, E4M3])
def test_a_weight_only_sum_over_nothing_is_its_bias(sizes, code_dtype):
    m, n, k = sizes
    x, b, bias = torch.randn(m, k), torch.zeros(k, n).to(code_dtype), torch.randn(n)
    for block in (None, [1, 16]):
        scale = torch.ones(n) if block is None else torch.ones(n, -(-k // 16))
        assert torch.equal(fxq.weight_only_mm(x, b, scale, None, bias, F32, block=block), bias.expand(m, n))


@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("sizes", [(0, 0), (0, 64), (64, 0)], ids=str)
def test_a_weight_without_elements_is_packed(layout, sizes):
    n, k = sizes
    for dtype in layout.weights:
        packed = fxq.pack(torch.zeros(n, k).to(dtype), layout.name)
        assert packed.shape == layout.shape(n, k)


def linears(n: int, k: int) -> nn.Module:
    """A module with several quantized linears of an input ``[m, k]``, of which the last starts from floats."""

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randint(-128, 128, (n, k), dtype=INT8))
            self.register_buffer("w8", torch.randn(n, k).to(E4M3))
            self.register_buffer("packed", torch.randint(0, 256, (n, k // 2), dtype=torch.uint8))
            self.register_buffer("s", torch.rand(n, 1) + 0.5)
            self.register_buffer("bias", torch.randn(n))

        def forward(self, x: Tensor) -> list[Tensor]:
            q = x.round().clamp(-127, 127).to(INT8)
            nibbles = torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1)
            weights = [self.w.float() * self.s, (self.w.float() - 3) * self.s, self.w8.float() * self.s]
            weights.append((nibbles.float() - 8) * self.s)
            outs = [nn.functional.linear(x, weight, self.bias) for weight in weights]
            outs += [nn.functional.linear(q.float() - 3, weight, self.bias) for weight in weights[:2]]
            outs.append(nn.functional.linear(x.to(E4M3).float(), weights[2], self.bias))
            low = [nn.functional.linear(*(t.bfloat16() for t in (x, weight, self.bias))) for weight in weights]
            return outs + low

    return Linears()


@pytest.mark.parametrize("sizes", [(4, 32, 0), (4, 0, 32), (0, 32, 32), (0, 0, 0)], ids=str)
def test_empty_matmuls_compile(sizes):
    m, n, k = sizes
    model, x = linears(n, k), torch.randn(m, k)
    found = torch.compile(model, backend="fx_quant", dynamic=False)(x)
    for out, expected in zip(found, model(x), strict=True):
        assert_within(out, expected, Numerics.REASSOCIATED)


def test_compiled_code_for_any_rows_takes_none():
    w, x = torch.randint(-128, 128, (32, 32), dtype=INT8), torch.randn(4, 32)

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x.round().clamp(-127, 127).to(INT8).float() @ w.float().t(), x @ (w.float() * 0.5).t()

    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(model, backend="fx_quant")
    compiled(x, w)
    assert [out.shape for out in compiled(x[:0], w)] == [(0, 32), (0, 32)]


@pytest.mark.parametrize("sizes", [(4, 32, 0), (4, 0, 32), (0, 32, 32)], ids=str)
def test_an_empty_matmul_is_left_and_said(sizes):
    m, n, k = sizes
    inputs = (torch.zeros(m, k, dtype=INT8), torch.zeros(n, k, dtype=INT8))
    state = rewrite(trace(lambda a, w: a.float() @ w.float().t(), *inputs))
    assert not state.rows
    assert [each.reason for each in state.recognised] == ["a size of the matmul is 0, so there is nothing to multiply"]


@pytest.mark.parametrize("sizes", [(4, 32, 0), (4, 0, 32)], ids=str)
def test_a_canonical_op_without_elements_compiles_beside_another(sizes):
    m, n, k = sizes
    a, w = torch.zeros(m, k, dtype=INT8), torch.zeros(n, k, dtype=INT8)
    full, scale = torch.ones(m, 32, dtype=INT8), torch.ones(())

    @torch.compile(backend="fx_quant", dynamic=False)
    def run(a, w, full):
        empty = fxq.scaled_mm(a, w.t(), scale, scale, None, F32)
        return empty, fxq.scaled_mm(full, full.t(), scale, scale, None, F32)

    empty, sums = run(a, w, full)
    assert torch.equal(empty, torch.zeros(m, n))
    assert torch.equal(sums, torch.full((m, m), 32.0))


def test_a_site_is_found_again_where_no_size_is_0():
    inputs = (torch.zeros(1, 1, dtype=INT8), torch.zeros(1, 1, dtype=INT8))
    assert len(prove(trace(lambda a, w: a.float() @ w.float().t(), *inputs)).found.sites) == 1
