"""Schemes and problems: what they print, and how numerics classes compare."""

from __future__ import annotations

import pytest
import torch

from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import CODE_DTYPES, Granularity, Numerics, OperandSpec, Scheme, dtype_name

TOKEN = OperandSpec(torch.int8, Granularity.PER_TOKEN, dynamic=True)
CHANNEL = OperandSpec(torch.int8, Granularity.PER_CHANNEL)


def test_a_dynamic_scheme_prints_as_documented():
    assert str(Scheme(TOKEN, CHANNEL)) == "int8 per_token (dynamic) x int8 per_channel"


def test_a_static_scheme_says_so():
    activation = OperandSpec(torch.float8_e4m3fn, Granularity.PER_TENSOR)
    weight = OperandSpec(torch.float8_e5m2, Granularity.PER_TENSOR)
    assert str(Scheme(activation, weight)) == "float8_e4m3fn per_tensor (static) x float8_e5m2 per_tensor"


def test_static_and_dynamic_schemes_differ():
    assert Scheme(OperandSpec(torch.int8, Granularity.PER_TOKEN), CHANNEL) != Scheme(TOKEN, CHANNEL)


def test_numerics_classes_are_ordered_by_distance_from_the_source():
    assert sorted(Numerics, reverse=True)[::-1] == [
        Numerics.EXACT,
        Numerics.SAME_ACCUM,
        Numerics.REASSOCIATED,
        Numerics.APPROXIMATE,
    ]
    assert [str(n) for n in sorted(Numerics)] == ["exact", "same_accum", "reassociated", "approximate"]


@pytest.mark.parametrize("dtype", sorted(CODE_DTYPES, key=str))
def test_a_dtype_name_leads_back_to_the_dtype(dtype):
    assert getattr(torch, dtype_name(dtype)) is dtype


def test_codes_are_one_byte_wide():
    assert {dtype.itemsize for dtype in CODE_DTYPES} == {1}


@pytest.mark.parametrize(
    ("sizes", "text"),
    [(SizeRange(1, None), "1.."), (SizeRange(0, 16), "0..16"), (SizeRange.exactly(7), "7"), (SizeRange(7, 7), "7")],
)
def test_a_size_range_prints_its_bounds(sizes, text):
    assert str(sizes) == text


@pytest.mark.parametrize(("bias", "ending"), [(None, ""), (torch.float32, " + bias float32")])
def test_a_problem_prints_everything_that_selection_reads(bias, ending):
    asked = Problem(Scheme(TOKEN, CHANNEL), SizeRange(2, None), 48, 64, torch.bfloat16, bias, constant_weight=True)
    assert str(asked) == f"{asked.scheme}, m=2.. n=48 k=64 -> bfloat16{ending}"
