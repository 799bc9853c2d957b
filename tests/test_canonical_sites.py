"""Canonical ops in the source graph are sites of their own: they get a kernel without any recognition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fx_quant
from fx_quant.scheme import Numerics
from tests.graphs import rewrite, trace
from tests.tolerances import assert_within

pytestmark = pytest.mark.usefixtures("uncached")

fxq = torch.ops.fx_quant
# k is a multiple of the group: Inductor's C++ misreads scales of groups that k cuts off (torch 2.11 and 2.13).
M, N, K = 10, 70, 48


class Asymmetric(nn.Module):
    """int8 codes of the activation with a zero point per token."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (N, K), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.rand(N) / 100)
        self.register_buffer("bias", torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero_point = (-128 - low / scale).round().to(torch.int32)
        codes = (x / scale + zero_point).round().clamp(-128, 127).to(torch.int8)
        return fxq.scaled_mm(
            codes, self.weight.t(), scale, self.weight_scale, self.bias, torch.float32, a_zero_point=zero_point
        )


class Blocks(nn.Module):
    """float8 with one scale for 1 x 16 of the activation and 16 x 16 of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(N, K).to(torch.float8_e4m3fn))
        self.register_buffer("weight_scale", torch.rand(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (3, 16))
        scale = groups.abs().amax(-1) / 448
        codes = (groups / scale.unsqueeze(-1)).flatten(1).clamp(-448, 448).to(torch.float8_e4m3fn)
        return fxq.scaled_mm(codes, self.weight.t(), scale, self.weight_scale, None, torch.float32, block=[16, 16])


class WeightOnly(nn.Module):
    """int8 codes of the weight beside a float activation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (N, K), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.rand(N) / 100)

    def forward(self, x: Tensor) -> Tensor:
        return fxq.weight_only_mm(x, self.weight.t(), self.weight_scale, None, None, x.dtype)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_zero_point_is_corrected_in_the_accumulator(dynamic):
    model, x = Asymmetric(), torch.randn(M, K)
    report = fx_quant.explain(model, x, dynamic=dynamic)
    (site,) = report.sites
    assert site.scheme == "int8 per_token asymmetric (dynamic) x int8 per_channel"
    compiled = torch.compile(model, backend="fx_quant", dynamic=dynamic, options={"strict": True})
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        model.weight.neg_()
        assert torch.equal(compiled(x), model(x)), "the sums of the weight are those of the old one"


@pytest.mark.parametrize("build", [Blocks, WeightOnly])
def test_it_is_what_the_canonical_op_says(build):
    model, x = build(), torch.randn(M, K)
    compiled = torch.compile(model, backend="fx_quant")
    with torch.no_grad():
        assert_within(compiled(x), model(x), Numerics.REASSOCIATED)


def test_scales_of_a_byte_that_no_kernel_reads_are_a_miss_and_the_op_decodes_them():
    a, w = torch.randn(M, 64).to(torch.float8_e4m3fn), torch.randn(N, 64).to(torch.float8_e4m3fn)
    a_scale, b_scale = torch.rand(M, 2) + 0.5, (torch.rand(N, 2) + 0.5).to(torch.float8_e8m0fnu)

    def product(a: Tensor, w: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        return fxq.scaled_mm(a, w.t(), a_scale, b_scale, None, torch.float32, block=[1, 32])

    assert torch.equal(product(a, w, a_scale, b_scale), product(a, w, a_scale, b_scale.float()))
    state = rewrite(trace(product, a, w, a_scale, b_scale))
    (miss,) = state.misses
    assert not state.rows and "takes scales of float32, got float8_e8m0fnu" in miss.rule


def test_check_takes_a_canonical_op_for_its_own_source():
    report = fx_quant.check(Asymmetric(), torch.randn(M, K))
    (site,) = report.sites
    assert site.error.max_rel_err == 0
