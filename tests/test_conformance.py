"""Every kernel of the registry that runs here, on every problem that it accepts, equals the canonical op.

A new provider is tested by being there: nothing below names a kernel.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fx_quant.diagnose.support import SCHEMES
from fx_quant.kernels.context import EAGER
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.machine import detect_target
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.padding import plan_padding
from fx_quant.kernels.registry import Kernel, kernels
from fx_quant.kernels.select import Selection, select
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.ops import dequantize_weight
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import Unmet
from fx_quant.scheme import INT4_DTYPES, Granularity, OperandSpec, Scheme
from fx_quant.weights import pack_int4
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant
HERE = detect_target("cuda" if torch.cuda.is_available() else "cpu")
DEVICE = "cpu" if HERE.platform == "cpu" else "cuda"
RUN_HERE = [kernel for kernel in kernels() if not kernel.requires.unmet_by_target(HERE)]

# Aligned, ragged, one column, one k, longer than a panel; k even, as int4 codes come in pairs.
SIZES = ((128, 256), (70, 36), (1, 2), (200, 130))
ROWS = (0, 1, 17)
EPILOGUES = (
    (torch.float32, None),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
)
GROUPS = (
    "float8_e4m3fn per_group(32) (dynamic) x float8_e4m3fn per_block(16, 32)",
    "float8_e5m2 per_token (dynamic) x float8_e5m2 per_channel",
    "float16 x int8 per_channel",
    "float32 x int8 per_tensor",
    "float32 x float8_e5m2 per_block(16, 32)",
    "float32 x int4 per_group(32)",
    "float16 x uint4 per_group(32) asymmetric",
    "int8 per_group(32) (dynamic) x int8 per_group(32)",
    "int8 per_group(64) (dynamic) x int8 per_block(16, 64)",
    "int8 per_token asymmetric (dynamic) x uint4 per_group(64) asymmetric",
    "int8 per_token (dynamic) x int4 per_channel",
    "int8 per_tensor (static) x int8 per_block(16, 32) asymmetric",
    "bfloat16 x int8 per_group(32) asymmetric",
    "bfloat16 x uint8 per_tensor asymmetric",
    "bfloat16 x float8_e5m2 per_block(128, 128)",
    "bfloat16 x float8_e4m3fnuz per_tensor",
    "bfloat16 x uint4 per_channel asymmetric",
    # Groups that pairs of bfloat16 and eight int4 codes do not divide.
    "bfloat16 x int8 per_group(9)",
    "bfloat16 x int4 per_group(12)",
    "float32 x uint8 per_channel asymmetric",
    "float32 x int4 per_tensor",
    "float32 x uint8 per_channel with offset",
    "float16 x uint8 per_block(16, 32) with offset",
    "bfloat16 x int8 per_group(32) with offset",
    "bfloat16 x int4 per_group(12) with offset",
    "bfloat16 x float8_e4m3fn per_tensor with offset",
)
ALL_SCHEMES = tuple(Scheme.parse(text) for text in (*SCHEMES, *GROUPS))


@pytest.fixture(autouse=True)
def nothing_packed():
    clear_packed_weights()


def problem(scheme: Scheme, n: int, k: int, out: torch.dtype, bias: torch.dtype | None, m: int) -> Problem:
    return Problem(scheme, SizeRange.exactly(m), n, k, out, bias, constant_weight=True)


def seed(*of: object) -> None:
    """The same operands whichever kernel is asked first; ``torch.manual_seed`` formats the stack for a GPU to come."""
    torch.default_generator.manual_seed(zlib.crc32(repr(of).encode()))


def activation_codes(spec: OperandSpec, m: int, k: int) -> Tensor:
    if not spec.quantized:
        return torch.randn(m, k).to(spec.dtype)
    if spec.dtype is torch.int8:
        return torch.randint(-128, 128, (m, k), dtype=torch.int8)
    return torch.randn(m, k).to(spec.dtype)


def activation_scale(scheme: Scheme, m: int, k: int) -> Tensor | None:
    spec = scheme.activation
    if not spec.quantized:
        return None
    if spec.block is not None:
        return torch.rand(m, spec.scales_along(k)) + 0.1
    return torch.rand(m, 1) + 0.1 if spec.granularity == Granularity.PER_TOKEN else torch.tensor(0.25)


@functools.cache
def weight_of(scheme: Scheme, n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    seed("weight", str(scheme), n, k)
    symmetric = scheme.weight.symmetric and not (scheme.weight.offset and scheme.weight.dtype is torch.uint8)
    weight = quantize_weight(torch.randn(n, k) / 8, replace(scheme.weight, offset=False, symmetric=symmetric))
    codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
    if scheme.weight.dtype in INT4_DTYPES:
        codes, zero_point = pack_int4(codes), None if zero_point is None else zero_point - 8
    assert scale.shape == scheme.weight.scale_shape(n, k)
    if scheme.weight.block is None:
        scale, zero_point = scale.flatten(), None if zero_point is None else zero_point.flatten()
    if not scheme.weight.offset:
        return codes, scale, zero_point, None
    offset = torch.randn(scale.shape) / 8
    return codes, scale, None, offset if zero_point is None else offset - zero_point * scale


@functools.cache
def activation_of(scheme: Scheme, m: int, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    spec = scheme.activation
    seed("activation", str(scheme), m, k)
    zero_points = None if spec.symmetric else _zero_points(spec, m)
    return activation_codes(spec, m, k), activation_scale(scheme, m, k), zero_points


@functools.cache
def bias_of(n: int, dtype: torch.dtype) -> Tensor:
    seed("bias", n, dtype)
    return torch.randn(n, dtype=dtype)


def operands(asked: Problem, m: int) -> dict[str, Tensor | None]:
    """Those of a problem, which kernels and results share."""
    scheme = asked.scheme
    codes, b_scale, b_zero_point, b_offset = weight_of(scheme, asked.n, asked.k)
    a, a_scale, a_zero_point = activation_of(scheme, m, asked.k)
    return {
        "a": a,
        "weight": codes,
        "a_scale": a_scale,
        "b_scale": b_scale,
        "b_zero_point": b_zero_point,
        "b_offset": b_offset,
        "bias": None if asked.bias is None else bias_of(asked.n, asked.bias),
        "a_zero_point": a_zero_point,
    }


def _zero_points(spec: OperandSpec, m: int) -> Tensor:
    per_token = spec.granularity == Granularity.PER_TOKEN
    return torch.randint(-128, 128, (m, 1) if per_token else (), dtype=torch.int32)


def reference(asked: Problem, given: dict[str, Tensor | None]) -> Tensor:
    a, weight, block = given["a"], given["weight"], asked.scheme.weight.block
    if asked.scheme.weight_only:
        factors, more = (given["b_scale"], given["b_zero_point"]), {"block": block, "b_offset": given["b_offset"]}
        return fxq.weight_only_mm(a, weight.t(), *factors, given["bias"], asked.out_dtype, **more)
    return fxq.scaled_mm(
        a,
        weight.t(),
        given["a_scale"],
        given["b_scale"],
        given["bias"],
        asked.out_dtype,
        a_zero_point=given["a_zero_point"],
        b_zero_point=given["b_zero_point"],
        block=block,
    )


def largest_term(asked: Problem, given: dict[str, Tensor | None]) -> float:
    """The largest term of the float sums that make a result: its bias, and the products of a float activation."""
    terms = [0.0 if given["bias"] is None else given["bias"].float().abs().max().item()]
    if asked.scheme.weight_only and given["a"].numel():
        factors = (given["b_scale"], given["b_zero_point"], asked.scheme.weight.block, given["b_offset"])
        weight = dequantize_weight(given["weight"].t(), asked.k, *factors)
        terms.append((given["a"].float().abs().max() * weight.abs().max()).item())
        if given["b_offset"] is not None:
            # One offset is added for a whole group, times the sum of a row's activations there.
            rows = given["a"].float().abs().sum(1).max()
            terms.append((rows * given["b_offset"].float().abs().max()).item())
    return max(terms)


@functools.cache
def expected(asked: Problem, m: int) -> tuple[Tensor, float]:
    """The canonical op's result of the operands, and their largest term."""
    given = operands(asked, m)
    return reference(asked, given), largest_term(asked, given)


