"""The Inductor lowerings: what they compute, against the ops' bodies, and that what should be one kernel is one."""

from __future__ import annotations

import re
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fx_quant.lowerings  # noqa: F401  (registers the lowerings)
from fx_quant.kernels.registry import kernel

pytestmark = pytest.mark.usefixtures("uncached", "as_shipped")

fxq = torch.ops.fx_quant
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROWS = [7, 2, 5, 6, 13, 64]  # one dynamic compile; 0 and 1 are compiled for themselves
INF, NAN = float("inf"), float("nan")


def has(probe: str) -> bool:
    return getattr(torch.cpu, probe, lambda: False)()


needs_vnni = pytest.mark.skipif(not has("_is_vnni_supported"), reason="needs AVX512-VNNI")
needs_bf16 = pytest.mark.skipif(not has("_is_avx512_bf16_supported"), reason="needs AVX512-BF16")


def codes(rows: int, k: int, dtype: torch.dtype = torch.int8) -> Tensor:
    if dtype is torch.int8:
        return torch.randint(-128, 128, (rows, k), dtype=torch.int8)
    return torch.randn(rows, k).to(dtype)


def linear(name: str, w: Tensor):
    """``f(a, a_scale, b_scale, bias, out_dtype)`` through a kernel op, its weight packed in the graph."""
    k = kernel(name)

    def run(a, a_scale, b_scale, bias, out_dtype):
        a = a if k.a_dtype is None else a.to(k.a_dtype)
        packed = w.t() if k.layout is None else fxq.prepack([w], [k.layout])[0]
        return k.overload()(a, packed, a_scale, b_scale, bias, w.shape[0], out_dtype)

    return run


def dynamic_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)


def kernels_of(code: list[str]) -> list[str]:
    """Names of the C++ kernels that the generated code calls, in order."""
    (source,) = code
    call = source[source.index("def call") :]
    return re.findall(
        r"^ +(?:\w+ = )?(cpp_\w+|extern_kernels\.\w+|torch\.ops\.(?!fx_quant\.prepack)[\w.]+)\(", call, re.MULTILINE
    )


# --- the int8 template is the canonical op, bit for bit -----------------------------------------------------------


@needs_vnni
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [([(1, 1), (15, 3), (64, 4), (200, 129), (128, 64)], [*ROWS, 400]), ([(65, 7)], [7, 0, 1])],
)
def test_int8_accumulator_is_exact(sizes, rows):
    """All sizes ``(n, k)`` in one graph."""
    weights = [codes(n, k) for n, k in sizes]
    linears = [linear("cpu_int8_vnni", w) for w in weights]

    @torch.compile
    def run(given):
        return [each(a, None, None, None, torch.int32) for each, a in zip(linears, given, strict=True)]

    for m in rows:
        given = [codes(m, k) for _, k in sizes]
        if m > 1:
            dynamic_rows(*given)
        for out, a, w in zip(run(given), given, weights, strict=True):
            assert torch.equal(out, (a.long() @ w.t().long()).int()), (m, w.shape)


@needs_vnni
def test_what_nothing_is_fused_into_is_compiled_once_for_all_sizes():
    weights = [codes(70, 64), codes(64, 96), codes(130, 200)]
    linears = [linear("cpu_int8_vnni", w) for w in weights]

    def run(given):
        return [each(a, None, None, None, torch.int32) for each, a in zip(linears, given, strict=True)]

    # The last one's rows are further apart than they are long.
    given = [codes(5, 64), codes(5, 96), codes(5, 260)[:, :200]]
    outs, (source,) = run_and_get_code(torch.compile(run), given)
    for out, a, w in zip(outs, given, weights, strict=True):
        assert torch.equal(out, (a.long() @ w.t().long()).int())
    written = re.findall(r"cpp_pybinding\(.*?(?:'{3}|\"{3})(.*?)(?:'{3}|\"{3})", source, re.DOTALL)
    assert len([text for text in written if "fxq_tile" in text]) == 2
    assert len(kernels_of([source])) == 3


