"""Every Triton kernel that is shipped, with every configuration, as launches of typical operands.

Operands are on the ``meta`` device, so that they take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from fx_quant.kernels.triton import persistent, swapped, tile, weight_only
from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import Launch
from fx_quant.kernels.triton.operands import ScaledOperands, scaled_operands
from fx_quant.kernels.triton.packed_codes import PACKED_CODES
from fx_quant.kernels.triton.split import unfit_split

F32, BF16, I8, I32 = torch.float32, torch.bfloat16, torch.int8, torch.int32
meta = partial(torch.empty, device="meta")
N = K = 4096
MANY = 4096


@dataclass(frozen=True)
class Shipped:
    """One kernel with one configuration.

    Args:
        name: kernel, recipe and configuration.
        products: what the tensor cores multiply: ``float8``, ``int8`` or ``half``; None where any instruction will do.
        launch: plans it.
    """

    name: str
    products: str | None
    launch: Callable[[], Launch]


def float8_of(on: Architecture) -> torch.dtype:
    """The float8 dtype that an architecture multiplies."""
    return torch.float8_e4m3fnuz if on.name == "gfx942" else torch.float8_e4m3fn


def operands_of(recipe: str, m: int, on: Architecture) -> ScaledOperands:
    """Operands with all that the epilogue may have to hold."""
    codes, _, scales = recipe.partition("_")
    dtype = I8 if codes == "int8" else float8_of(on)
    a, b, bias = meta(m, K, dtype=dtype), meta(N, K, dtype=dtype).t(), meta(N, dtype=BF16)
    if scales in ("block", "group"):
        rows = 128 if scales == "block" else 1
        # Scales of the activation as kernels write them: neighbours along m side by side.
        a_scale, b_scale = meta(K // 128, m).t(), meta(-(-N // rows), K // 128)
        return scaled_operands(a, b, a_scale, b_scale, bias, N, BF16, block=(rows, 128))
    zero_point = meta(m, 1, dtype=I32) if codes == "int8" else None
    sums = meta(N, dtype=I32) if codes == "int8" else None
    return scaled_operands(a, b, meta(m, 1), meta(N), bias, N, BF16, a_zero_point=zero_point, b_sum=sums)


def _persistent(on: Architecture) -> Iterator[Shipped]:
    for recipe, configurations in persistent.CONFIGURATIONS.get(on.name, {}).items():
        for found in configurations:
            plan = partial(persistent.plan_scaled_mm, operands_of(recipe, MANY, on), found, on)
            yield Shipped(f"{recipe} {found}", recipe.partition("_")[0], plan)


def splits(on: Architecture) -> int:
    """More parts of a sum than one, where k can be split."""
    return 2 if unfit_split(2, on) is None else 1


def _swapped(on: Architecture) -> Iterator[Shipped]:
    for recipe, by_architecture in swapped.CONFIGURATIONS.items():
        for each in by_architecture.get(on.name, ()):
            found = replace(each, split_k=splits(on))
            operands = operands_of("float8_block" if recipe == "block" else recipe, found.block_m, on)
            products = "int8" if recipe == "int8" else "float8"
            yield Shipped(f"{recipe} {found}", products, partial(swapped.plan_scaled_mm, operands, found, on))


def _tile(on: Architecture) -> Iterator[Shipped]:
    for recipe, configurations in tile.CONFIGURATIONS.get(on.name, {}).items():
        for found in configurations:
            plan = partial(tile.plan_scaled_mm, operands_of(recipe, MANY, on), found, on)
            yield Shipped(f"{recipe} {found}", recipe.partition("_")[0], plan)
    if on.tma:
        # What runs operands that no descriptor describes.
        for recipe in ("int8", "float8", "float8_block"):
            for m in (16, 64, MANY):
                found = tile.configuration("codes", m)
                # Sixteen rows are too few for the newer matrix instructions; float8 is then widened, exactly.
                products = recipe.partition("_")[0] if m > 64 else None
                plan = partial(tile.plan_scaled_mm, operands_of(recipe, m, on), found, on)
                yield Shipped(f"{recipe} {found}", products, plan)


def _weight_only(on: Architecture) -> Iterator[Shipped]:
    # Codes of uint8 are packed as those of int8 are.
    for name, group in (("int4", 128), ("int4", 0), ("int8", 0), ("float8", 0)):
        codes = PACKED_CODES[name]
        if name == "float8" and not on.float8:
            continue
        dtype = float8_of(on) if name == "float8" else codes.dtype
        packed = meta(codes.shape(N, K // codes.per_byte), dtype=dtype)
        scale = meta(N, K // group, dtype=BF16) if group else meta(N, dtype=BF16)
        zero_point = None if name == "float8" else torch.empty_like(scale, dtype=I8)
        block = (1, group) if group else None
        for each in weight_only.CONFIGURATIONS[weight_only.family(on)][codes.block]:
            found = replace(each, split_k=splits(on))
            x = meta(found.block_m, K, dtype=BF16)
            operands = weight_only.packed_operands(
                x, packed, codes, scale, None, N, BF16, zero_point=zero_point, block=block
            )
            words = f"{name} {f'groups of {group} ' if group else ''}{found}"
            yield Shipped(words, "half", partial(weight_only.plan_weight_only_mm, operands, found, on))


def shipped(on: Architecture) -> list[Shipped]:
    """Everything that is for ``on``."""
    parts = (_persistent, _swapped, _tile, _weight_only)
    return [each for part in parts for each in part(on)]


def each_once(kernels: Iterable[Shipped]) -> Iterator[Shipped]:
    """So many of ``kernels`` that each recipe of a form and each configuration is there, not each pair of them.

    First those that show both anew.
    """
    shown = []
    for each in kernels:
        configuration = str(each.launch().configuration)
        shown.append((each, {configuration, (each.name.removesuffix(configuration), configuration.partition(" ")[0])}))
    seen: set[object] = set()
    for both in (True, False):
        for each, shows in shown:
            if seen.isdisjoint(shows) if both else not shows <= seen:
                yield each
                seen |= shows