def accepted(kernel: Kernel):
    """Every problem of the grid that ``kernel`` accepts here."""
    for scheme, (n, k), (out, bias), m in itertools.product(ALL_SCHEMES, SIZES, EPILOGUES, ROWS):
        asked = problem(scheme, n, k, out, bias, m)
        if not kernel.requires.unmet(asked, HERE):
            yield asked, m


@pytest.mark.parametrize("kernel", RUN_HERE, ids=lambda kernel: kernel.name)
def test_a_kernel_is_the_canonical_op_on_all_that_it_accepts(kernel):
    count = 0
    for asked, m in accepted(kernel):
        given = operands(asked, m)
        # What `select` gives, which asks every other kernel too.
        selection = Selection(asked, HERE, kernel, plan_padding(asked, kernel, EAGER), (), EAGER)
        if not count:
            assert replace(select(asked, HERE, force_kernel=kernel.name, context=EAGER), verdicts=()) == selection
        there = {name: None if x is None else x.to(DEVICE) for name, x in given.items()}
        out = run_kernel(selection, **there)
        try:
            result, largest = expected(asked, m)
            assert_within(out.cpu(), result, kernel.numerics, largest)
        except AssertionError as error:
            raise AssertionError(f"{kernel.name} on {asked}: {error}") from None
        count += 1
    assert count, f"{kernel.name} can run here and accepts nothing of the grid: add a scheme that it takes"


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_a_problem_that_a_kernel_rejects_has_its_reasons(kernel):
    target = HERE
    for scheme, (n, k), (out, bias) in itertools.product(ALL_SCHEMES, SIZES, EPILOGUES):
        reasons = kernel.requires.unmet(problem(scheme, n, k, out, bias, 5), target)
        assert all(isinstance(reason, Unmet) and len(reason.text) > 8 for reason in reasons)
        assert len(set(reasons)) == len(reasons)


def test_a_kernel_runs_here():
    assert RUN_HERE
