"""The floor of a matmul on a GPU, and the order in which the cost model puts configurations."""

from __future__ import annotations

import pytest
import torch

from fx_quant.errors import UnknownNameError
from fx_quant.kernels.triton.architectures import architecture, architectures
from fx_quant.kernels.triton.cost import MOST, Matmul, estimate, floor, rank
from fx_quant.kernels.triton.launch import Configuration

E4M3, BF16, INT8 = torch.float8_e4m3fn, torch.bfloat16, torch.int8
H100 = architecture("sm90")


@pytest.mark.parametrize(
    ("n", "k", "m", "microseconds", "bound"),
    [
        (6144, 4096, 1, 8.4, "memory"),
        (6144, 4096, 256, 9.8, "memory"),
        (6144, 4096, 1024, 34.4, "compute"),
        (28672, 4096, 16, 39.5, "memory"),
        (4096, 14336, 4096, 320.7, "compute"),
        (8192, 28672, 64, 79.3, "memory"),
    ],
)
def test_the_floor_of_float8_is_the_roofline(n, k, m, microseconds, bound):
    found = floor(Matmul(m, n, k, E4M3), H100)
    assert round(found.seconds * 1e6, 1) == microseconds
    assert found.bound == bound


@pytest.mark.parametrize(("m", "microseconds"), [(1, 4.3), (64, 4.8), (256, 16.1)])
def test_the_floor_of_packed_codes_counts_half_bytes_and_scales(m, microseconds):
    found = floor(Matmul(m, 6144, 4096, BF16, b_bits=4, group=128), H100)
    assert round(found.seconds * 1e6, 1) == microseconds


def test_an_empty_result_takes_no_time():
    assert floor(Matmul(0, 4096, 4096, E4M3), H100).seconds == 0
    assert estimate(Configuration("tile", 16, 64, 128, 4, 4), Matmul(4, 0, 4096, E4M3), H100).seconds == 0


def test_an_architecture_without_the_products_widens_them():
    assert architecture("sm80").rate(E4M3) == architecture("sm80").half
    assert architecture("sm80").rate(INT8) == architecture("sm80").int8
    with pytest.raises(UnknownNameError, match="sm90"):
        architecture("sm91")


@pytest.mark.parametrize("on", architectures(), ids=lambda on: on.name)
@pytest.mark.parametrize("m", [0, 1, 64, 4096])
def test_no_estimate_is_below_the_floor(on, m):
    matmul = Matmul(m, 4096, 4096, INT8)
    for found in (
        Configuration("tile", 16, 64, 128, 4, 4),
        Configuration("swapped", 64, 64, 256, 4, 4, split_k=4),
        Configuration("persistent", 128, 256, 128, 4, 3, warp_specialized=True),
    ):
        assert estimate(found, matmul, on).seconds >= floor(matmul, on).seconds


def test_few_programs_do_not_have_all_of_the_bandwidth():
    few, many = (
        estimate(Configuration("swapped", 16, 64, 256, 4, 4), Matmul(1, n, 65536, E4M3), H100) for n in (512, 32768)
    )
    assert few.seconds / (512 * 65536) > 2 * many.seconds / (32768 * 65536)


def test_waves_and_programs_are_counted():
    cost = estimate(Configuration("persistent", 128, 256, 128, 8, 3), Matmul(4096, 4096, 4096, E4M3), H100)
    assert (cost.programs, cost.waves) == (32 * 16, 4)
    cost = estimate(Configuration("swapped", 16, 64, 256, 4, 4, split_k=3), Matmul(1, 4096, 4096, E4M3), H100)
    assert (cost.programs, cost.waves) == (64 * 3, 2)


def test_the_rank_is_ascending_and_short():
    many = [Configuration("tile", m, n, 128, 4, 4) for m in (16, 32, 64, 128) for n in (16, 32, 64, 128)]
    found = rank(many, Matmul(256, 4096, 4096, E4M3), H100)
    assert len(found) == MOST
    assert [cost.seconds for cost in found] == sorted(cost.seconds for cost in found)