@needs_vnni
def test_int8_epilogue_is_the_canonical_op():
    """All in one graph, each of another number of columns: no kernel has the epilogue of another."""
    cases = [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ]
    weights = [codes(70 + i, 129) for i in range(len(cases))]
    linears = [linear("cpu_int8_vnni", w) for w in weights]
    scales = [torch.rand(len(w)) for w in weights]
    biases = [None if dtype is None else torch.randn(70 + i, dtype=dtype) for i, (_, dtype) in enumerate(cases)]

    @torch.compile
    def run(a, a_scale, scales, biases):
        return [
            each(a, a_scale, scale, bias, out_dtype)
            for each, scale, bias, (out_dtype, _) in zip(linears, scales, biases, cases, strict=True)
        ]

    for m in (7, 13):
        a, a_scale = codes(m, 129), torch.rand(m, 1) * 1e-3
        dynamic_rows(a, a_scale)
        outs = run(a, a_scale, scales, biases)
        for out, w, scale, bias, case in zip(outs, weights, scales, biases, cases, strict=True):
            assert torch.equal(out, fxq.scaled_mm(a, w.t(), a_scale, scale, bias, case[0])), (m, case)


@needs_vnni
def test_int8_scales_of_every_shape():
    """All in one graph, each of another number of columns: no kernel has the epilogue of another."""
    shapes = [((), ()), ((1,), (1, 71)), ((7, 1), ()), (None, (73,)), ((7, 1), None)]
    a, weights = codes(7, 9), [codes(70 + i, 9) for i in range(len(shapes))]
    linears = [linear("cpu_int8_vnni", w) for w in weights]
    scales = [[None if shape is None else torch.rand(shape) for shape in both] for both in shapes]

    @torch.compile
    def run(a, scales):
        return [each(a, *both, None, torch.float32) for each, both in zip(linears, scales, strict=True)]

    for out, w, both, shape in zip(run(a, scales), weights, scales, shapes, strict=True):
        assert torch.equal(out, fxq.scaled_mm(a, w.t(), *both, None, torch.float32)), shape


@needs_vnni
def test_int8_extreme_codes_and_scales():
    k = 131071
    w, a = torch.full((65, k), -128, dtype=torch.int8), torch.full((7, k), -128, dtype=torch.int8)
    a[1], a[2, ::2] = 127, 127
    a_scale = torch.tensor([1.0, 1e-30, 0.0, NAN, INF, -INF, 1e30]).unsqueeze(1)
    b_scale = torch.rand(65)
    b_scale[:4] = torch.tensor([0.0, NAN, INF, 1e30])
    expected = fxq.scaled_mm(a, w.t(), a_scale, b_scale, None, torch.float32)
    out = torch.compile(linear("cpu_int8_vnni", w))(a, a_scale, b_scale, None, torch.float32)
    assert torch.equal(out.nan_to_num(nan=-12345.0), expected.nan_to_num(nan=-12345.0))
    assert out.isnan().any()
    assert out.isinf().any()


@needs_vnni
def test_int8_activation_of_any_strides():
    w, big = codes(70, 10), codes(14, 20)
    run = linear("cpu_int8_vnni", w)
    layouts = {
        "offset": big[3:10, 5:15],
        "columns": big[:7, :10],
        "transposed": codes(10, 7).t(),
        "every other": big[::2, ::2],
    }

    @torch.compile
    def each(given):
        return {name: run(a, None, None, None, torch.int32) for name, a in given.items()}

    for name, out in each(layouts).items():
        assert torch.equal(out, (layouts[name].long() @ w.t().long()).int()), name


@needs_vnni
def test_int8_activation_is_a_view_made_in_the_graph():
    w, x = codes(70, 10), codes(14, 20)
    run = linear("cpu_int8_vnni", w)

    def sliced(x):
        return run((x + 1)[3:10, 5:15], None, None, None, torch.int32)

    assert torch.equal(torch.compile(sliced)(x), sliced(x))


