"""``Fp8LinearOp``: the seed's semantics, against float64, and its padding on machines that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fx_quant.linear_kernels.fp8_linear
from fx_quant.errors import FxQuantError, NoKernelError
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.padding import SCALED_MM_ROWS, Padding
from fx_quant.kernels.registry import KERNEL_SCHEMA, Kernel, Requires, fake_kernel
from fx_quant.layers.activation import quantize_activation
from fx_quant.linear_kernels.fp8_linear import Fp8LinearOp
from fx_quant.ops import MATMUL_TAGS, dequantize, register
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import named_target
from tests.tolerances import assert_within

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
M, N, K = 5, 24, 48
TOKEN = OperandSpec(E4M3, Granularity.PER_TOKEN, dynamic=True)
TENSOR = OperandSpec(E4M3, Granularity.PER_TENSOR, dynamic=True)
STATIC = OperandSpec(E4M3, Granularity.PER_TENSOR)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def weight(n: int = N, k: int = K) -> Tensor:
    """``[k, n]``, column by column, as the seed has it."""
    b = torch.randn(n, k).to(E4M3).t()
    torch._dynamo.mark_static(b)  # torch 2.11 makes the sizes of buffers symbolic too
    return b


def reference(codes: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype) -> Tensor:
    """In float64, then rounded to ``dtype``."""
    out = (codes.double() @ b.double()) * a_scale.double() * b_scale.double().reshape(1, -1)
    return (out if bias is None else out + bias.double()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [None, torch.randn(N)], ids=["none", "bias"])
@pytest.mark.parametrize("b_scale", [torch.tensor(0.01), torch.tensor([0.02]), torch.rand(N) / 50 + 0.01])
@pytest.mark.parametrize("spec", [TOKEN, TENSOR, STATIC], ids=["per_token", "per_tensor", "static"])
def test_it_is_the_float64_product(spec, b_scale, bias, dtype):
    op, b, x = Fp8LinearOp(spec.granularity == Granularity.PER_TOKEN), weight(), torch.randn(2, M, K).to(dtype)
    scale = None if spec.dynamic else torch.tensor([0.01])
    codes, a_scale, _ = quantize_activation(x.reshape(-1, K), spec, scale)
    expected = reference(codes, b, a_scale, b_scale, bias, dtype).reshape(2, M, N)
    assert_within(op.apply(x, b, b_scale, input_scale=scale, bias=bias), expected, Numerics.SAME_ACCUM)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (1, N)])
def test_the_scale_of_the_columns_may_be_a_row_or_a_column(shape):
    op, b, b_scale, x = Fp8LinearOp(True), weight(), torch.rand(N), torch.randn(M, K)
    assert torch.equal(op.apply(x, b, b_scale.reshape(shape)), op.apply(x, b, b_scale))


def test_the_layout_of_the_weight_changes_nothing():
    op, b, x = Fp8LinearOp(), weight(), torch.randn(M, K)
    assert torch.equal(op.apply(x, b, torch.tensor(0.1)), op.apply(x, b.contiguous(), torch.tensor(0.1)))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("per_call", [True, False, None])
def test_a_call_overrules_the_op(own, per_call):
    b, x, scale = weight(), torch.randn(M, K) * torch.logspace(-3, 3, M)[:, None], torch.tensor(0.1)
    per_token = own if per_call is None else per_call
    codes, a_scale, _ = quantize_activation(x, TOKEN if per_token else TENSOR)
    out = Fp8LinearOp(own).apply(x, b, scale, use_per_token_if_dynamic=per_call)
    assert_within(out, reference(codes, b, a_scale, scale, None, x.dtype), Numerics.SAME_ACCUM)


def test_a_given_scale_is_static_whatever_is_said_of_dynamic_ones():
    b, x, scale = weight(), torch.randn(M, K), torch.tensor(0.5)
    out = Fp8LinearOp(True).apply(x, b, torch.tensor(1.0), input_scale=scale)
    assert torch.equal(out, Fp8LinearOp(False).apply(x, b, torch.tensor(1.0), input_scale=scale))


def test_input_scale_ub_bounds_the_scale_of_a_row():
    b, x, bound = weight(), torch.randn(M, K), torch.tensor([0.5])
    codes, a_scale, _ = quantize_activation(x, TOKEN, scale_ub=bound)
    assert (a_scale <= 0.5 / 448).all()
    out = Fp8LinearOp(True).apply(x, b, torch.tensor(1.0), input_scale_ub=bound)
    assert_within(out, reference(codes, b, a_scale, torch.tensor(1.0), None, x.dtype), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(
    "scale", [torch.tensor(0.3), torch.full((1, 1), 0.3), torch.rand(2 * M, 1)], ids=["one", "one of 1 x 1", "rows"]
)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_taken_as_they_are(out_dtype, scale, dtype):
    b, codes = weight(), torch.randn(2, M, K).to(dtype)
    out = Fp8LinearOp().apply(codes, b, torch.tensor(0.1), out_dtype, input_scale=scale)
    expected = reference(codes.reshape(-1, K), b, scale, torch.tensor(0.1), None, out_dtype)
    assert_within(out, expected.reshape(2, M, N), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 3, 4, K)])
@pytest.mark.parametrize("per_token", [True, False])
def test_rank_and_dtype_are_kept(per_token, shape):
    x = torch.randn(shape, dtype=torch.bfloat16)
    out = Fp8LinearOp(per_token).apply(x, weight(), torch.tensor(0.1))
    assert out.shape == (*shape[:-1], N) and out.dtype is torch.bfloat16
    assert Fp8LinearOp(per_token).apply(x, weight(), torch.tensor(0.1), torch.float32).dtype is torch.float32


def test_gradients_are_refused():
    with torch.enable_grad():
        out = Fp8LinearOp().apply(torch.randn(M, K, requires_grad=True), weight(), torch.tensor(0.1))
        with pytest.raises(FxQuantError, match="for inference"):
            out.sum().backward()


def test_a_forced_kernel():
    with pytest.raises(NoKernelError, match="forced kernel 'cpu_int8_vnni' cannot run"):
        Fp8LinearOp(force_kernel="cpu_int8_vnni").apply(torch.randn(M, K), weight(), torch.tensor(0.1))


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_compiled_it_gives_the_eager_result(per_token, pad):
    op, b, b_scale = Fp8LinearOp(per_token, pad), weight(), torch.rand(N)
    torch._dynamo.mark_static(b_scale)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def call(x: Tensor) -> Tensor:
        return op.apply(x, b, b_scale)

    seen = torch.compile(call, backend=backend, dynamic=True)
    for m in (3, 16, 17, 30):
        x = torch.randn(m, K)
        assert_within(seen(x), call(x), Numerics.SAME_ACCUM)
    assert len(graphs) == 1
    assert ("pad(" in graphs[0].print_readable(print_output=False)) == (pad is True)


class Layer(nn.Module):
    """The op with its weight; a plain tensor of ``dynamic=True`` would have symbolic n and k."""

    def __init__(self, op: Fp8LinearOp) -> None:
        super().__init__()
        self.op = op
        self.register_buffer("weight", weight())
        self.register_buffer("weight_scale", torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.op.apply(x, self.weight, self.weight_scale)


@pytest.mark.parametrize("pad", [None, True])
def test_the_backend_compiles_it(pad):
    layer = Layer(Fp8LinearOp(True, pad))
    compiled = torch.compile(layer, backend="fx_quant", dynamic=True, options={"strict": True})
    for m in (3, 30):
        x = torch.randn(m, K)
        assert_within(compiled(x), layer(x), Numerics.SAME_ACCUM)


# --- padding, on machines that are not here -----------------------------------------------------------------------


def plan(target: str, pad: bool | None, monkeypatch, *, rows: bool = True) -> Padding:
    monkeypatch.setattr(fx_quant.linear_kernels.fp8_linear, "target_of", lambda device: named_target(target))
    dtype = torch.float8_e4m3fnuz if target == "gfx942" else E4M3
    codes, b = torch.zeros(M, K, dtype=dtype), torch.zeros(K, N, dtype=dtype)
    a_scale, b_scale = (torch.ones(M, 1), torch.ones(N)) if rows else (torch.ones(()), torch.ones(1))
    selected = Fp8LinearOp(pad_output=pad).selection(codes, a_scale, b, b_scale, None, torch.bfloat16)
    return selected.padding


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(
    ("target", "planned"), [("sm89", 17), ("sm90", 17), ("sm100", 17), ("gfx942", 0), ("gfx950", 0), ("x86_vnni", 0)]
)
def test_none_pads_as_the_kernel_wants(target, planned, rows, monkeypatch):
    assert plan(target, None, monkeypatch, rows=rows).rows == planned


@pytest.mark.parametrize(("target", "rows"), [("sm90", 17), ("gfx942", 0), ("gfx950", 0), ("x86_vnni", 17)])
def test_true_pads_everywhere_but_on_rocm(target, rows, monkeypatch):
    assert plan(target, True, monkeypatch).rows == rows


@pytest.mark.parametrize("target", ["sm90", "gfx942", "x86_vnni"])
def test_false_never_pads_rows(target, monkeypatch):
    without = plan(target, False, monkeypatch)
    assert without.rows == 0
    assert (without.n, without.k) == (32 if target != "x86_vnni" else N, K)


_BODY: list = []


def _latest(*args, **kwargs) -> Tensor:
    (body,) = _BODY
    return body(*args, **kwargs)


def fake(body) -> Kernel:
    """A kernel of ``body`` that is not in the registry: it aligns to 16 and wants 17 rows."""
    _BODY[:] = [body]
    if not hasattr(torch.ops.fx_quant, "fp8_linear_test"):
        register(f"fp8_linear_test{KERNEL_SCHEMA}", _latest, fake_kernel("test"), MATMUL_TAGS)
    return Kernel("test", "test", "fp8_linear_test", Requires(align=16), Numerics.SAME_ACCUM, "", least_rows=17)


@pytest.fixture
def picky():
    """A kernel that records its operands and, like row-wise ``torch._scaled_mm``, wants a scale for every row."""
    seen: list[dict] = []

    def body(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
        assert a_scale.numel() == 1 or a_scale.shape == (a.shape[0], 1)
        assert b_scale.numel() == 1 or b_scale.numel() == n == b.shape[1]
        assert a.shape[1] == b.shape[0]
        seen.append({"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "bias": bias})
        return dequantize(a.float() @ b.float(), a_scale, b_scale, bias, out_dtype)

    return fake(body), seen


@pytest.mark.parametrize("m", [1, 5, 16, 17, 20])
@pytest.mark.parametrize("per_token", [True, False])
def test_padded_rows_have_finite_scales_and_are_cut_off(per_token, m, picky):
    kernel, seen = picky
    b, x, bias = weight(30, 50), torch.randn(m, 50), torch.randn(30)
    b_scale = torch.rand(30)
    spec = TOKEN if per_token else TENSOR
    codes, a_scale, _ = quantize_activation(x, spec)
    op = Fp8LinearOp(per_token, pad_output=True)
    selected = op.selection(codes, a_scale, b, b_scale, bias, torch.float32)
    selected = replace(selected, kernel=kernel, padding=Padding(32, 64, SCALED_MM_ROWS))
    out = run_kernel(selected, codes, b.t(), a_scale, b_scale, bias)
    assert_within(out, reference(codes, b, a_scale, b_scale, bias, torch.float32), Numerics.SAME_ACCUM)
    assert out.shape == (m, 30) and out.is_contiguous()
    (given,) = seen
    assert given["a"].shape == (max(m, 17), 64) and given["b"].shape == (64, 32)
    assert given["a_scale"].shape == ((max(m, 17), 1) if per_token else ())
    assert given["a_scale"].isfinite().all() and (given["a_scale"] > 0).all()
    assert torch.equal(given["a"][m:].float(), torch.zeros(max(m, 17) - m, 64))
    assert torch.equal(given["b_scale"][30:], torch.ones(2)) and torch.equal(given["bias"][30:], torch.zeros(2))
    assert not given["b"].float()[50:].any() and not given["b"].float()[:, 30:].any()


def test_a_padded_weight_is_padded_once_and_again_when_it_changes(picky):
    kernel, seen = picky
    b, codes, one = weight(30, 50), torch.randn(4, 50).to(E4M3), torch.tensor(1.0)
    selected = Fp8LinearOp().selection(codes, one, b, one, None, torch.float32)
    selected = replace(selected, kernel=kernel, padding=Padding(32, 64))
    for _ in range(2):
        run_kernel(selected, codes, b.t(), one, one, None)
    assert seen[0]["b"].data_ptr() == seen[1]["b"].data_ptr()
    b.copy_(weight(30, 50))
    out = run_kernel(selected, codes, b.t(), one, one, None)
    assert_within(out, reference(codes, b, one, one, None, torch.float32), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("m", [1, 4])
def test_block_scales_grow_with_rows_and_columns(m):
    got = {}

    def body(a, b, a_scale, b_scale, bias, n, out_dtype, *, block=None, **_) -> Tensor:
        got.update(a_scale=a_scale, b_scale=b_scale)
        return torch.ops.fx_quant.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, block=block)

    kernel = fake(body)
    codes, b = torch.randn(m, 24).to(E4M3), weight(20, 24)
    a_scale, b_scale = torch.rand(m, 3), torch.rand(3, 3)
    one = torch.ones(())
    selected = Fp8LinearOp().selection(codes, one, b, one, None, torch.float32)
    scheme = Scheme.parse("float8_e4m3fn per_group(8) x float8_e4m3fn per_block(8, 8)")
    selected = replace(selected, problem=replace(selected.problem, scheme=scheme), kernel=kernel)
    out = run_kernel(replace(selected, padding=Padding(32, 32, 17)), codes, b.t(), a_scale, b_scale, None)
    expected = torch.ops.fx_quant.scaled_mm(codes, b, a_scale, b_scale, None, torch.float32, block=[8, 8])
    assert_within(out, expected, Numerics.SAME_ACCUM)
    assert got["a_scale"].shape == (17, 4) and got["b_scale"].shape == (4, 4)


# --- errors -------------------------------------------------------------------------------------------------------

X, B, ONE = torch.randn(M, K), weight(), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": B.float()}, r"weight must be float8 \[k, n\], got float32 \[48, 24\]"),
        ({"weight": B[0]}, r"weight must be float8 \[k, n\], got float8_e4m3fn \[24\]"),
        ({"input": X[:, 1:]}, r"input must end in k = 48, the rows of weight \[48, 24\], got \[5, 47\]"),
        ({"input": torch.tensor(1.0)}, r"input must end in k = 48.* got \[\]"),
        ({"input": X.double()}, "input must be float32, bfloat16, float16 or float8, got float64"),
        ({"weight_scale": torch.ones(K)}, r"weight_scale must be float of one element, \[n\] = \[24\].* \[48\]"),
        ({"weight_scale": torch.tensor(1)}, r"got int64 \[\]"),
        ({"weight_scale": torch.ones(4, 6)}, r"got float32 \[4, 6\]"),
        ({"out_dtype": torch.int32}, "out_dtype must be float32, bfloat16 or float16, got torch.int32"),
        ({"bias": torch.ones(K)}, r"bias must be .* of shape \[n\] = \[24\], got float32 \[48\]"),
        ({"input_scale": torch.ones(M, 1)}, r"needs an input scale of one float, got float32 \[5, 1\]"),
        ({"input_scale_ub": ONE}, "scale_ub bounds dynamic per_token float8 scales"),
        ({"input": X.to(E4M3), "out_dtype": torch.float32}, "float8 input needs its float input_scale.* got none"),
        ({"input": X.to(E4M3), "input_scale": ONE}, "float8 input needs an out_dtype"),
        (
            {"input": X.to(E4M3), "input_scale": torch.ones(M), "out_dtype": torch.float32},
            r"one element or \[m, 1\] = \[5, 1\], got float32 \[5\]",
        ),
        (
            {"input": X.to(E4M3), "input_scale": ONE, "input_scale_ub": ONE, "out_dtype": torch.float32},
            "float8 input is quantized already, got an input_scale_ub",
        ),
    ],
)
def test_operands_that_do_not_fit_are_one_clear_error(given, message):
    with pytest.raises(ValueError, match=message):
        Fp8LinearOp().apply(**{"input": X, "weight": B, "weight_scale": ONE, **given})
