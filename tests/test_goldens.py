"""What becomes of each module's graph, as text: before, with canonical ops, with the kernels of ``x86_vnni``.

``EXPECTTEST_ACCEPT=1 pytest tests/test_goldens.py`` writes the goldens anew; read every line before you keep it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fx_quant.passes.sites import Miss, Recognised, Site
from tests.graphs import Captured, capture
from tests.models import ADVERSARIAL, POSITIVE, build, inputs

GOLDENS = Path(__file__).parent / "goldens" / "graphs"


@dataclass(frozen=True)
class Variant:
    """How a module is called: rank of ``x``, rows static or dynamic, dtype, bias."""

    ndim: int
    dynamic: bool
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True

    def __str__(self) -> str:
        rows = "dynamic" if self.dynamic else "static"
        return f"{self.ndim}d_{rows}" + ("" if self.dtype is torch.bfloat16 else "_float32_no_bias")


VARIANTS = [Variant(ndim, dynamic) for ndim in (2, 3) for dynamic in (False, True)]
POSITIVE_CASES = [(name, variant) for name in POSITIVE for variant in VARIANTS] + [
    (name, Variant(3, True, torch.float32, bias=False))
    for name, positive in POSITIVE.items()
    if torch.float32 in positive.dtypes
]

# Near misses whose graph is worth reading: what is left alone is as much a claim as what is rewritten.
NEGATIVE_CASES = [
    "range_-127",
    "accumulator_has_foreign_user",
    "codes_returned",
    "double_use_of_scaled",
    "scale_varies_along_k",
    "weight_scale_on_k",
    "weight_mutated",
    "weight_scale_mutated",
    "x_scale_mutated",
    "input_mutated",
]


def site_lines(captured: Captured, site: Site) -> list[str]:
    lines = [
        f"{site.gemm.target}: {site.problem}",
        f"  kernel {captured.state.rows[site].selection.kernel.name}, {site.product.numerics}",
    ]
    if site.scheme != site.problem.scheme:
        lines.insert(1, f"  for {site.scheme}")
    quantizer = captured.state.rows[site].quantizer
    return lines if quantizer is None else [*lines, f"  quantize: {quantizer}"]


def miss_line(miss: Miss) -> str:
    return f"{miss.gemm.target}: {miss.rule}"


def recognised_line(found: Recognised) -> str:
    problem = "" if found.site is None else f"{found.site.problem}: "
    return f"{found.gemm.target}: {problem}{found.reason}"


def golden_text(captured: Captured) -> str:
    """The graph at each step, then sites and misses."""
    state = captured.state
    parts = {
        "before": captured.before,
        "canonical": captured.canonical,
        "kernels of x86_vnni": captured.kernels if state.rows else "",
        "sites": "".join(f"{line}\n" for site in state.rows for line in site_lines(captured, site)),
        "misses": "".join(f"{miss_line(miss)}\n" for miss in state.misses),
    }
    if state.recognised:
        parts["recognised"] = "".join(f"{recognised_line(found)}\n" for found in state.recognised)
    return "\n".join(f"=== {title}\n" + (text or "none\n") for title, text in parts.items())


def assert_golden(name: str, text: str, folder: Path = GOLDENS) -> None:
    """Compare ``text`` with ``<folder>/<name>.txt``, or write it when goldens are being accepted."""
    path = folder / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    expected = path.read_text() if path.exists() else ""
    assert text == expected, f"accept with EXPECTTEST_ACCEPT=1 once every line of {path} is right"


def only_graph(name: str, variant: Variant) -> Captured:
    module = build(name, variant.dtype, variant.bias)
    make_inputs = ADVERSARIAL[name].inputs if name in ADVERSARIAL else inputs
    (captured,) = capture(module, make_inputs(variant.dtype, variant.ndim), dynamic_rows=variant.dynamic)
    return captured


@pytest.mark.parametrize(("name", "variant"), POSITIVE_CASES, ids=str)
def test_quantized_module_is_rewritten_as_its_golden_says(name, variant):
    assert_golden(f"{name}_{variant}", golden_text(only_graph(name, variant)))


@pytest.mark.parametrize("name", NEGATIVE_CASES)
def test_near_miss_is_rewritten_only_as_its_golden_says(name):
    variant = Variant(2, dynamic=False)
    assert_golden(f"near_miss_{name}", golden_text(only_graph(name, variant)))


def test_no_golden_is_left_over():
    expected = {f"{name}_{variant}.txt" for name, variant in POSITIVE_CASES}
    expected |= {f"near_miss_{name}.txt" for name in NEGATIVE_CASES}
    assert {path.name for path in GOLDENS.glob("*.txt")} == expected


@pytest.mark.parametrize(("name", "variant"), POSITIVE_CASES, ids=str)
def test_every_site_has_the_scheme_of_its_module(name, variant):
    text = (GOLDENS / f"{name}_{variant}.txt").read_text()
    positive = POSITIVE[name]
    sites, misses = text.split("=== sites\n")[1].split("=== misses\n")
    assert sites.count(positive.scheme) == positive.sites
    assert misses == "none\n"