@needs_vnni
@pytest.mark.parametrize(("threads", "m", "n"), [(1, 40, 65), (2, 1, 65), (3, 40, 640), (8, 40, 65)])
def test_int8_with_any_number_of_threads(threads, m, n):
    w, a = codes(n, 9), codes(m, 9)
    with torch._inductor.config.patch({"cpp.threads": threads}):
        out = torch.compile(linear("cpu_int8_vnni", w))(a, None, None, None, torch.int32)
    assert torch.equal(out, (a.long() @ w.t().long()).int())


# --- float8 against float64 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param("cpu_float8_bf16", marks=needs_bf16), pytest.param("cpu_float8_float32")]
)
def test_float8_is_within_float32_summation_of_float64(name):
    """All pairs of dtypes in one graph."""
    pairs = [(E4M3, E4M3, 200, 129), (E5M2, E4M3, 65, 7), (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, 15, 64)]
    operands = [(codes(n, k, w_dtype), torch.rand(n), torch.randn(n)) for _, w_dtype, n, k in pairs]
    linears = [linear(name, w) for w, _, _ in operands]

    @torch.compile
    def run(given, operands):
        each = zip(linears, given, operands, strict=True)
        return [run(*of_a, b_scale, bias, torch.float32) for run, of_a, (_, b_scale, bias) in each]

    for m in (7, 64):
        given = [(codes(m, k, a_dtype), torch.rand(m, 1)) for a_dtype, _, _, k in pairs]
        for of_a in given:
            dynamic_rows(*of_a)
        for out, (a, a_scale), (w, b_scale, bias) in zip(run(given, operands), given, operands, strict=True):
            exact = (a.double() @ w.double().t()) * a_scale * b_scale + bias
            # k + 4 roundings, each of at most 2**-24 of the sum of magnitudes.
            magnitude = (a.double().abs() @ w.double().abs().t()) * a_scale * b_scale + bias.abs()
            assert ((out - exact).abs() <= magnitude * (a.shape[1] + 4) * 2.0**-24).all(), (a.dtype, w.dtype)


@needs_bf16
def test_float8_extreme_codes():
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(E5M2)
    every = every[every.float().isfinite()]
    w = torch.eye(len(every)).to(E5M2)
    out = torch.compile(linear("cpu_float8_bf16", w))(every[None], None, None, None, torch.float32)
    assert torch.equal(out[0], every.float())


# --- fusion -------------------------------------------------------------------------------------------------------


@needs_vnni
def test_scales_bias_cast_and_what_follows_are_one_kernel():
    w = codes(200, 64)
    run = linear("cpu_int8_vnni", w)

    def block(a, a_scale, b_scale, bias, residual):
        return F.gelu(run(a, a_scale, b_scale, bias, torch.float32)) + residual

    arguments = (codes(7, 64), torch.rand(7, 1) * 1e-3, torch.rand(200), torch.randn(200), torch.randn(7, 200))
    out, code = run_and_get_code(torch.compile(block), *arguments)
    torch.testing.assert_close(out, block(*arguments))
    (name,) = kernels_of(code)
    assert "cpu_int8_vnni" in name
    assert "gelu" in name


@needs_vnni
def test_a_three_dimensional_output_is_still_one_kernel():
    w = codes(128, 64)
    run = linear("cpu_int8_vnni", w)

    def block(a, a_scale, residual):
        y = run(a.view(-1, 64), a_scale.view(-1, 1), None, None, torch.bfloat16)
        return y.view(2, 5, 128) + residual

    arguments = (codes(10, 64).view(2, 5, 64), torch.rand(2, 5, 1), torch.randn(2, 5, 128))
    out, code = run_and_get_code(torch.compile(block), *arguments)
    # bfloat16 between the product and the sum is a rounding that Inductor may skip.
    torch.testing.assert_close(out, block(*arguments), rtol=2**-7, atol=1e-2)
    assert len(kernels_of(code)) == 1


