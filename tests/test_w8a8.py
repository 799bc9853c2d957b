"""vLLM's functions of given float8 codes and its probes: against float64, on this machine and on some that are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fx_quant.kernels.cutlass
import fx_quant.kernels.rocm
import fx_quant.linear_kernels as lk
import fx_quant.linear_kernels.fp8_linear
import fx_quant.linear_kernels.w8a8 as w8a8
from fx_quant.errors import NoKernelError, UnknownNameError
from fx_quant.kernels.select import DISABLED_VARIABLE
from fx_quant.scheme import Granularity, Numerics, OperandSpec
from fx_quant.target import named_target
from tests.tolerances import assert_within

E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
M, N, K = 5, 32, 48
VLLM = {"vllm": "0.33.0"}
ONE, ROWS, COLUMNS = torch.tensor([0.3]), torch.rand(M, 1) + 0.1, torch.rand(N, 1) / 50 + 0.01

TORCH = (
    lk.torch_per_tensor_w8a8_scaled_mm,
    lk.torch_per_token_w8a8_scaled_mm,
    lk.torch_channelwise_w8a8_scaled_mm,
)
EVERY = (*TORCH, lk.cutlass_w8a8_scaled_mm, lk.rocm_per_tensor_w8a8_scaled_mm)


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.delenv(DISABLED_VARIABLE, raising=False)
    with torch.no_grad():
        yield


def given(m: int = M, n: int = N, k: int = K, dtype: torch.dtype = E4M3, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of one call: random codes and a scale each."""
    codes, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t()
    torch._dynamo.mark_static(weight)
    call = {"qinput": codes, "weight": weight, "scale_a": torch.tensor([0.3]), "scale_b": torch.tensor([0.02])}
    shared = {"out_dtype": torch.bfloat16, "bias": None, "input_2d": torch.empty(m, k), "output_shape": [m, n]}
    return {**call, **shared, **changes}


