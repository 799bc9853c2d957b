"""Schemes and problems: what they print, and how numerics classes compare."""

from __future__ import annotations

import pickle

import pytest
import torch

from fx_quant.ops import decode
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import CODE_DTYPES, WHOLE, Granularity, Numerics, OperandSpec, Scheme, dtype_name

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


GROUP, BLOCK = Granularity.per_group(4), Granularity.per_block(3, 5)
# By how each prints: the block that shares a scale, and the shape of the scales of [7, 11].
GRANULARITIES = {
    "per_tensor": (Granularity.PER_TENSOR, (WHOLE, WHOLE), ()),
    "per_token": (Granularity.PER_TOKEN, (1, WHOLE), (7, 1)),
    "per_channel": (Granularity.PER_CHANNEL, (1, WHOLE), (7, 1)),
    "per_group(4)": (GROUP, (1, 4), (7, 3)),
    "per_block(3, 5)": (BLOCK, (3, 5), (3, 3)),
    "per_block(1, 4)": (Granularity.per_block(1, 4), (1, 4), (7, 3)),
    "unscaled": (Granularity.UNSCALED, (WHOLE, WHOLE), ()),
}


@pytest.mark.parametrize("text", GRANULARITIES)
def test_a_granularity_is_the_shape_of_a_block_that_prints_and_parses_by_its_name(text):
    granularity, block, shape = GRANULARITIES[text]
    spec = OperandSpec(torch.int8, granularity)
    assert (str(granularity), (granularity.rows, granularity.columns)) == (text, block)
    assert Scheme.parse(f"int8 {text} x int8 {text}").weight == spec
    assert spec.scale_shape(7, 11) == shape and spec.scales_along(11) == (shape or (1, 1))[1]
    assert spec.block == (None if block[1] == WHOLE else block)
    assert spec.group == (None if block[1] == WHOLE else block[1])
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec and hash(again) == hash(spec) and str(again) == str(spec)


@pytest.mark.parametrize("text", GRANULARITIES)
def test_scales_of_the_shape_that_a_spec_says_decode_its_codes(text):
    granularity, _, shape = GRANULARITIES[text]
    codes, scale = torch.randint(-128, 128, (7, 11), dtype=torch.int8), torch.rand(shape) + 0.5
    point = torch.randint(-9, 9, shape)
    rows, columns = granularity.block_within(7, 11)
    at = [[() if not shape else (i // rows, j // columns) for j in range(11)] for i in range(7)]
    expected = torch.stack(
        [torch.stack([(codes[i, j].float() - point[at[i][j]]) * scale[at[i][j]] for j in range(11)]) for i in range(7)]
    )
    spec = OperandSpec(torch.int8, granularity)
    assert torch.equal(decode(codes, scale, point, spec.block), expected)
    assert torch.equal(decode(codes.t().contiguous().t(), scale, point, spec.block), expected)


def test_codes_that_are_floats_already_are_not_written_to():
    codes = torch.ones(2, 4)
    assert torch.equal(decode(codes, torch.tensor(3.0), torch.tensor(1)), torch.zeros(2, 4))
    assert torch.equal(codes, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("required", "met"),
    [
        (Granularity.PER_TENSOR, ["per_tensor", "unscaled"]),  # no scale is the scalar 1
        (Granularity.UNSCALED, ["unscaled"]),
        (Granularity.PER_TOKEN, ["per_token"]),
        (Granularity.PER_CHANNEL, ["per_channel"]),
        (Granularity.ANY_GROUP, ["per_group(4)"]),
        (GROUP, ["per_group(4)"]),
        (Granularity.per_group(8), []),
        (Granularity.ANY_BLOCK, ["per_block(1, 4)", "per_block(3, 5)"]),
        (Granularity.per_block(3, 4), []),
    ],
    ids=str,
)
def test_a_required_granularity_covers_itself_and_any_size_that_it_leaves_open(required, met):
    assert sorted(text for text, (granularity, *_) in GRANULARITIES.items() if required.covers(granularity)) == met


def test_granularities_of_any_size_print_without_one():
    assert [str(each) for each in (Granularity.ANY_GROUP, Granularity.ANY_BLOCK)] == ["per_group", "per_block"]


@pytest.mark.parametrize(
    ("block", "of_weight", "of_activation"),
    [
        ((WHOLE, WHOLE), "per_tensor", "per_tensor"),
        ((1, WHOLE), "per_channel", "per_token"),
        ((1, 32), "per_group(32)", "per_group(32)"),
        ((128, 128), "per_block(128, 128)", "per_block(128, 128)"),
    ],
)
def test_a_block_has_its_name_by_the_operand(block, of_weight, of_activation):
    assert [str(Granularity.of_block(*block, weight=weight)) for weight in (True, False)] == [of_weight, of_activation]


def test_4_bit_codes_lie_two_to_a_byte():
    spec = Scheme.parse("bfloat16 x int4 per_group(32)").weight
    assert (spec.packed, spec.codes_per_element, spec.storage) == (True, 2, torch.uint8)
    assert (CHANNEL.packed, CHANNEL.codes_per_element, CHANNEL.storage) == (False, 1, torch.int8)


def test_a_scale_dtype_prints_and_parses_where_it_is_not_float32():
    text = "float8_e4m3fn per_group(32) float8_e8m0fnu scales (dynamic) x float8_e4m3fn per_group(32) bfloat16 scales"
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert (scheme.activation.scale_dtype, scheme.weight.scale_dtype) == (torch.float8_e8m0fnu, torch.bfloat16)
    assert CHANNEL.scale_dtype is torch.float32 and str(CHANNEL) == "int8 per_channel"
    with pytest.raises(ValueError, match="cannot read 'int8 per_channel int8 scales'"):
        Scheme.parse("int8 per_token x int8 per_channel int8 scales")


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