@needs_vnni
def test_an_accumulator_with_two_uses_is_right_in_both():
    w = codes(70, 64)
    run = linear("cpu_int8_vnni", w)

    def both(a):
        acc = run(a, None, None, None, torch.int32)
        return acc, acc.float() * 0.5, acc.amax(-1)

    a = codes(7, 64)
    for compiled, eager in zip(torch.compile(both)(a), both(a), strict=True):
        assert torch.equal(compiled, eager)


@needs_vnni
def test_rms_norm_and_quantize_are_one_kernel_and_the_matmul_another():
    w, norm = codes(128, 64), torch.rand(64)
    run = linear("cpu_int8_vnni", w)

    def block(x, residual):
        x = x + residual
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
        q, scale = fxq.quantize.dynamic(x, **formula())
        return run(q, scale, None, None, torch.float32) + 1, q, scale

    x, residual = torch.randn(7, 64), torch.randn(7, 64)
    (out, q, scale), code = run_and_get_code(torch.compile(block), x, residual)
    assert len(kernels_of(code)) == 2
    assert torch.equal(out, fxq.scaled_mm(q, w.t(), scale, None, None, torch.float32) + 1)
    torch.testing.assert_close(scale, block(x, residual)[2])


@needs_bf16
def test_float8_epilogue_is_one_kernel():
    w = codes(200, 64, E4M3)
    run = linear("cpu_float8_bf16", w)

    def block(a, a_scale):
        return run(a, a_scale, None, None, torch.float32).relu()

    arguments = (codes(7, 64, torch.int8).to(torch.bfloat16), torch.rand(7, 1))
    out, code = run_and_get_code(torch.compile(block), *arguments)
    torch.testing.assert_close(out, block(*arguments))
    assert len(kernels_of(code)) == 1


# --- quantize -----------------------------------------------------------------------------------------------------


def formula(dtype: torch.dtype = torch.int8, **changes: object) -> dict[str, object]:
    high = 127.0 if dtype is torch.int8 else 255.0 if dtype is torch.uint8 else torch.finfo(dtype).max
    low = 0.0 if dtype is torch.uint8 else -high
    arguments = {
        "dtype": dtype,
        "granularity": "per_token",
        "divisor": high,
        "divide_dtype": torch.float32,
        "floor": 1e-5,
        "floor_on": "scale",
        "scale_dtype": torch.float32,
        "reciprocal": False,
        "lo": low,
        "hi": high,
    }
    return {**arguments, **changes}


FORMULAS = {
    "int8": formula(),
    "int8, as torchao": formula(divisor=127.5, lo=-128.0, scale_dtype=torch.bfloat16, reciprocal=True),
    "int8, divided in bfloat16": formula(divide_dtype=torch.bfloat16),
    "int8, no floor": formula(floor_on="none"),
    "uint8 per tensor": formula(torch.uint8, granularity="per_tensor", floor_on="amax"),
    "e4m3": formula(E4M3, floor=1e-12, floor_on="amax"),
    "e5m2 per tensor": formula(E5M2, granularity="per_tensor", divide_dtype=torch.float16, reciprocal=True),
    "e4m3fnuz": formula(torch.float8_e4m3fnuz),
}