def expected(call: dict[str, Any]) -> Tensor:
    """The result in float64, rounded once."""
    rows = call["input_2d"].shape[0]
    out = call["qinput"].double() @ call["weight"].double()
    out = (out * call["scale_a"].double() * call["scale_b"].double().reshape(1, -1))[:rows]
    out = out if call["bias"] is None else out + call["bias"].double()
    return out.to(call["out_dtype"]).reshape(call["output_shape"])


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [None, torch.randn(N)], ids=["none", "bias"])
@pytest.mark.parametrize(
    ("function", "scale_a", "scale_b"),
    [
        (lk.torch_per_tensor_w8a8_scaled_mm, ONE, ONE),
        (lk.torch_per_tensor_w8a8_scaled_mm, ONE.reshape(()), ONE.reshape(1, 1)),
        (lk.torch_per_token_w8a8_scaled_mm, ROWS, COLUMNS),
        (lk.torch_channelwise_w8a8_scaled_mm, ROWS, COLUMNS),
        (lk.torch_channelwise_w8a8_scaled_mm, ONE, COLUMNS.t()),
        (lk.torch_channelwise_w8a8_scaled_mm, ROWS, ONE),
        (lk.torch_channelwise_w8a8_scaled_mm, ROWS.double(), COLUMNS.flatten().bfloat16()),
    ],
)
def test_each_function_is_the_float64_product(function, scale_a, scale_b, bias, out_dtype):
    call = given(scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=out_dtype)
    assert_within(function(**call), expected(call), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("function", TORCH)
def test_padded_rows_are_dropped(function):
    """vLLM pads codes and scales to 17 rows; what stands there, NaN too, is not in the result."""
    scale_a = torch.tensor([0.3]) if function is TORCH[0] else torch.rand(17, 1)
    scale_b = torch.tensor([0.02]) if function is TORCH[0] else torch.rand(N, 1)
    call = given(17, scale_a=scale_a, scale_b=scale_b, input_2d=torch.empty(4, K), output_shape=[2, 2, N])
    call["qinput"].view(torch.uint8)[4:] = 0x7F
    out = function(**call)
    assert out.shape == (2, 2, N) and out.isfinite().all()
    assert_within(out, expected(call), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("shape", [[0, N], [2, 0, N]])
def test_no_rows_are_no_error(shape):
    out = lk.torch_channelwise_w8a8_scaled_mm(**given(0, scale_a=torch.rand(0, 1), output_shape=shape))
    assert list(out.shape) == shape and out.dtype is torch.bfloat16


def test_a_size_of_the_result_may_be_left_open():
    assert lk.torch_per_tensor_w8a8_scaled_mm(**given(6, output_shape=[3, -1, N])).shape == (3, 2, N)


def test_it_is_what_the_op_of_a_float8_linear_gives():
    call = given(scale_a=ROWS, scale_b=COLUMNS)
    out = fx_quant.Fp8LinearOp().apply(call["qinput"], call["weight"], COLUMNS, torch.bfloat16, ROWS)
    assert torch.equal(lk.torch_channelwise_w8a8_scaled_mm(**call), out)


def test_compiled_it_is_the_canonical_op_for_any_rows():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def linear(**call):
        rows = call["input_2d"].shape[0]
        return lk.torch_per_token_w8a8_scaled_mm(**call, output_shape=[1, rows, N])

    compiled = torch.compile(linear, backend=backend, fullgraph=True, dynamic=True)
    weight, scale_b = torch.randn(N, K).to(E4M3).t(), torch.rand(N, 1)
    torch._dynamo.mark_static(weight)
    torch._dynamo.mark_static(scale_b)
    for m in (3, 17, 30):
        call = given(m, weight=weight, scale_a=torch.rand(m, 1), scale_b=scale_b, output_shape=[1, m, N])
        without = {name: value for name, value in call.items() if name != "output_shape"}
        assert_within(compiled(**without), expected(call), Numerics.SAME_ACCUM)
    (graph,) = graphs
    assert torch.ops.fx_quant.scaled_mm in {node.target for node in graph.graph.nodes}


# --- providers that are not here ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale_a", "scale_b"), [(ONE, ONE), (ROWS, COLUMNS), (ONE, COLUMNS)])
def test_the_cutlass_function_calls_cutlass(monkeypatch, scale_a, scale_b):
    calls = []

    def cutlass_scaled_mm(out, a, b, a_scale, b_scale, bias):
        calls.append((a_scale.shape, b_scale.shape))
        out.copy_((a.double() @ b.double()) * a_scale.double() * b_scale.double())

    monkeypatch.setattr(
        fx_quant.linear_kernels.fp8_linear, "target_of", lambda device: named_target("sm90", packages=VLLM)
    )
    monkeypatch.setattr(fx_quant.kernels.cutlass, "vllm_op", lambda namespace, name: cutlass_scaled_mm)
    call = given(scale_a=scale_a, scale_b=scale_b)
    assert_within(lk.cutlass_w8a8_scaled_mm(**call), expected(call), Numerics.SAME_ACCUM)
    del call["input_2d"]  # which vLLM's function takes and does not read
    assert lk.cutlass_w8a8_scaled_mm(**call).shape == (M, N) and len(calls) == 2


def test_the_rocm_function_calls_the_kernel_of_few_rows(monkeypatch):
    calls = []

    def few_rows(weight, a, bias, out, a_scale, b_scale, compute_units):
        calls.append(compute_units)
        out.copy_((a.double() @ weight.t().double()) * a_scale.double() * b_scale.double())

    monkeypatch.setattr(
        fx_quant.linear_kernels.fp8_linear, "target_of", lambda device: named_target("gfx942", packages=VLLM)
    )
    monkeypatch.setattr(w8a8, "is_rocm", lambda device: True)
    monkeypatch.setattr(fx_quant.kernels.rocm, "vllm_op", lambda namespace, name: few_rows)
    monkeypatch.setattr(fx_quant.kernels.rocm, "compute_units", lambda device: 304)
    call = given(2, dtype=FNUZ)
    assert_within(lk.rocm_per_tensor_w8a8_scaled_mm(**call), expected(call), Numerics.SAME_ACCUM)
    assert calls == [304]


def test_a_function_of_another_machine_never_runs_something_else():
    said = "CUTLASS or nothing: forced kernel 'cutlass_float8' cannot run .* needs platform cuda.* torch_channelwise_"
    with pytest.raises(NoKernelError, match=said):
        lk.cutlass_w8a8_scaled_mm(**given())
    with pytest.raises(ValueError, match="must run on ROCm, got codes on cpu; torch_per_tensor_w8a8_scaled_mm runs"):
        lk.rocm_per_tensor_w8a8_scaled_mm(**given())


# --- which function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "target", "function"),
    [
        ((True, True, True, False), "sm90", lk.cutlass_w8a8_scaled_mm),
        ((False, True, True, True), "sm90", lk.torch_per_tensor_w8a8_scaled_mm),
        ((False, True, True, None), "x86_vnni", lk.torch_per_tensor_w8a8_scaled_mm),
        ((False, True, True, None), "gfx942", lk.rocm_per_tensor_w8a8_scaled_mm),
        ((False, False, False, True), "sm90", lk.torch_per_token_w8a8_scaled_mm),
        ((False, False, False, True), "gfx942", lk.torch_per_token_w8a8_scaled_mm),
        ((False, False, False, True), "x86_vnni", lk.torch_channelwise_w8a8_scaled_mm),
        ((False, False, False, None), "sm90", lk.torch_channelwise_w8a8_scaled_mm),
        ((False, True, False, True), "sm90", lk.torch_channelwise_w8a8_scaled_mm),
        ((False, False, True, False), "gfx942", lk.torch_channelwise_w8a8_scaled_mm),
    ],
)
def test_the_function_follows_the_scales_and_the_machine(flags, target, function):
    assert lk.dispatch_w8a8_scaled_mm(*flags, compute_capability=target) is function


@pytest.mark.parametrize("per_tensor_weights", [True, False])
@pytest.mark.parametrize("per_tensor_activations", [True, False])
def test_what_is_dispatched_runs_here(per_tensor_weights, per_tensor_activations):
    scale_a = ONE if per_tensor_activations else ROWS
    scale_b = ONE if per_tensor_weights else COLUMNS
    call = given(scale_a=scale_a, scale_b=scale_b)
    function = lk.dispatch_w8a8_scaled_mm(
        cutlass_fp8_supported=lk.cutlass_fp8_supported(),
        per_tensor_weights=per_tensor_weights,
        per_tensor_activations=per_tensor_activations,
        use_per_token_if_dynamic=True,
    )
    assert_within(function(**call), expected(call), Numerics.SAME_ACCUM)


@pytest.mark.parametrize(
    ("probe", "where"),
    [
        (lk.cutlass_fp8_supported, {"sm89", "sm90", "sm100", "sm120"}),
        (lk.cutlass_block_fp8_supported, {"sm90", "sm100", "sm120"}),
        (lk.cutlass_group_gemm_supported, set()),
        (lk.sparse_cutlass_supported, set()),
    ],
)
def test_probes_are_answered_by_the_target(probe, where):
    names = ("x86_vnni", "arm", "sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950")
    targets = {name: named_target(name, packages=VLLM) for name in names}
    assert {name for name, target in targets.items() if probe(target)} == where
    assert not any(probe(replace(target, packages={})) for target in targets.values())
    assert probe() is False  # this machine has no vLLM


@pytest.mark.parametrize("name", ["cutlass", "cutlass_float8", "CutlassFP8ScaledMMLinearKernel"])
def test_what_is_disabled_is_not_supported(monkeypatch, name):
    monkeypatch.setenv(DISABLED_VARIABLE, name)
    assert not lk.cutlass_fp8_supported(named_target("sm90", packages=VLLM))


def test_the_identity_needs_no_making():
    assert lk.maybe_create_device_identity() is None
    assert lk.maybe_create_device_identity() is None


# --- how an operand is quantized ------------------------------------------------------------------------------------


def key(shape: tuple[int, int], static: bool = False, dtype: torch.dtype = E4M3, **changes: Any) -> lk.QuantKey:
    return lk.QuantKey(dtype, lk.ScaleDesc(torch.float32, static, lk.GroupShape(*shape)), **changes)


@pytest.mark.parametrize(
    ("said", "weight", "spec"),
    [
        (key(lk.GroupShape.PER_TENSOR), False, OperandSpec(E4M3, Granularity.PER_TENSOR, dynamic=True)),
        (key(lk.GroupShape.PER_TENSOR, static=True), False, OperandSpec(E4M3, Granularity.PER_TENSOR)),
        (key(lk.GroupShape.PER_TOKEN), False, OperandSpec(E4M3, Granularity.PER_TOKEN, dynamic=True)),
        (key((1, 128)), False, OperandSpec(E4M3, Granularity.per_group(128), dynamic=True)),
        (key(lk.GroupShape.PER_TENSOR, static=True), True, OperandSpec(E4M3, Granularity.PER_TENSOR)),
        (key(lk.GroupShape.PER_TOKEN, static=True), True, OperandSpec(E4M3, Granularity.PER_CHANNEL)),
        (key(lk.GroupShape.PER_CHANNEL, static=True), True, OperandSpec(E4M3, Granularity.PER_CHANNEL)),
        (key((128, 128), static=True), True, OperandSpec(E4M3, Granularity.per_block(128, 128))),
        (key((1, 64), static=True), True, OperandSpec(E4M3, Granularity.per_group(64))),
        (
            key(lk.GroupShape.PER_TOKEN, dtype=torch.int8, symmetric=False),
            False,
            OperandSpec(torch.int8, Granularity.PER_TOKEN, dynamic=True, symmetric=False),
        ),
    ],
    ids=str,
)
def test_a_quant_key_is_the_spec_that_it_says(said, weight, spec):
    from fx_quant.linear_kernels.configs import operand_spec

    assert operand_spec(said, weight=weight) == spec == operand_spec(spec, weight=weight)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("activation", "weight", "scale_shape"),
    [
        (lk.GroupShape.PER_TOKEN, lk.GroupShape.PER_TOKEN, (N, 1)),
        (lk.GroupShape.PER_TENSOR, lk.GroupShape.PER_TENSOR, ()),
        ((1, 16), (16, 16), (2, 3)),
    ],
)
def test_a_kernel_is_chosen_by_quant_keys_as_by_specs(activation, weight, scale_shape, out_dtype):
    from fx_quant.linear_kernels.configs import operand_spec

    keys = key(activation), key(weight, static=True)
    specs = operand_spec(keys[0], weight=False), operand_spec(keys[1], weight=True)
    codes, scale, x = torch.randn(N, K).to(E4M3), torch.rand(scale_shape) + 0.1, torch.randn(M, K).to(out_dtype)
    outs = []
    for pair in (keys, specs):
        kernel = lk.init_fp8_linear_kernel(*pair, out_dtype)
        layer = torch.nn.Module()
        layer.weight, layer.weight_scale, layer.input_scale = torch.nn.Parameter(codes, False), scale.clone(), None
        kernel.process_weights_after_loading(layer)
        outs.append((type(kernel), kernel.apply_weights(layer, x)))
    assert outs[0][0] is outs[1][0] and torch.equal(outs[0][1], outs[1][1]) and outs[0][1].isfinite().all()


