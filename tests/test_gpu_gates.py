"""The compile gates of every shipped Triton kernel, and the goldens of what they became."""

from __future__ import annotations

import os
import re

import pytest
import torch

from fx_quant.kernels.triton.architectures import architecture
from fx_quant.kernels.triton.launch import Configuration, Launch
from tests.cross_compile import Compiled
from tests.gpu_gates import TARGETS, broken_gates, gated, golden
from tests.gpu_shipped import each_once, shipped
from tests.triton_interpreter import needs_triton

# Of the kernels of an architecture, so that processes share them.
PARTS = 8


def golden_rows(target: str) -> dict[str, list[str]]:
    """The golden's rows by kernel, as lists of cells."""
    _, _, *lines = golden(target).read_text().splitlines()
    return {cells[0]: cells for cells in (re.split(r"  +", line.strip()) for line in lines)}


@pytest.mark.cross_compile
@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_kernel_compiles_well(target, part):
    """Each recipe and each configuration once; ``make gates`` and FX_QUANT_GATES=all: each of both together."""
    kernels = shipped(architecture(target))
    some = kernels if os.environ.get("FX_QUANT_GATES") == "all" else list(each_once(kernels))
    found = [gated(each.name, target) for each in some[part::PARTS]]
    assert [f"{each.name}: {', '.join(each.broken)}" for each in found if each.broken] == []
    if not golden(target).exists():
        pytest.skip(f"no golden of this Triton: {golden(target)}; write it by `python -m tests.gpu_gates --accept`")
    expected = golden_rows(target)
    for each in found:
        assert expected[each.name] == [str(cell) for cell in each.row() if cell != ""]


@pytest.mark.parametrize("target", TARGETS)
def test_a_golden_has_what_is_shipped_and_no_more(target):
    if not golden(target).exists():
        pytest.skip(f"no golden of this Triton: {golden(target)}")
    assert {each.name for each in shipped(architecture(target))} == golden_rows(target).keys()


def compiled(**changes: object) -> Compiled:
    given = {"registers": 128, "spilled": 0, "shared": 1024, "warps": 4, "instructions": {"QGMMA": 4}, "assembly": ""}
    return Compiled(**(given | changes))  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"spilled": 8}, ["spills 8 bytes"]),
        ({"shared": 240 * 1024}, ["needs 245760 bytes of shared memory, there are 232448"]),
        ({"instructions": {"HMMA": 4}}, ["multiplies by HMMA, not QGMMA", "multiplies by HMMA"]),
        ({"instructions": {}}, ["multiplies by no matrix instruction, not QGMMA"]),
    ],
    ids=str,
)
def test_a_gate_that_does_not_hold_is_said(changes, broken):
    on = architecture("sm90")
    launch = Launch(None, {}, {}, 1, torch.empty(0), Configuration("persistent", 128, 128, 128, 8, 4))
    assert list(broken_gates(launch, "float8", on, compiled(**changes))) == broken


def test_a_configuration_that_only_says_that_it_is_warp_specialised_breaks_a_gate():
    on = architecture("sm90")
    found = Configuration("persistent", 128, 128, 128, 4, 4, warp_specialized=True)
    launch = Launch(None, {}, {}, 1, torch.empty(0), found)
    assert list(broken_gates(launch, "float8", on, compiled())) == ["is not warp-specialised"]
    counts = {"QGMMA": 4, "USETMAXREG": 7}
    assert list(broken_gates(launch, "float8", on, compiled(instructions=counts))) == []


def test_every_name_is_of_one_kernel():
    for target in TARGETS:
        names = [each.name for each in shipped(architecture(target))]
        assert len(names) == len(set(names)) >= 20


@pytest.mark.parametrize("target", TARGETS)
def test_each_configuration_and_each_recipe_is_compiled_once_at_least(target):
    kernels = shipped(architecture(target))
    configurations = {each.name: str(each.launch().configuration) for each in kernels}
    recipes = {name: (name.removesuffix(found), found.split()[0]) for name, found in configurations.items()}
    some = [each.name for each in each_once(kernels)]
    for parts in (configurations, recipes):
        assert {parts[name] for name in some} == set(parts.values())
    assert len(some) < len(kernels)