def rows_of_all_sizes(dtype: torch.dtype) -> Tensor:
    """Rows from 1e-3 to 1e3, one of them zero, of a width that is no multiple of a vector."""
    x = torch.randn(17, 131) * torch.logspace(-3, 3, 17)[:, None]
    x[3] = 0
    return x.to(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, of: object = "") -> None:
    assert actual.dtype == expected.dtype, of
    assert actual.stride() == expected.stride(), of
    assert torch.equal(actual[..., None].view(torch.uint8), expected[..., None].view(torch.uint8)), of


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_the_op_bit_for_bit(x_dtype):
    """All formulas in one graph, each with another number of rows, so that each has loops of its own."""
    x, every_scale = rows_of_all_sizes(x_dtype), torch.rand(17 + len(FORMULAS), 1)
    inputs = {name: (torch.cat((x, x[:i])), every_scale[: 17 + i]) for i, name in enumerate(FORMULAS)}

    def all_of(inputs):
        outs = {}
        for name, (x, scale) in inputs.items():
            given = {key: FORMULAS[name][key] for key in ("dtype", "reciprocal", "lo", "hi")}
            outs[name] = (*fxq.quantize.dynamic(x, **FORMULAS[name]), fxq.quantize(x, scale, **given))
        return outs

    outs, expected = torch.compile(all_of)(inputs), all_of(inputs)
    for name, arguments in FORMULAS.items():
        compiled, eager = outs[name], expected[name]
        if not arguments["dtype"].is_floating_point and arguments["granularity"] == "per_token":
            # Integer codes under a scale of zero are unspecified.
            rows = (eager[1] != 0).squeeze(1)
            compiled, eager = ((codes[rows], *rest) for codes, *rest in (compiled, eager))
        for one, other in zip(compiled, eager, strict=True):
            assert_same_bits(one, other, name)


TINY_AND_HUGE = [{}, {"floor_on": "amax"}, {"floor_on": "none"}, {"floor": 1e-43}, {"lo": -128.0}]


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_codes_of_tiny_and_of_huge_values_are_the_op(granularity):
    """All formulas in one graph, each with another number of columns, so that each has loops of its own."""
    formulas = [formula(granularity=granularity, **changes) for changes in TINY_AND_HUGE]
    # Powers of two from subnormal to the largest, and small multiples of the least number, whose quotients are coarse.
    powers = torch.ldexp(torch.randn(278, 131), torch.arange(-149, 129)[:, None])
    multiples = torch.randint(-200, 200, (40, 131)).float() * 2.0**-149
    rows = torch.cat((powers.clamp(-3.4e38, 3.4e38), multiples))

    def quantize(inputs):
        return [fxq.quantize.dynamic(x, **arguments) for x, arguments in zip(inputs, formulas, strict=True)]

    compiled = torch.compile(quantize)
    for x in (rows,) if granularity == "per_token" else (powers[140:141], powers[20:21], multiples[3:4]):
        inputs = [torch.cat((x, x[:, :i]), 1) for i in range(len(formulas))]
        for (codes, scale), (codes_eager, scale_eager), changes in zip(
            compiled(inputs), quantize(inputs), TINY_AND_HUGE, strict=True
        ):
            assert_same_bits(scale, scale_eager, changes)
            used = (scale != 0).expand_as(codes)
            assert torch.equal(codes[used], codes_eager[used]), changes


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_quantize_of_nan_and_infinity_is_the_op(dtype):
    x = rows_of_all_sizes(torch.float32)
    x[5, 7], x[6, 9], x[7, 0] = NAN, INF, -INF
    arguments = formula(dtype)

    def quantize(x):
        return fxq.quantize.dynamic(x, **arguments)

    (q, scale), (q_eager, scale_eager) = torch.compile(quantize)(x), quantize(x)
    assert_same_bits(scale.nan_to_num(), scale_eager.nan_to_num())
    # Where the scale is not finite, integer codes are unspecified: no product with it depends on them.
    rows = scale.isfinite().squeeze(1) if dtype is torch.int8 else slice(None)
    assert torch.equal(q[rows].float().nan_to_num(nan=-1e6), q_eager[rows].float().nan_to_num(nan=-1e6))


def test_rows_with_nan_or_infinity_stay_not_finite_after_the_product():
    x, w = rows_of_all_sizes(torch.float32), torch.randint(-127, 128, (8, 200), dtype=torch.int8)
    x[5, 7], x[6, 9], x[7, 0] = NAN, INF, -INF
    arguments = formula(torch.int8)

    def linear(x):
        codes, scale = fxq.quantize.dynamic(x, **arguments)
        return fxq.scaled_mm(codes, w[:, : x.shape[1]].t(), scale, torch.ones(8), None, torch.float32)

    compiled, eager = torch.compile(linear)(x), linear(x)
    assert not compiled[5:8].isfinite().any()
    others = [row for row in range(len(x)) if row not in (5, 6, 7)]
    assert_same_bits(compiled[others], eager[others])


