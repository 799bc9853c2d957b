"""``deterministic``: the bits of a row do not depend on how many rows stand beside it, for every kernel that says so."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

import fx_quant
from fx_quant.config import Options, PaddingPolicy
from fx_quant.errors import NoKernelError
from fx_quant.kernels.context import CompileContext, Mode
from fx_quant.kernels.cpu import plans
from fx_quant.kernels.cpu.plans import DEFAULT
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.padding import Padding
from fx_quant.kernels.registry import Kernel, kernel, kernels
from fx_quant.kernels.select import Selection, select
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import Kind
from fx_quant.scheme import Scheme
from fx_quant.target import named_target
from tests.graphs import trace
from tests.test_conformance import ALL_SCHEMES, EPILOGUES, HERE, RUN_HERE, operands, problem

EAGER, GRAPH = (CompileContext(mode, deterministic=True) for mode in (Mode.EAGER, Mode.GRAPH))
ROWS = 130
EVERY, SOME = range(1, ROWS + 1), (1, 2, 3, 5, 6, 7, 12, 13, 18, 19, 31, 96, 97, 129, 130)
# A ragged panel, and sums that plans cut into several parts.
SIZES = ((70, 36, EVERY), (66, 4104, SOME))
CLAIM = [each for each in RUN_HERE if each.deterministic_op is not None]


@pytest.fixture(autouse=True)
def nothing_packed():
    clear_packed_weights()


def accepted(kernel: Kernel, n: int, k: int, rows: int = ROWS) -> Iterator[Problem]:
    """One problem of each scheme that ``kernel`` runs here."""
    for scheme in ALL_SCHEMES:
        some = (problem(scheme, n, k, out, bias, rows) for out, bias in reversed(EPILOGUES))
        yield from itertools.islice((asked for asked in some if not kernel.requires.unmet(asked, HERE)), 1)


def by_rows(selection: Selection) -> Callable[[slice], Tensor]:
    """The kernel on those rows alone of one activation."""
    torch.manual_seed(zlib.crc32(str(selection.problem).encode()))
    given = operands(selection.problem, ROWS)

    def run(rows: slice) -> Tensor:
        def part(name: str, x: Tensor | None) -> Tensor | None:
            return x[rows] if name.startswith("a") and x is not None and x.dim() > 1 else x

        return run_kernel(selection, **{name: part(name, x) for name, x in given.items()})

    return run


def first_difference(run: Callable[[slice], Tensor], counts=EVERY) -> int | None:
    """The least number of rows of which one is not as when it stands alone; None where each always is."""
    alone = torch.cat([run(slice(i, i + 1)) for i in range(ROWS)])
    for m in counts:
        for rows in (slice(0, m), slice(ROWS - m, ROWS)):
            if not torch.equal(run(rows), alone[rows]):
                return m
    return None


@pytest.mark.parametrize(("n", "k", "counts"), SIZES)
@pytest.mark.parametrize("claims", CLAIM, ids=lambda kernel: kernel.name)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(claims, n, k, counts):
    for asked in accepted(claims, n, k):
        selection = select(asked, HERE, force_kernel=claims.name, context=EAGER)
        assert first_difference(by_rows(selection), counts) is None, asked


@pytest.mark.parametrize(
    "text", ["float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel", "bfloat16 x int4 per_tensor"]
)
def test_what_was_tuned_changes_no_bits(monkeypatch, text):
    """A plan cuts a sum into parts, and another number of rows may have another plan."""
    asked = problem(Scheme.parse(text), 66, 4104, torch.float32, None, ROWS)
    if HERE.platform != "cpu" or "avx512_vbmi" not in HERE.features:
        pytest.skip("wants AVX512 with VBMI")
    chosen = select(asked, HERE, context=EAGER)
    assert chosen.kernel.fixed_op
    before = by_rows(chosen)(slice(0, ROWS))
    uneven = DEFAULT.replaced(1, chunk_k=128).replaced(ROWS, chunk_k=512)
    monkeypatch.setattr(
        plans, "tuned_tables", lambda: dict.fromkeys(("bf16_decoded_float8", "bf16_decoded_int4"), uneven)
    )
    free = select(asked, HERE, force_kernel=chosen.kernel.name, context=CompileContext(Mode.EAGER))
    assert first_difference(by_rows(free), SOME) is not None
    assert first_difference(by_rows(chosen), SOME) is None
    assert torch.equal(by_rows(chosen)(slice(0, ROWS)), before)


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", kernels(), ids=lambda kernel: kernel.name)
def test_the_op_of_fixed_sums_takes_what_the_kernels_op_takes(each):
    if each.deterministic_op is not None:
        schemas = [str(each.overload(fixed)._schema).partition("(")[2] for fixed in (False, True)]
        assert schemas[0] == schemas[1]


@pytest.mark.parametrize("target", ["x86", "x86_vnni", "sm90", "gfx942"])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_a_kernel_that_cannot_is_refused_by_kind_and_one_that_can_is_not(scheme, target):
    asked = problem(scheme, 128, 256, scheme.activation.dtype if scheme.weight_only else torch.bfloat16, None, 5)
    try:
        verdicts = select(asked, named_target(target), context=GRAPH).verdicts
    except NoKernelError as error:
        verdicts = error.verdicts
    for verdict in verdicts:
        refused = any(unmet.kind is Kind.DETERMINISTIC for unmet in verdict.unmet)
        assert refused == (kernel(verdict.kernel).deterministic_op is None)


@pytest.mark.parametrize("target", ["x86", "x86_vnni", "sm90", "gfx942"])
@pytest.mark.parametrize("padding", ["auto", "always", "vllm"])
def test_there_is_one_kernel_and_one_plan_for_all_m(target, padding):
    for scheme in ALL_SCHEMES:
        out = scheme.activation.dtype if scheme.weight_only else torch.bfloat16
        found = set()
        for mode, m in itertools.product(Mode, (SizeRange.exactly(1), SizeRange.exactly(64), SizeRange(0, None))):
            context = CompileContext(mode, PaddingPolicy(padding), deterministic=True)
            asked = Problem(scheme, m, 130, 260, out, None, constant_weight=True)
            try:
                selection = select(asked, named_target(target), context=context)
            except NoKernelError:
                found.add(None)
            else:
                found.add((selection.kernel.name, selection.padding))
        assert len(found) == 1
        assert all(each is None or each[1] == Padding(each[1].n, each[1].k, rows=0) for each in found)


# --- whole layers -----------------------------------------------------------------------------------------------------

LAYERS = (
    "int8 per_token (dynamic) x int8 per_channel",
    "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel",
    "float8_e4m3fn per_group(32) (dynamic) x float8_e4m3fn per_block(16, 32)",
    "bfloat16 x int4 per_group(32)",
)


class Layers(nn.Module):
    """A linear of each scheme, side by side."""

    def __init__(self, schemes: Sequence[str] = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            fx_quant.QuantizedLinear.from_float(nn.Linear(192, 70, dtype=torch.bfloat16), text) for text in schemes
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_quantizes_and_multiplies_each_row_as_if_it_stood_alone(compiled):
    """One compile of all serves every m, so that all m have one kernel and one plan."""
    if HERE.platform != "cpu" or "avx512_vbmi" not in HERE.features:
        pytest.skip("wants AVX512 with VBMI")
    torch._dynamo.reset()
    model = run = Layers(LAYERS).eval()
    if compiled:
        run = torch.compile(model, backend="fx_quant", dynamic=True, options={"deterministic": True, "strict": True})
    x = torch.randn(ROWS, 192, dtype=torch.bfloat16)
    with torch.no_grad(), fx_quant.mode(deterministic=True):
        assert first_difference(lambda rows: run(x[rows]), EVERY) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, ";"), ({"deterministic": True}, ", deterministic;"), ({"padding": "never"}, ", with padding='never';")],
)
def test_what_is_left_for_the_options_says_so(options, words):
    """No kernel without AVX-512 decodes a weight; the source's own matmul promises nothing."""
    codes, scale = torch.randint(-128, 128, (70, 36), dtype=torch.int8), torch.rand(70, 1)
    source = trace(lambda x, w, s: x @ (w.float() * s).t(), torch.randn(5, 36), codes, scale)
    report = rewrite_graph(source, named_target("x86"), Options.parse(options), frozenset({1, 2}))
    (left,) = report.recognised
    assert left.reason == f"no kernel of x86 runs this scheme{words} the source's own steps stay"
    refused = [kernel for kernel, each in left.unmet.items() if any(u.kind is Kind.DETERMINISTIC for u in each)]
    assert bool(refused) == bool(options.get("deterministic"))


def test_explain_says_which_kernels_could_not():
    report = fx_quant.explain(
        Layers().eval(), torch.randn(5, 192, dtype=torch.bfloat16), options={"deterministic": True}
    )
    assert len(report.sites) == len(LAYERS)
    kinds = {unmet.kind for site in report.sites for each in site.unmet.values() for unmet in each}
    assert Kind.DETERMINISTIC in kinds
    assert fx_quant.Report.from_json(report.to_json()) == report
