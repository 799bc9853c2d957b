"""Recognising the quantize formula: each formula that an op states, exactly, and each premise that may not break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fx_quant.passes.quantizers import Quantizer, recognise_quantizer
from tests.graphs import run, trace

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
Function = Callable[[Tensor], Tensor]


def sample(dtype: torch.dtype = BF16, *shape: int) -> Tensor:
    """Rows of every magnitude; one of zeros, one with an infinity, one with a NaN."""
    x = torch.randn(shape or (12, 16)) * torch.logspace(-6, 3, (shape or (12, 16))[-2])[:, None]
    x[..., 0, :] = 0.0
    x[..., 1, 3] = torch.inf
    x[..., 2, 3] = torch.nan
    return x.to(dtype)


def recognised(function: Function, x: Tensor) -> Quantizer | str:
    graph = trace(function, x)
    (output,) = graph.find_nodes(op="output")
    return recognise_quantizer(output.args[0])


def amax(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def codes(x: Tensor, scale: Tensor, lo: float = -128, hi: float = 127, dtype: torch.dtype = INT8) -> Tensor:
    y = x.float() / scale
    return (y if dtype.is_floating_point else y.round()).clamp(lo, hi).to(dtype)


def plain(x: Tensor) -> Tensor:
    return codes(x, (amax(x).float() / 127).clamp(min=1e-5))


PLAIN = {
    "dtype": INT8,
    "granularity": "per_token",
    "divisor": 127.0,
    "divide_dtype": F32,
    "floor": 1e-5,
    "floor_on": "scale",
    "scale_dtype": F32,
    "reciprocal": False,
    "lo": -128.0,
    "hi": 127.0,
}


def extrema(x: Tensor, of_high: Tensor | None = None, high_dim: int = -1) -> Tensor:
    """Amax as torchao spells it; the same unless the maximum is of another tensor or over another dim."""
    low, high = x.amin(-1), (x if of_high is None else of_high).amax(high_dim)
    zero = torch.zeros_like(low)
    return torch.maximum(-torch.minimum(low, zero), torch.maximum(high, zero)).unsqueeze(-1)


def scale_of(x: Tensor) -> Tensor:
    return (amax(x).float() / 127).clamp(min=1e-5)


# Formulas that the op states, and the arguments that differ from the plain one.
STATED: dict[str, tuple[Function, dict[str, object]]] = {
    "plain": (plain, {}),
    "cast_before_abs": (lambda x: codes(x, (amax(x.float()) / 127).clamp(min=1e-5)), {}),
    "range_-127": (lambda x: codes(x, scale_of(x), -127), {"lo": -127.0}),
    "range_0": (lambda x: codes(x, scale_of(x), 0), {"lo": 0.0}),
    "divisor": (lambda x: codes(x, (amax(x).float() / 127.5).clamp(min=1e-5)), {"divisor": 127.5}),
    "no_floor": (lambda x: codes(x, amax(x).float() / 127), {"floor": 0.0, "floor_on": "none"}),
    "other_floor": (lambda x: codes(x, (amax(x).float() / 127).clamp(min=1e-7)), {"floor": 1e-7}),
    "floor_on_amax": (lambda x: codes(x, amax(x).float().clamp(min=1e-5) / 127), {"floor_on": "amax"}),
    "reciprocal": (
        lambda x: (x.float() * scale_of(x).reciprocal()).round().clamp(-128, 127).to(INT8),
        {"reciprocal": True},
    ),
    "round_after_clamp": (lambda x: (x.float() / scale_of(x)).clamp(-128, 127).round().to(INT8), {}),
    "division_in_bfloat16": (
        lambda x: codes(x, (amax(x) / 127).float().clamp(min=1e-5)),
        {"divide_dtype": BF16},
    ),
    "scale_in_bfloat16": (
        lambda x: codes(x, scale_of(x).to(BF16).float()),
        {"scale_dtype": BF16},
    ),
    "extrema": (lambda x: codes(x, (extrema(x).float() / 127).clamp(min=1e-5)), {}),
    "max_with_indices": (lambda x: codes(x, (x.abs().max(-1, keepdim=True)[0].float() / 127).clamp(min=1e-5)), {}),
    "unsqueezed": (lambda x: codes(x, (x.abs().amax(-1).unsqueeze(-1).float() / 127).clamp(min=1e-5)), {}),
    "per_tensor": (
        lambda x: codes(x, (x.abs().amax().float() / 127).clamp(min=1e-5)),
        {"granularity": "per_tensor"},
    ),
    "per_tensor_max": (
        lambda x: codes(x, (x.abs().max().float() / 127).clamp(min=1e-5)),
        {"granularity": "per_tensor"},
    ),
    "per_tensor_of_one": (
        lambda x: codes(x, (x.abs().amax().float() / 127).clamp(min=1e-5).view(1)),
        {"granularity": "per_tensor"},
    ),
    "per_tensor_of_a_view": (
        lambda x: codes(x, (x.reshape(-1).abs().amax().float() / 127).clamp(min=1e-5)),
        {"granularity": "per_tensor"},
    ),
    "float8": (
        lambda x: codes(x, (amax(x).float() / 448).clamp(min=1e-5), -448, 448, E4M3),
        {"dtype": E4M3, "divisor": 448.0, "lo": -448.0, "hi": 448.0},
    ),
    "float8_e5m2": (
        lambda x: codes(x, (amax(x).float() / 57344).clamp(min=1e-5), -57344, 57344, E5M2),
        {"dtype": E5M2, "divisor": 57344.0, "lo": -57344.0, "hi": 57344.0},
    ),
}


@pytest.mark.parametrize("name", STATED)
def test_a_stated_formula_is_recognised_with_its_constants(name):
    function, changes = STATED[name]
    found = recognised(function, sample())
    assert isinstance(found, Quantizer), found
    assert {**found.arguments, **(found.dynamic or {})} == {**PLAIN, **changes}


@pytest.mark.parametrize("name", STATED)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_op_gives_the_bits_of_the_formula(name, dtype):
    """Zeros, infinities and NaNs included; codes of NaN are compared too, as both cast the same value."""
    function, _ = STATED[name]
    x = sample(dtype)
    if "per_tensor" in name:
        x = x[3:]  # an infinity or a NaN would spread over the whole tensor
    found = recognised(function, x)
    assert isinstance(found, Quantizer), found
    op = torch.ops.fx_quant.quantize
    if found.dynamic is None:
        (_,), values = run(trace(function, x), x)
        actual = op.default(x, values[found.scale.name], **found.arguments)
    else:
        actual, _ = op.dynamic(x, **found.arguments, **found.dynamic)
    torch.testing.assert_close(actual.float(), function(x).float(), rtol=0, atol=0, equal_nan=True)


def test_three_dimensions_are_per_token():
    found = recognised(plain, sample(BF16, 2, 12, 16))
    assert found.dynamic["granularity"] == "per_token"


def test_an_amax_over_another_view_of_the_same_rows_is_recognised():
    def function(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return codes(x, scale_of(rows).view(*x.shape[:-1], 1))

    assert recognised(function, sample(BF16, 2, 12, 16)).dynamic is not None


def test_codes_behind_a_view_are_found():
    assert isinstance(recognised(lambda x: plain(x).view(3, 4, 16), sample()), Quantizer)


# The scale is taken as given: the op divides by it, but does not compute it.
GIVEN: dict[str, Function] = {
    "of_another_x": lambda x: codes(x, scale_of(x * 2)),
    "mean": lambda x: codes(x, (x.abs().mean(-1, keepdim=True).float() / 127).clamp(min=1e-5)),
    "max_without_abs": lambda x: codes(x, (x.amax(-1, keepdim=True).float() / 127).clamp(min=1e-5)),
    "absolute_minimum": lambda x: codes(x, (x.abs().amin(-1, keepdim=True).float() / 127).clamp(min=1e-5)),
    "multiplied": lambda x: codes(x, (amax(x).float() * (1 / 127)).clamp(min=1e-5)),
    "divided_twice": lambda x: codes(x, (amax(x).float() / 127 / 2).clamp(min=1e-5)),
    "floored_twice": lambda x: codes(x, (amax(x).float().clamp(min=1e-5) / 127).clamp(min=1e-5)),
    "added_epsilon": lambda x: codes(x, amax(x).float() / 127 + 1e-5),
    "capped": lambda x: codes(x, (amax(x).float() / 127).clamp(1e-5, 1.0)),
    "floored_after_rounding": lambda x: codes(x, (amax(x).float() / 127).to(BF16).float().clamp(min=1e-5)),
    "rounded_amax": lambda x: codes(x, (amax(x.float()).to(BF16).float() / 127).clamp(min=1e-5)),
    "divided_after_floor_in_bfloat16": lambda x: codes(x, (amax(x).clamp(min=1e-5) / 127).float()),
    "extrema_of_different_tensors": lambda x: codes(x, (extrema(x, x * 2).float() / 127).clamp(min=1e-5)),
    "extrema_over_different_dims": lambda x: codes(x, (extrema(x, high_dim=0).float() / 127).clamp(min=1e-5)),
    "amax_of_columns": lambda x: codes(x, (x.abs().amax(0).unsqueeze(-1).float() / 127).clamp(min=1e-5)),
    "extrema_not_bounded_by_zero": lambda x: codes(
        x, (torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)).float() / 127).clamp(min=1e-5)
    ),
    "no_divisor": lambda x: codes(x, amax(x).float().clamp(min=1e-5)),
    "flipped": lambda x: codes(x, scale_of(x).flip(0)),
    "along_groups": lambda x: codes(x, scale_of(x.view(8, 32)).repeat_interleave(2, 0)),
    "row_maximum_of_everything": lambda x: codes(x, scale_of(x).amax().expand(16, 1)),
}


def square() -> Tensor:
    """As many rows as columns, so that what lies along the wrong dim fits; finite, as some scales mix rows."""
    return torch.randn(16, 16).to(BF16)


@pytest.mark.parametrize("name", GIVEN)
def test_another_scale_is_a_given_one(name):
    found = recognised(GIVEN[name], square())
    assert isinstance(found, Quantizer), found
    assert found.dynamic is None


@pytest.mark.parametrize("name", GIVEN)
def test_the_op_with_a_given_scale_gives_the_bits_of_the_formula(name):
    x = square()
    graph = trace(GIVEN[name], x)
    (output,) = graph.find_nodes(op="output")
    found = recognise_quantizer(output.args[0])
    (expected,), values = run(graph, x)
    actual = torch.ops.fx_quant.quantize.default(values[found.x.name], values[found.scale.name], **found.arguments)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


REFUSED: dict[str, tuple[Function, str]] = {
    "no_round": (
        lambda x: (x.float() / scale_of(x)).clamp(-128, 127).to(INT8),
        "integer codes are cut off, not rounded",
    ),
    "floor": (
        lambda x: (x.float() / scale_of(x)).floor().clamp(-128, 127).to(INT8),
        "integer codes are cut off, not rounded",
    ),
    "round_to_decimals": (
        lambda x: torch.round(x.float() / scale_of(x), decimals=1).clamp(-128, 127).to(INT8),
        "integer codes are cut off, not rounded",
    ),
    "float8_rounded_to_integers": (
        lambda x: (x.float() / scale_of(x)).round().clamp(-448, 448).to(E4M3),
        "float8 codes are rounded to integers",
    ),
    "no_clamp": (
        lambda x: (x.float() / scale_of(x)).round().to(INT8),
        "the codes are not clamped on both sides by constants",
    ),
    "lower_clamp_only": (
        lambda x: (x.float() / scale_of(x)).round().clamp(min=-128).to(INT8),
        "the codes are not clamped on both sides by constants",
    ),
    "clamped_twice": (
        lambda x: (x.float() / scale_of(x)).round().clamp(-128, 127).clamp(-100, 100).to(INT8),
        "integer codes are cut off, not rounded",
    ),
    "crossed_bounds": (
        lambda x: torch.clamp_min(torch.clamp_max((x.float() / scale_of(x)).round(), -3), 5).to(INT8),
        "the codes are not clamped on both sides by constants",
    ),
    "clamped_by_a_tensor": (
        lambda x: torch.minimum((x.float() / scale_of(x)).round(), torch.rand(16)).clamp(min=-128).to(INT8),
        "the codes are not clamped on both sides by constants",
    ),
    "fractional_bounds": (
        lambda x: (x.float() / scale_of(x)).clamp(-3.5, 3.5).round().to(INT8),
        "the clamp bounds of integer codes are not integers",
    ),
    "scaled_in_bfloat16": (
        lambda x: (x / scale_of(x).to(BF16)).round().clamp(-128, 127).to(INT8),
        "the codes are computed in bfloat16, not in float32",
    ),
    "shifted": (
        lambda x: ((x.float() / scale_of(x)).round() + 3).clamp(-128, 127).to(INT8),
        "a zero point is added to what is rounded, which quantize does not",
    ),
    "scale_along_k": (
        lambda x: codes(x, scale_of(x.t()).t()),
        "x is not divided by a scale per token or per tensor",
    ),
    "scale_per_element": (
        lambda x: codes(x, torch.rand(12, 16)),
        "x is not divided by a scale per token or per tensor",
    ),
    "inverted": (
        lambda x: (scale_of(x) / x.float()).round().clamp(-128, 127).to(INT8),
        "x is not divided by a scale per token or per tensor",
    ),
    "multiplied_by_the_scale": (
        lambda x: (x.float() * scale_of(x)).round().clamp(-128, 127).to(INT8),
        "x is not divided by a scale per token or per tensor",
    ),
    "not_divided": (
        lambda x: x.float().round().clamp(-128, 127).to(INT8),
        "x is not divided by a scale per token or per tensor",
    ),
    "double": (
        lambda x: (x.double() / scale_of(x)).round().clamp(-128, 127).to(INT8),
        "x is scaled in torch.float64, not in float32",
    ),
    "scale_in_float64": (
        lambda x: (x.float() / scale_of(x).double().mean()).round().clamp(-128, 127).to(INT8),
        "x is not divided by a scale per token or per tensor",
    ),
    "not_cast": (lambda x: plain(x).bitwise_not(), "the codes are not the result of a cast"),
    "cast_twice": (
        lambda x: (x.float() / scale_of(x)).round().clamp(-128, 127).to(torch.int32).to(INT8),
        "the codes are not clamped on both sides by constants",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_formula_that_no_op_states_says_why(name):
    function, reason = REFUSED[name]
    assert recognised(function, sample()) == reason


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_amax_of_a_narrower_reduction_is_given(ndim):
    """Amax over the first dim has the shape of a row of x, not of its rows."""
    x = sample(BF16, 16, 16) if ndim == 2 else sample(BF16, 2, 16, 16)
    found = recognised(lambda x: codes(x, scale_of(x.transpose(-1, -2))), x)
    assert found.dynamic is None


def test_a_vector_is_one_token():
    x = sample()[5]
    found = recognised(plain, x)
    assert found.dynamic["granularity"] == "per_token"


def test_a_quantizer_says_its_formula():
    assert str(recognised(plain, sample())) == "x / scale, clamp [-128, 127], scale = amax / 127 per_token"
