"""Whatever the strides of its operands, a kernel computes what they hold: compared with float64.

A new kernel is tested by being there: nothing below names one but for what PyTorch's own matmuls get wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fx_quant.kernels.context import EAGER
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.padding import plan_padding
from fx_quant.kernels.select import Selection
from fx_quant.scheme import INT4_DTYPES
from tests.test_conformance import (
    DEVICE,
    HERE,
    RUN_HERE,
    accepted,
    assert_within,
    largest_term,
    operands,
    problem,
    reference,
)


@pytest.fixture(autouse=True)
def nothing_packed():
    clear_packed_weights()


def every_other(x: Tensor) -> Tensor:
    wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1])) if x.dim() else x
    wide[..., ::2] = x
    return wide[..., ::2]


def part_of_wider(x: Tensor) -> Tensor:
    """At an address that is a multiple of nothing."""
    wide = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


def odd(x: Tensor) -> Tensor:
    """Dims of one element have a stride that says nothing."""
    x = x.contiguous()
    strides = [7777 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


def rows_repeated(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def columns_repeated(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout for layout in (every_other, part_of_wider, transposed, odd, rows_repeated, columns_repeated)
}
# One k is a matrix that lies both ways; int4 codes come in pairs along k.
SIZES = ((17, 70, 36), (5, 32, 128), (1, 8, 64), (5, 1, 32), (5, 7, 1), (1, 1, 1), (5, 16, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", RUN_HERE, ids=lambda kernel: kernel.name)
def test_a_kernel_computes_what_its_operands_hold(kernel, layout):
    schemes = {(asked.scheme, asked.out_dtype, asked.bias) for asked, m in accepted(kernel) if m == 17}
    chosen: dict[object, tuple] = {}
    for scheme, out, bias in sorted(schemes, key=str):
        chosen.setdefault(scheme, (scheme, out, bias))
        if bias is not None:
            chosen[scheme] = (scheme, out, bias)
    count = 0
    for (scheme, out, bias), (m, n, k) in ((of, size) for of in chosen.values() for size in SIZES):
        asked = problem(scheme, n, k, out, bias, m)
        if kernel.requires.unmet(asked, HERE) or (scheme.weight.dtype in INT4_DTYPES and k % 2):
            continue
        torch.manual_seed(0)
        given = operands(asked, m)
        hostile = {name: x if x is None or not x.dim() else LAYOUTS[layout](x) for name, x in given.items()}
        plain = {name: x if x is None else x.contiguous().clone() for name, x in hostile.items()}
        clear_packed_weights()
        # What `select` gives, as test_conformance says.
        selection = Selection(asked, HERE, kernel, plan_padding(asked, kernel, EAGER), (), EAGER)
        there = {name: None if x is None else x.to(DEVICE) for name, x in hostile.items()}
        found = run_kernel(selection, **there)
        try:
            assert_within(found.cpu(), reference(asked, plain), kernel.numerics, largest_term(asked, plain))
        except AssertionError as error:
            raise AssertionError(f"{kernel.name} on {asked}: {error}") from None
        count += 1
    assert count


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_b", LAYOUTS)
def test_the_matmul_of_pytorch_gets_no_strides_that_it_gets_wrong(of_a, of_b, size):
    m, n, k = size
    a, w = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (n, k)))
    a, b = LAYOUTS[of_a](a), LAYOUTS[of_b](w).t()
    out = torch.ops.fx_quant.pytorch_int_mm(a, b, None, None, None, n, torch.int32)
    assert torch.equal(out, (a.double() @ b.double()).to(torch.int32))


class Linears(torch.nn.Module):
    """Linears over int8 codes in float32, which are right whatever the strides."""

    def forward(self, operands: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [a.float() @ w.float().t() for a, w in operands]


@pytest.mark.parametrize("kernel", ["pytorch_int_mm", "cpu_int8_portable", None])
def test_compiled_code_gets_no_strides_that_are_read_wrong(kernel):
    """All in one graph, each of another number of columns, so that none has the kernel of another."""
    options = {"strict": True} if kernel is None else {"force_kernel": kernel}
    compiled, operands = torch.compile(Linears(), backend="fx_quant", options=options, dynamic=False), []
    for m, n, k in ((17, 24, 32), (5, 8, 1)):
        for i, layout in enumerate((rows_repeated, columns_repeated, every_other)):
            shapes = ((m, k), (n + 32 * i, k))
            operands.append(tuple(layout(torch.randint(-128, 128, shape, dtype=torch.int8)) for shape in shapes))
    for out, expected in zip(compiled(operands), Linears()(operands), strict=True):
        assert torch.equal(out, expected)
