"""Random graphs from the algebra's own grammar: whatever is rewritten means what it meant, and says how it rounds.

``FX_QUANT_EXAMPLES=10000 pytest tests/test_property.py`` looks at more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph

from fx_quant.passes.pipeline import to_kernels
from fx_quant.passes.rulebook import is_matmul
from fx_quant.scheme import Numerics
from tests.decoded_recipes import Decoded, decoded_recipes, function_of_decoded, tensors_of
from tests.graphs import Proven, assert_roundings_allowed, assert_same_meaning, copy_of, prove, rewrite, run, trace
from tests.tolerances import assert_within

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLOATS = (F32, BF16, F16)
INT8, UINT8, E4M3 = torch.int8, torch.uint8, torch.float8_e4m3fn
EXAMPLES = int(os.environ.get("FX_QUANT_EXAMPLES", "40"))


# --- recipes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantize:
    """How the activation becomes codes. Every field is a place where a rewrite could go wrong."""

    codes: torch.dtype
    scale: str  # token | tensor | given | number | rows | along_k
    of: str  # x | 2x: what the scale is computed from
    floor_on: str
    divide_in_x: bool
    scale_dtype: torch.dtype
    reciprocal: bool
    compute: torch.dtype
    rounding: str  # round_first | clamp_first | floor | none
    lo: float
    hi: float


@dataclass(frozen=True)
class Offset:
    """Codes shifted to uint8 before the matmul, and what is taken off after it."""

    added: int
    multiplier: int
    of_other_weight: bool
    layout: str  # n | 1n | n1 | flipped
    form: str  # sub | add_negative | sub_reversed


@dataclass(frozen=True)
class Recipe:
    """One graph: quantize, matmul, then steps on the result."""

    x_dtype: torch.dtype
    lead: int | None
    m: int
    k: int
    n: int
    dynamic: bool
    seed: int
    quantize: Quantize
    matmul: str  # int_mm | scaled_mm | decoded | codes | addmm
    offset: Offset | None
    a_steps: tuple[str, ...]
    b_steps: tuple[str, ...]
    steps: tuple[str, ...]
    returned: frozenset[int]
    numerics: str
    three_d: bool


QUANTIZES = st.builds(
    Quantize,
    codes=st.sampled_from([INT8, INT8, E4M3]),
    scale=st.sampled_from(["token", "token", "tensor", "given", "number", "rows", "along_k"]),
    of=st.sampled_from(["x", "x", "x", "2x"]),
    floor_on=st.sampled_from(["none", "amax", "scale"]),
    divide_in_x=st.booleans(),
    scale_dtype=st.sampled_from([F32, F32, BF16]),
    reciprocal=st.booleans(),
    compute=st.sampled_from([F32, F32, F32, BF16]),
    rounding=st.sampled_from(["round_first", "round_first", "clamp_first", "floor", "none"]),
    lo=st.sampled_from([-128.0, -127.0, -8.0, 0.0, -3.5]),
    hi=st.sampled_from([127.0, 127.0, 7.0, 6.5]),
)

OFFSETS = st.builds(
    Offset,
    added=st.sampled_from([128, 128, 127, 3]),
    multiplier=st.sampled_from([128, 128, 127, 3]),
    of_other_weight=st.sampled_from([False, False, False, True]),
    layout=st.sampled_from(["n", "n", "1n", "n1", "flipped"]),
    form=st.sampled_from(["sub", "sub", "add_negative", "sub_reversed"]),
)

CASTS = {"f32": F32, "bf16": BF16, "f16": F16}
OPERAND_STEPS = ("f32", "bf16", "f16", "rows", "rows", "number", "tensor", "along_k", "half_rows", "views", "div")
STEPS = (
    "row", "row", "row", "column", "column", "column", "column_1n", "half_column", "number", "tensor", "both",
    "divide_column", "f32", "bf16", "f16", "3d", "2d", "bias", "bias", "half_bias", "bias_1", "bias_number",
    "bias_rows", "bias_alpha", "subtract_bias", "residual", "zero", "flip", "swap", "clone", "relu", "square",
)  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    quantize = draw(QUANTIZES)
    matmul = draw(
        st.sampled_from(["scaled_mm", "decoded", "codes"])
        if quantize.codes is E4M3
        else st.sampled_from(["int_mm", "int_mm", "decoded", "codes", "addmm"])
    )
    decoded = matmul in ("decoded", "addmm")
    steps = tuple(draw(st.lists(st.sampled_from(STEPS), max_size=6)))
    if matmul == "int_mm" and draw(st.booleans()):
        steps = ("f32", *steps)
    return Recipe(
        x_dtype=draw(st.sampled_from(FLOATS)),
        lead=draw(st.sampled_from([None, None, 1, 2])),
        m=draw(st.sampled_from([1, 2, 4, 4, 6])),
        # torch._int_mm returns garbage on CPUs for k = 1.
        k=draw(st.sampled_from([2, 4, 16])),
        n=draw(st.sampled_from([1, 4, 4, 6])),
        dynamic=draw(st.sampled_from([False, False, False, False, True])),
        seed=draw(st.integers(0, 3)),
        quantize=quantize,
        matmul=matmul,
        offset=draw(OFFSETS) if matmul == "int_mm" and draw(st.integers(0, 2)) == 0 else None,
        a_steps=tuple(draw(st.lists(st.sampled_from(OPERAND_STEPS), min_size=1, max_size=3))) if decoded else (),
        b_steps=tuple(draw(st.lists(st.sampled_from(OPERAND_STEPS), min_size=1, max_size=3))) if decoded else (),
        steps=steps,
        returned=frozenset(draw(st.sets(st.integers(-2, 5), max_size=1))),
        numerics=draw(st.sampled_from(["reassociated", "reassociated", "same_accum", "exact"])),
        three_d=draw(st.booleans()),
    )


# --- recipes as functions ---------------------------------------------------------------------------------------


def tensors(recipe: Recipe) -> tuple[Tensor, ...]:
    """``x`` and the parameters: weight codes, another weight, column scale, scale along k, one number, bias."""
    generator = torch.Generator().manual_seed(recipe.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (recipe.m, recipe.k) if recipe.lead is None else (recipe.lead, recipe.m, recipe.k)
    x = (normal(*shape) * torch.logspace(-1, 0, recipe.m)[:, None]).to(recipe.x_dtype)
    weights = [(normal(recipe.n, recipe.k) * 50).clamp(-128, 127).to(recipe.quantize.codes) for _ in range(2)]
    column = normal(recipe.n).abs() * 0.05 + 0.01
    along_k = normal(recipe.k).abs() * 0.05 + 0.01
    return x, *weights, column, along_k, torch.tensor(0.03), normal(recipe.n)


def quantized(recipe: Quantize, x: Tensor, along_k: Tensor, number: Tensor) -> tuple[Tensor, Tensor | float]:
    """Codes of ``x`` and the scale that they were divided by."""
    source = x * 2 if recipe.of == "2x" else x
    scale: Any
    if recipe.scale in ("token", "tensor"):
        amax = source.abs().amax(-1, keepdim=True) if recipe.scale == "token" else source.abs().amax()
        amax = amax if recipe.divide_in_x else amax.float()
        amax = amax.clamp(min=1e-5) if recipe.floor_on == "amax" else amax
        scale = (amax / recipe.hi).float()
        scale = scale.clamp(min=1e-5) if recipe.floor_on == "scale" else scale
        scale = scale.to(recipe.scale_dtype).float()
    elif recipe.scale == "rows":
        scale = source[..., :1].float().abs() * 0.1 + 0.01
    else:
        scale = {"given": number, "number": 0.04, "along_k": along_k}[recipe.scale]
    y = x.to(recipe.compute)
    if recipe.reciprocal:
        y = y * (1.0 / scale)
    else:
        y = y / scale
    if recipe.rounding == "round_first":
        y = y.round()
    elif recipe.rounding == "floor":
        y = y.floor()
    y = y.clamp(recipe.lo, recipe.hi)
    if recipe.rounding == "clamp_first":
        y = y.round()
    return y.to(recipe.codes), scale


def decoded(codes: Tensor, steps: tuple[str, ...], rows: Any, along_k: Tensor, number: Tensor) -> Tensor:
    """Codes ``[..., k]`` in floating point, dequantized step by step."""
    y = codes if steps[0] in CASTS else codes.float()
    for step in steps:
        if step in CASTS:
            y = y.to(CASTS[step])
        elif step == "views":
            y = y.reshape(-1, y.shape[-1]).view(y.shape)
        else:
            factor = {"number": 0.5, "tensor": number, "along_k": along_k, "div": number}.get(step, rows)
            factor = factor.to(BF16) if step == "half_rows" and isinstance(factor, Tensor) else factor
            y = y / factor if step == "div" else y * factor
    return y


def product(recipe: Recipe, codes: Tensor, scale: Any, parameters: tuple[Tensor, ...]) -> Tensor:
    weight, other, column, along_k, number, bias = parameters
    flat = codes.reshape(-1, codes.shape[-1])
    if recipe.matmul == "int_mm":
        if recipe.offset is None:
            return torch._int_mm(flat, weight.t())
        return corrected(recipe.offset, flat, weight, other)
    if recipe.matmul == "scaled_mm":
        vector = isinstance(scale, Tensor) and scale.numel() > 1
        if vector and scale.numel() != flat.shape[0]:
            raise RuntimeError("torch 2.11 traces scales of other rows, and fails when it runs")
        one = torch.ones((), dtype=F32)
        row = scale.reshape(-1, 1) if vector else (scale.reshape(()) if isinstance(scale, Tensor) else one)
        columns = column[None] if vector else number
        out_dtype = F32 if recipe.x_dtype is F16 else recipe.x_dtype
        return torch._scaled_mm(flat, weight.t(), scale_a=row, scale_b=columns, out_dtype=out_dtype)
    a, b = (codes if recipe.three_d else flat), weight
    if recipe.matmul == "codes":
        to = FLOATS[recipe.seed % 3]
        return a.to(to) @ b.t().to(to)
    rows = scale if recipe.three_d or not isinstance(scale, Tensor) or scale.dim() < 2 else scale.reshape(-1, 1)
    a = decoded(a, recipe.a_steps, rows, along_k, number)
    b = decoded(b, recipe.b_steps, column[:, None], along_k, number).to(a.dtype)
    if recipe.matmul == "addmm":
        beta, alpha = [(1, 1), (1, 1), (2, 1), (1, 2)][recipe.seed]
        return torch.addmm(bias.to(a.dtype), a.reshape(-1, a.shape[-1]), b.t(), beta=beta, alpha=alpha)
    return a @ b.t()


def corrected(offset: Offset, codes: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    shifted = (codes.to(torch.int32) + offset.added).to(UINT8)
    acc = torch._int_mm(shifted, weight.t())
    sums = (other if offset.of_other_weight else weight).sum(1, dtype=torch.int32)
    layout = {"n": sums, "1n": sums[None], "n1": sums[:, None], "flipped": sums.flip(0)}[offset.layout]
    if offset.form == "add_negative":
        return acc + layout * -offset.multiplier
    correction = layout * offset.multiplier
    return acc - correction if offset.form == "sub" else correction - acc


def stepped(step: str, y: Tensor, x: Tensor, scale: Any, parameters: tuple[Tensor, ...]) -> Tensor:
    _, _, column, _, number, bias = parameters
    rows = x.reshape(-1, x.shape[-1])[:, :1].float().abs() + 0.5
    if isinstance(scale, Tensor) and scale.dim() >= 2 and scale.shape[:-1] == x.shape[:-1]:
        rows = scale
    rows = rows.reshape(*y.shape[:-1], 1)
    if step in CASTS:
        return y.to(CASTS[step])
    actions: dict[str, Callable[[], Tensor]] = {
        "row": lambda: y * rows,
        "column": lambda: y * column,
        "column_1n": lambda: column[None] * y,
        "half_column": lambda: y * column.to(BF16),
        "number": lambda: y * 0.5,
        "tensor": lambda: y * number,
        "both": lambda: y * (rows * column),
        "divide_column": lambda: y / column,
        "3d": lambda: y.reshape(*x.shape[:-1], y.shape[-1]),
        "2d": lambda: y.reshape(-1, y.shape[-1]),
        "bias": lambda: y + bias,
        "half_bias": lambda: bias.to(BF16) + y,
        "bias_1": lambda: y + bias[:1],
        "bias_number": lambda: y + 0.25,
        "bias_rows": lambda: y + rows,
        "bias_alpha": lambda: torch.add(y, bias, alpha=3),
        "subtract_bias": lambda: y - bias,
        "residual": lambda: y + torch.cos(rows * column),
        "zero": lambda: y + 0,
        "flip": lambda: y.flip(0),
        "swap": lambda: y.reshape(2, -1, y.shape[-1]).transpose(0, 1).reshape(y.shape) if rows.numel() % 2 == 0 else y,
        "clone": y.clone,
        "relu": y.relu,
        "square": lambda: y * y,
    }
    return actions[step]()


def function_of(recipe: Recipe) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        codes, scale = quantized(recipe.quantize, x, parameters[3], parameters[4])
        results = {-2: codes}
        y = product(recipe, codes, scale, parameters)
        results[-1] = y
        for index, step in enumerate(recipe.steps):
            y = stepped(step, y, x, scale, parameters)
            results[index] = y
        return (y, *(results[i] for i in sorted(recipe.returned) if i in results and i != len(recipe.steps) - 1))

    return function


# --- what must hold ---------------------------------------------------------------------------------------------


def check(source: Graph, static: range, numerics: str, inputs: tuple[Tensor, ...]) -> Proven:
    """All that is proven of ``source`` means what it meant, rounds as it says, and kernels compute the same."""
    proven = prove(source, static, numerics)
    found = proven.found
    assert_same_meaning(source, proven.graph, inputs)
    for site in found.sites:
        event(f"proven: {site.scheme}")
        assert site.product is not None
        assert site.product.numerics <= Numerics[numerics.upper()]
        assert_roundings_allowed(site, proven, inputs)
    for miss in found.misses:
        event(f"missed: {miss.rule.partition(' of class')[0]}")
    if not found.sites and not found.misses:
        event("nothing found")
    if found.sites:
        check_kernels(source, static, numerics, inputs)
    return proven


def check_kernels(source: Graph, static: range, numerics: str, inputs: tuple[Tensor, ...]) -> None:
    """What this machine's kernels compute is what the canonical ops do."""
    state = rewrite(source, static, numerics=numerics)
    if not state.rows:
        event("no kernel runs it, or none faster than the source")
        return
    canonical = copy_of(state.graph)
    assert_same_meaning(source, canonical, inputs)
    sites = {site: row.canonical for site, row in state.rows.items()}
    to_kernels(state)
    old, new = run(canonical, *inputs)[1], run(state.graph, *inputs)[1]
    for site, row in state.rows.items():
        event(f"kernel: {row.selection.kernel.name}")
        expected, actual = old[sites[site]], new[row.op.name]
        terms = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
        assert_within(actual, expected, row.selection.kernel.numerics, terms)


