"""Experts: one frame for weights of several sizes, and experts that are multiplied together, which say why they stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fx_quant
from fx_quant.report import Report
from tests.graphs import running_op_by_op

EXPERTS, N, K = 4, 32, 64


class Codes(nn.Module):
    """A linear of int8 codes that it quantizes its activation for."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (n, k), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(n) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        a_scale = x.abs().amax(-1, keepdim=True) / 127
        sums = torch._int_mm((x / a_scale).round().to(torch.int8), self.codes.t())
        return sums.float() * a_scale * self.scale


class Expert(nn.Module):
    """Up and down again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = Codes(width, K), Codes(K, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_a_frame_that_serves_experts_of_several_sizes_rewrites_each():
    """Dynamo makes sizes symbolic that differ from call to call, but those of a weight are its own."""
    torch._dynamo.reset()
    experts = [Expert(width) for width in (32, 64, 96, 32)]

    def call(expert: Expert, x: Tensor) -> Tensor:
        return expert(x)

    with running_op_by_op(), torch.no_grad():
        compiled = torch.compile(call, backend="fx_quant", options={"strict": True})
        for rows in (20, 17, 33):
            for expert in experts:
                x = torch.randn(rows, K)
                torch.testing.assert_close(compiled(expert, x), expert(x))


class Stacked(nn.Module):
    """Experts whose codes are one tensor ``[experts, n, k]``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (EXPERTS, N, K), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(EXPERTS, N, 1) * 0.01)

    def weights(self) -> Tensor:
        return self.codes.float() * self.scale


class Loop(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.weights()[expert].t() for expert in range(EXPERTS)])


class Batched(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(EXPERTS, -1, -1), self.weights().transpose(1, 2))


class Grouped(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (len(x) // EXPERTS)
        return torch._grouped_mm(x.bfloat16(), self.weights().bfloat16().transpose(1, 2), ends)


def explained(model: nn.Module) -> Report:
    with torch.no_grad():
        return fx_quant.explain(model.eval(), torch.randn(16, K), target="x86_vnni")


def test_a_loop_over_stacked_experts_rewrites_each():
    report = explained(Loop())
    assert [site.scheme for site in report.sites] == ["float32 x int8 per_channel"] * EXPERTS
    assert not report.misses


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Batched, "a batched matmul whose second operand differs from batch to batch"),
        (Grouped, "aten._grouped_mm of a weight that is decoded from stored codes, which no rule rewrites"),
    ],
)
def test_experts_that_are_multiplied_together_say_why_they_stay(model, reason):
    report = explained(model())
    assert not report.sites
    assert [miss.reason.split(":")[0] for miss in report.misses] == [reason]