def test_quantize_of_a_transposed_tensor_is_contiguous():
    x = rows_of_all_sizes(torch.float32).t()
    q, _ = torch.compile(lambda x: fxq.quantize.dynamic(x, **formula()))(x)
    assert_same_bits(q, fxq.quantize.dynamic(x, **formula())[0])


# --- the others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["canonical", "pytorch_int_mm"])
def test_int_mm_has_its_epilogue_fused_behind_it(name):
    w, a, a_scale, b_scale, bias = codes(64, 32), codes(7, 32), torch.rand(7, 1), torch.rand(64), torch.randn(64)

    def canonical(a, a_scale, b_scale, bias, out_dtype):
        return fxq.scaled_mm(a, w.t(), a_scale, b_scale, bias, out_dtype)

    run = canonical if name == "canonical" else linear(name, w)
    arguments = (a, a_scale, b_scale, bias, torch.float32)
    out, code = run_and_get_code(torch.compile(run), *arguments)
    assert torch.equal(out, canonical(*arguments))
    assert [name.partition("_")[0] for name in kernels_of(code)] == ["extern", "cpp"]


def test_canonical_float8_runs_its_body():
    w, a = codes(64, 32, E4M3), codes(7, 32, E4M3)

    def run(a, w):
        return fxq.scaled_mm(a, w.t(), None, None, None, torch.float32)

    torch.testing.assert_close(torch.compile(run)(a, w), run(a, w))


@pytest.mark.parametrize("name", ["cpu_int8_vnni", "cpu_float8_bf16"])
def test_a_machine_without_the_instruction_runs_the_body(name):
    dtype = torch.int8 if "int8" in name else E4M3
    w, a = codes(70, 9, dtype), codes(7, 9, dtype)
    with patch("fx_quant.lowerings.cpu_template.pick_vec_isa", return_value=False):
        out, code = run_and_get_code(torch.compile(linear(name, w)), a, None, None, None, torch.float32)
    torch.testing.assert_close(out, linear(name, w)(a, None, None, None, torch.float32))
    assert f"torch.ops.fx_quant.{name}.default" in kernels_of(code)


@needs_vnni
def test_an_activation_between_matmul_and_quantize_is_computed_once():
    w = codes(128, 64)
    run = linear("cpu_int8_vnni", w)

    def block(a, a_scale, bias):
        return fxq.quantize.dynamic(F.gelu(run(a, a_scale, None, bias, torch.float32)), **formula())

    arguments = (codes(7, 64), torch.rand(7, 1) * 1e-3, torch.randn(128))
    (_, scale), code = run_and_get_code(torch.compile(block), *arguments)
    torch.testing.assert_close(scale, block(*arguments)[1])
    matmul, quantize = kernels_of(code)
    assert "cpu_int8_vnni" in matmul
    (definition,) = re.findall(rf"^{quantize} = (.*?)^'''", code[0], re.MULTILINE | re.DOTALL)
    assert "erf" not in definition


@pytest.mark.parametrize("reciprocal", [False, True])
def test_a_scale_that_freezing_makes_a_number_is_still_a_scale(reciprocal):
    class Static(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.03))

        def forward(self, x):
            return torch.ops.fx_quant.quantize(
                x, self.scale, dtype=torch.int8, reciprocal=reciprocal, lo=-128.0, hi=127.0
            )

    model, x = Static().eval(), torch.linspace(-5, 5, 97).reshape(1, 97)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch._dynamo.reset()
        codes = torch.compile(model, backend="fx_quant")(x)
    assert torch.equal(codes, model(x))