def matmuls(graph: Graph) -> int:
    return sum(map(is_matmul, graph.nodes))


def check_recipe(recipe: Recipe) -> None:
    inputs = tensors(recipe)
    try:
        source = trace(function_of(recipe), *inputs, dynamic=recipe.dynamic)
        run(source, *inputs)
    except (RuntimeError, IndexError):
        event("does not fit together")
        return
    proven = check(source, range(1, len(inputs)), recipe.numerics, inputs)
    sites, misses = len(proven.found.sites), len(proven.found.misses)
    assert sites + misses == matmuls(proven.before), "a quantized matmul was passed over"
    assert matmuls(proven.graph) == misses, "a rewritten matmul is computed twice"


def check_decoded(recipe: Decoded) -> None:
    inputs = tensors_of(recipe)
    try:
        source = trace(function_of_decoded(recipe, stepped), *inputs, dynamic=recipe.dynamic)
        run(source, *inputs)
    except (RuntimeError, IndexError, ValueError):
        event("does not fit together")
        return
    # The last parameter is what the codes of a weight are computed from at run time.
    check(source, range(1, len(inputs) - recipe.runtime), recipe.numerics, inputs)


RUNS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FX_QUANT_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@RUNS
@given(recipes())
def test_no_rewrite_of_a_random_graph_is_wrong(recipe):
    check_recipe(recipe)


@RUNS
@given(decoded_recipes())
def test_no_rewrite_of_randomly_dequantized_operands_is_wrong(recipe):
    check_decoded(recipe)
