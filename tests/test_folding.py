"""What is computed of constants alone: once, again after a write, and equal to what the graph computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_quant.ops.constants import forget_all
from fx_quant.ops.fold import can_fold, with_several_results
from fx_quant.passes.pipeline import to_kernels
from tests.graphs import calls, rewrite, run, trace
from tests.printer import program_lines

ops = torch.ops.fx_quant
M, K, N, GROUP = 4, 64, 32, 32


def packed_weight() -> tuple[Tensor, Tensor, Tensor]:
    """Nibbles ``[n, k / 2]``, scales and zero points ``[n, k / group]``."""
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(N, K // GROUP, generator=generator) * 0.1
    zero = torch.randint(0, 16, (N, K // GROUP), generator=generator, dtype=torch.uint8)
    return nibbles, scale.bfloat16(), zero


def linear(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    codes = torch.stack([packed & 15, packed >> 4], -1).view(N, K // GROUP, GROUP)
    weight = ((codes.to(x.dtype) - zero[..., None].to(x.dtype)) * scale[..., None]).view(N, K)
    return torch.nn.functional.linear(x, weight)


def folded(target: str = "x86_vnni"):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = (x, *packed_weight())
    state = rewrite(trace(linear, *given), target=target)
    to_kernels(state)
    return state.graph, given


def test_unpacking_and_packing_of_a_weight_are_one_call_for_the_whole_graph():
    graph, _ = folded()
    (call,) = calls(graph, ops.fold.default)
    lines = program_lines(call.args[1])
    assert any("bitwise_and" in line for line in lines)
    assert any("fx_quant.pack" in line for line in lines)
    assert not calls(graph, torch.ops.aten.bitwise_and.Scalar)


def test_a_folded_graph_gives_the_source_again_and_after_a_write():
    forget_all()
    graph, given = folded()
    for _ in range(2):
        (actual, *_), _ = run(graph, *given)
        torch.testing.assert_close(actual, linear(*given), rtol=2e-2, atol=2e-2)
    given[1].bitwise_xor_(0x55)
    (actual, *_), _ = run(graph, *given)
    torch.testing.assert_close(actual, linear(*given), rtol=2e-2, atol=2e-2)


PROGRAM = (
    "{'inputs':1,'steps':[['aten.mul.Tensor',[{'value':0},2],{'dict':{}}],"
    "['aten.permute.default',[{'value':1},[1,0]],{'dict':{}}],['aten.expand.default',[{'value':1},[3,2,2]],{'dict':{}}]],"
    "'results':[2,3,0]}"
)


def test_results_are_kept_until_an_input_is_written_to():
    x = torch.arange(4.0).reshape(2, 2)
    first, again = ops.fold([x], PROGRAM), ops.fold([x], PROGRAM)
    assert all(one is other for one, other in zip(first, again, strict=True))
    x.add_(1)
    torch.testing.assert_close(ops.fold([x], PROGRAM)[0], (x * 2).t())


def test_results_are_dense_keep_their_order_and_own_their_memory():
    x = torch.arange(4.0).reshape(2, 2)
    transposed, repeated, itself = ops.fold([x], PROGRAM)
    assert transposed.stride() == (1, 2)
    assert repeated.is_contiguous()
    assert itself.data_ptr() != x.data_ptr()
    fakes = torch._subclasses.FakeTensorMode()
    with fakes:
        found = ops.fold([fakes.from_tensor(x)], PROGRAM)
    assert [each.stride() for each in found] == [each.stride() for each in (transposed, repeated, itself)]


def test_a_single_result_gets_another_beside_it():
    x = torch.arange(4.0).reshape(2, 2)
    assert with_several_results(PROGRAM) == PROGRAM
    one = PROGRAM.replace("[2,3,0]", "[1]")
    assert [each.tolist() for each in ops.fold([x], with_several_results(one))] == [(2 * x).tolist(), [0.0]]


@pytest.mark.parametrize("text", ["it's", 'a "name"', "a\\b"])
def test_a_string_that_the_text_of_a_program_cannot_hold_is_not_folded(text):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert can_fold(graph.call_function(torch.ops.aten.div.Tensor_mode, (x, 3), {"rounding_mode": "floor"}))
    assert not can_fold(graph.call_function(torch.ops.aten.div.Tensor_mode, (x, 3), {"rounding_mode": text}))


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_a_padded_weight_is_padded_once_and_still_read_column_by_column(target):
    def int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        a_scale = x.float().abs().amax(-1, keepdim=True) / 127
        codes = (x.float() / a_scale).round().clamp(-128, 127).to(torch.int8)
        return torch._int_mm(codes, weight.t()).float() * a_scale * scale

    given = (torch.randn(M, 30), torch.randint(-128, 128, (20, 30), dtype=torch.int8), torch.rand(20))
    state = rewrite(trace(int8, *given), target=target)
    to_kernels(state)
    (call,) = calls(state.graph, ops.prepack.default)
    assert call.args[1] == ["padded_24x32"]
    ((weight,),) = [padded.users for padded in call.users]
    assert weight.meta["val"].stride(0) == 1
    (actual, *_), _ = run(state.graph, *given)
    torch.testing.assert_close(actual, int8(*given), rtol=1e-6, atol=1e-6)