def test_a_key_of_another_library_is_read_by_its_fields():
    class Scale:
        dtype, static, group_shape = torch.float32, False, (1, -1)

    class Key:
        dtype, scale, scale2, symmetric = E4M3, Scale, None, True

    made = lk.init_fp8_linear_kernel(Key, key(lk.GroupShape.PER_CHANNEL, static=True), torch.bfloat16)  # pyrefly: ignore
    assert isinstance(made, lk.FP8ScaledMMLinearKernel)


@pytest.mark.parametrize(
    ("activation", "weight", "message"),
    [
        ("fp8", None, "activation is quantized must be an OperandSpec or a QuantKey, got 'fp8'; say QuantKey"),
        (E4M3, None, "activation is quantized must be an OperandSpec or a QuantKey, got torch.float8_e4m3fn"),
        (key((-1, 1)), None, r"scales of the activation must be shared by .* got \(-1, 1\); say \(rows, columns\)"),
        (key((2, 128)), None, r"shared by all of it, by a row, or by neighbours in a row, got \(2, 128\)"),
        (key((1, 0)), None, r"got \(1, 0\); say"),
        (None, key((0, 128), static=True), r"scales of the weight must be shared by .* or a block, got \(0, 128\)"),
        (None, key((1, -1)), "a weight is quantized once, got a dynamic scale in QuantKey.*; say static=True"),
        (
            replace(key((1, -1)), scale2=lk.ScaleDesc(torch.float32, True, lk.GroupShape.PER_TENSOR)),
            None,
            "activation must have one level of scales, got QuantKey",
        ),
        (
            lk.QuantKey(E4M3, lk.ScaleDesc(torch.float16, False, lk.GroupShape.PER_TOKEN)),
            None,
            "scales of the activation must be float32, got float16; widen them first",
        ),
    ],
)
def test_a_key_that_says_nothing_usable_is_one_clear_error(activation, weight, message):
    activation = key((1, -1)) if activation is None else activation
    with pytest.raises(ValueError, match=message) as caught:
        lk.init_fp8_linear_kernel(activation, key((1, -1), static=True) if weight is None else weight, torch.bfloat16)
    assert "\n" not in str(caught.value)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        *(
            (function, changes, message)
            for function in (lk.torch_channelwise_w8a8_scaled_mm, lk.cutlass_w8a8_scaled_mm)
            for changes, message in (
                (
                    {"qinput": torch.zeros(M, K)},
                    r"qinput must be float8 codes \[m, k\], got float32 \[5, 48\]; quantize",
                ),
                ({"qinput": torch.zeros(K).to(E4M3)}, r"qinput must be .* got float8_e4m3fn \[48\]"),
                ({"weight": torch.zeros(K, N)}, r"weight must be float8 codes \[k, n\] with k = 48, got float32"),
                ({"weight": torch.zeros(N, K).to(E4M3)}, r"k = 48, got float8_e4m3fn \[32, 48\]; give weight.t\(\)"),
                (
                    {"scale_a": torch.ones(M)},
                    r"scale_a must be float of one element or \[m, 1\] = \[5, 1\], got float32 ",
                ),
                ({"scale_a": torch.tensor(1)}, r"scale_a must be float .* got int64 \[\]; reshape"),
                ({"scale_b": torch.ones(K)}, r"scale_b must be .* \[n\] = \[32\].* got float32 \[48\]; convert_to"),
                ({"out_dtype": torch.int32}, "out_dtype must be float32, .* got torch.int32; cast"),
                ({"bias": torch.ones(K)}, r"bias must be .* of shape \[32\], got float32 \[48\]"),
                ({"input_2d": torch.ones(6, K)}, "input_2d must have no more rows than the 5 of qinput, got 6; give"),
                ({"output_shape": [M, K]}, r"output_shape must hold \[5, 32\], got \[5, 48\]; end it in n = 32"),
            )
        ),
        *(
            (lk.torch_per_tensor_w8a8_scaled_mm, {name: scale}, f"{name} must have one element, got .*channelwise")
            for name, scale in (("scale_a", ROWS), ("scale_b", COLUMNS))
        ),
        (
            lk.torch_per_token_w8a8_scaled_mm,
            {"scale_b": COLUMNS},
            r"scale_a must have an element for each of the 5 rows",
        ),
        (
            lk.torch_per_token_w8a8_scaled_mm,
            {"scale_a": ROWS},
            r"scale_b must have an element for each of the 32 columns",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_error(function, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        function(**given(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", EVERY)
def test_arguments_are_given_by_name_and_no_others(function):
    with pytest.raises(TypeError, match="positional"):
        function(*given().values())
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        function(**given(), scale=1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((lk.cutlass_fp8_supported, True, True, None), r"got function; call cutlass_fp8_supported\(\)"),
        ((None, True, True, None), "cutlass_fp8_supported must be True or False, got NoneType"),
        ((False, 1, True, None), "per_tensor_weights must be True or False, got int"),
        ((False, True, ONE, None), "per_tensor_activations must be True or False, got Tensor"),
        ((False, True, True, "yes"), "use_per_token_if_dynamic must be True or False, got str"),
    ],
)
def test_a_flag_that_is_none_is_one_clear_error(flags, message):
    with pytest.raises(ValueError, match=message):
        lk.dispatch_w8a8_scaled_mm(*flags)


@pytest.mark.parametrize(
    "probe",
    [
        lk.cutlass_fp8_supported,
        lk.cutlass_block_fp8_supported,
        lk.cutlass_group_gemm_supported,
        lk.sparse_cutlass_supported,
    ],
)
def test_a_machine_that_there_is_not_is_one_clear_error(probe):
    with pytest.raises(UnknownNameError, match="unknown target 'sm91'"):
        probe("sm91")
    with pytest.raises(ValueError, match=r"must be major \* 10 \+ minor, such as 90 for sm90, got 9"):
        probe(9)
