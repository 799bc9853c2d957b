"""Which kernel is chosen where: a golden table for every named target, and the errors of what cannot be chosen.

``EXPECTTEST_ACCEPT=1 pytest tests/test_selection.py`` writes the goldens anew; read every line before you keep it.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from fx_quant.errors import FxQuantError, NoKernelError, UnknownNameError
from fx_quant.kernels import registry as base
from fx_quant.kernels.registry import kernel, kernels, register_kernel
from fx_quant.kernels.select import DISABLED_VARIABLE, Selection, select
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import COMPILER, Kind, Unmet, for_platform, is_candidate, lacks_only_compiler
from fx_quant.scheme import Granularity, OperandSpec, Scheme
from fx_quant.target import Target, named_target, named_targets

GOLDENS = Path(__file__).parent / "goldens" / "selection"
F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
I8, U8 = torch.int8, torch.uint8
E4M3, E5M2, FNUZ = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz
I4 = torch.int4
TENSOR, TOKEN, CHANNEL = Granularity.PER_TENSOR, Granularity.PER_TOKEN, Granularity.PER_CHANNEL
GROUP, BLOCK, NONE = Granularity.per_group(128), Granularity.per_block(128, 128), Granularity.UNSCALED


ANY_ROWS = SizeRange(1, None)


@pytest.fixture(autouse=True)
def nothing_disabled(monkeypatch):
    monkeypatch.delenv(DISABLED_VARIABLE, raising=False)


def problem(
    activation: tuple[torch.dtype, Granularity],
    weight: tuple[torch.dtype, Granularity],
    out: torch.dtype = BF16,
    bias: torch.dtype | None = None,
    m: SizeRange = ANY_ROWS,
    n: int = 4096,
    k: int = 4096,
    constant_weight: bool = True,
    symmetric_weight: bool = True,
) -> Problem:
    dynamic = activation[1] != NONE
    scheme = Scheme(OperandSpec(*activation, dynamic=dynamic), OperandSpec(*weight, symmetric=symmetric_weight))
    return Problem(scheme, m, n, k, out, bias, constant_weight)


INT8 = problem((I8, TOKEN), (I8, CHANNEL))
FP8 = problem((E4M3, TENSOR), (E4M3, TENSOR))
FP8_ROW = problem((E4M3, TOKEN), (E4M3, CHANNEL))
ASYMMETRIC = replace(
    INT8, scheme=Scheme(OperandSpec(I8, TOKEN, dynamic=True, symmetric=False), OperandSpec(I8, CHANNEL))
)
FP8_BLOCK = problem((E4M3, GROUP), (E4M3, BLOCK))
WEIGHT_ONLY = problem((BF16, NONE), (I8, CHANNEL))
FNUZ_ROW = problem((FNUZ, TOKEN), (FNUZ, CHANNEL))

PROBLEMS: Mapping[str, Problem] = MappingProxyType(
    {
        "int8": INT8,
        "int8, one row": replace(INT8, m=SizeRange.exactly(1)),
        "int8, maybe no rows": replace(INT8, m=SizeRange(0, None)),
        "int8, ragged, bias": replace(INT8, n=36, k=72, bias=BF16),
        "int8, float32 result and bias": replace(INT8, out_dtype=F32, bias=F32),
        "int8, raw accumulator": replace(INT8, out_dtype=I32),
        "int8, computed weight": replace(INT8, constant_weight=False),
        "int8, very deep": replace(INT8, k=200_000),
        "int8, per tensor": problem((I8, TENSOR), (I8, TENSOR)),
        "uint8 activations": problem((U8, TENSOR), (I8, CHANNEL)),
        "fp8 tensor": FP8,
        "fp8 tensor, bias": replace(FP8, bias=BF16),
        "fp8 tensor, bias of another dtype": replace(FP8, out_dtype=F16, bias=BF16),
        "fp8 tensor, float32 bias": replace(FP8, bias=F32),
        "fp8 tensor, float32 result": replace(FP8, out_dtype=F32),
        "fp8 tensor, ragged": replace(FP8, n=36, k=72),
        "fp8 tensor, ragged, float32 result": replace(FP8, n=36, k=72, out_dtype=F32),
        "fp8 tensor, computed weight": replace(FP8, constant_weight=False),
        "fp8 row": FP8_ROW,
        "fp8 row, bias": replace(FP8_ROW, bias=BF16),
        "fp8 row, float16": replace(FP8_ROW, out_dtype=F16, bias=F16),
        "fp8 row, ragged": replace(FP8_ROW, n=36, k=72),
        "fp8 token x tensor": problem((E4M3, TOKEN), (E4M3, TENSOR)),
        "e5m2 x e4m3": problem((E5M2, TENSOR), (E4M3, TENSOR)),
        "e5m2 x e4m3 row": problem((E5M2, TOKEN), (E4M3, CHANNEL)),
        "e5m2 x e5m2": problem((E5M2, TENSOR), (E5M2, TENSOR)),
        "fnuz tensor, bias": problem((FNUZ, TENSOR), (FNUZ, TENSOR), bias=BF16),
        "fnuz tensor, ragged": problem((FNUZ, TENSOR), (FNUZ, TENSOR), n=36, k=72),
        "fnuz row": FNUZ_ROW,
        "fnuz row, ragged": replace(FNUZ_ROW, n=36, k=72),
        "fnuz row, ragged, float16": replace(FNUZ_ROW, n=36, k=72, out_dtype=F16),
        "int8, asymmetric activation": ASYMMETRIC,
        "int8, asymmetric activation, per tensor": replace(
            ASYMMETRIC, scheme=Scheme(OperandSpec(I8, TENSOR, symmetric=False), OperandSpec(I8, TENSOR))
        ),
        "int8, asymmetric activation, ragged": replace(ASYMMETRIC, n=36, k=72, bias=BF16),
        "fp8 block": FP8_BLOCK,
        "fp8 block, bias": replace(FP8_BLOCK, bias=BF16),
        "fp8 block, ragged": replace(FP8_BLOCK, n=576, k=1100),
        "fp8 block, float32 result": replace(FP8_BLOCK, out_dtype=F32),
        "fp8 block of another size": problem((E4M3, Granularity.per_group(64)), (E4M3, Granularity.per_block(64, 64))),
        "fnuz block": problem((FNUZ, GROUP), (FNUZ, BLOCK)),
        "weight-only int8": WEIGHT_ONLY,
        "weight-only int8, ragged": replace(WEIGHT_ONLY, n=36, k=72),
        "weight-only int8, float32": problem((F32, NONE), (I8, CHANNEL), out=F32),
        "weight-only int8, groups": problem((BF16, NONE), (I8, GROUP)),
        "weight-only int8, asymmetric": replace(
            WEIGHT_ONLY, scheme=Scheme(OperandSpec(BF16), OperandSpec(I8, CHANNEL, symmetric=False))
        ),
        "weight-only fp8": problem((BF16, NONE), (E4M3, CHANNEL)),
        "weight-only fp8 block": problem((BF16, NONE), (E4M3, BLOCK)),
        "weight-only int4, groups": problem((BF16, NONE), (I4, GROUP)),
        "weight-only int4, float16, bias": problem((F16, NONE), (I4, GROUP), out=F16, bias=F16),
        "weight-only int4, asymmetric": problem((BF16, NONE), (I4, GROUP), symmetric_weight=False),
    }
)


def outcome(name: str, asked: Problem, target: Target) -> str:
    """The choice for one problem, then why each better kernel of this machine was passed over.

    Kernels of other codes are left out: an int8 kernel is no candidate for float8.
    """
    try:
        selection = select(asked, target)
        chosen = f"{selection.kernel.name}, padding {selection.padding.describe(asked)}"
        better = kernels()[: kernels().index(selection.kernel)]
    except NoKernelError:
        chosen, better = "no kernel", kernels()
    codes = (asked.scheme.activation.dtype, asked.scheme.weight.dtype)
    passed_over = [
        f"    not {candidate.name}: {'; '.join(map(str, candidate.requires.unmet_by_problem(asked)))}"
        for candidate in better
        if codes in candidate.requires.codes and not candidate.requires.unmet_by_target(target)
    ]
    return "\n".join([f"{name}: {asked}", f"    -> {chosen}", *passed_over])


def table(target: Target) -> str:
    """What runs on ``target``: kernels that never do, then each problem's outcome."""
    unmet = {candidate.name: candidate.requires.unmet_by_target(target) for candidate in kernels()}
    never = [f"    {name}: {'; '.join(map(str, reasons))}" for name, reasons in unmet.items() if reasons]
    blocks = ["\n".join(["never here:", *never]), *(outcome(name, asked, target) for name, asked in PROBLEMS.items())]
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("name", named_targets())
def test_selection_on_every_named_target_is_the_golden_one(name):
    actual = table(named_target(name, packages={}))
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(actual)
    assert actual == path.read_text(), f"accept with EXPECTTEST_ACCEPT=1 once every line of {path} is right"


@pytest.mark.parametrize("name", named_targets())
@pytest.mark.parametrize("asked", PROBLEMS)
def test_the_chosen_kernel_is_the_first_that_can_run(name, asked):
    try:
        selection = select(PROBLEMS[asked], named_target(name))
    except NoKernelError:
        return
    assert next(v.kernel for v in selection.verdicts if v.can_run) == selection.kernel.name


def test_a_cpu_with_vnni_but_no_bfloat16_runs_float8_in_float32():
    cascade_lake = replace(named_target("x86_vnni"), features=named_target("x86_vnni").features - {"avx512_bf16"})
    assert select(INT8, cascade_lake).kernel.name == "cpu_int8_vnni"
    assert select(FP8, cascade_lake).kernel.name == "cpu_float8_float32"


def test_a_selection_keeps_the_verdict_of_every_kernel():
    selection = select(INT8, named_target("x86_vnni"))
    assert [v.kernel for v in selection.verdicts] == [k.name for k in kernels()]


def test_all_unmet_requirements_are_named_not_the_first():
    asked = replace(FP8_ROW, out_dtype=F16, bias=F32)
    reasons = kernel("pytorch_scaled_mm_rowwise").requires.unmet(asked, named_target("sm80"))
    assert list(map(str, reasons)) == [
        "needs sm89 or newer, target is sm80",
        "returns bfloat16, asked for float16",
        "adds a bias of bfloat16, got float32",
    ]


def test_what_a_kernel_is_a_candidate_by_is_no_text():
    """Another text of the same kind decides the same, and the same text of another kind does not."""
    platform, codes, compiler = Unmet(Kind.PLATFORM, "p"), Unmet(Kind.CODES, "c"), Unmet(Kind.FEATURE, "f", COMPILER)
    assert [for_platform([each]) for each in (platform, codes, compiler)] == [False, True, True]
    assert [is_candidate([each]) for each in (platform, codes, compiler)] == [False, False, True]
    assert is_candidate([Unmet(Kind.BIAS, "needs platform cpu, has no int8 x int8 matmul")])
    assert lacks_only_compiler([compiler])
    assert not lacks_only_compiler([])
    assert not lacks_only_compiler([compiler, codes])
    assert not lacks_only_compiler([Unmet(Kind.FEATURE, f"needs {COMPILER}, which x86 has not", "avx2")])


def test_every_kind_is_that_of_a_requirement():
    """Each requirement says its own kind, and a feature and a package are named."""
    problem = replace(INT8, scheme=Scheme(OperandSpec(I8, TOKEN, symmetric=False), OperandSpec(I8, CHANNEL)), bias=F32)
    lists = [
        base.Requires(platforms=base.CPU, min_capability=99, features=frozenset({"f"}), packages={"p": "1"}),
        base.Requires(max_capability=1, codes=base.E4M3_PAIRS, granularities=base.TENSOR_SCALES, bias=False),
        base.Requires(out_dtypes=frozenset({F16}), align_n=4095, max_k=1, constant_weight=True),
    ]
    asked = replace(problem, constant_weight=False)
    found = [[(each.kind.value, each.name) for each in one.unmet(asked, named_target("sm90"))] for one in lists]
    zero_point = ("zero_point", "")
    assert found == [
        [("platform", ""), ("capability", ""), ("feature", "f"), ("package", "p"), zero_point],
        [("capability", ""), ("codes", ""), ("granularity", ""), zero_point, ("bias", "")],
        [zero_point, ("out_dtype", ""), ("alignment", ""), ("max_k", ""), ("constant_weight", "")],
    ]


def test_a_package_that_is_missing_or_old_is_a_reason():
    requires = base.Requires(packages={"triton": "3.5", "vllm": "0.11"})
    target = named_target("sm90", packages={"triton": "3.4.1"})
    assert requires.unmet_by_target(target) == [
        Unmet(Kind.PACKAGE, "needs triton>=3.5, found 3.4.1", "triton"),
        Unmet(Kind.PACKAGE, "needs vllm>=0.11, which is not installed", "vllm"),
    ]


def test_a_new_enough_local_version_of_a_package_is_no_reason():
    requires = base.Requires(packages={"torch": "2.9"})
    assert not requires.unmet_by_target(named_target("sm90", packages={"torch": "2.13.0+cu129"}))


# --- forcing and disabling --------------------------------------------------------------------------------------


def test_a_forced_kernel_is_chosen_before_a_better_one():
    selection = select(INT8, named_target("x86_vnni"), force_kernel="pytorch_int_mm")
    assert selection.kernel.name == "pytorch_int_mm"
    assert next(v.kernel for v in selection.verdicts if v.can_run) == "cpu_int8_vnni"


def test_a_forced_kernel_that_cannot_run_is_an_error_with_all_its_reasons():
    asked = replace(INT8, constant_weight=False)
    with pytest.raises(NoKernelError) as error:
        select(asked, named_target("sm80"), force_kernel="cpu_int8_vnni")
    assert str(error.value) == (
        "forced kernel 'cpu_int8_vnni' cannot run int8 per_token (dynamic) x int8 per_channel, "
        "m=1.. n=4096 k=4096 -> bfloat16 on sm80: needs platform cpu, target is cuda; needs avx512, which sm80 has not; "
        "needs avx512_vnni, which sm80 has not; needs cpp_compiler, which sm80 has not; packs its weight once, so the weight must be a parameter, buffer or "
        "constant. Remove force_kernel to let fx_quant choose."
    )


def test_no_kernel_error_holds_the_reasons_of_every_kernel_of_the_platform():
    with pytest.raises(NoKernelError) as error:
        select(FP8, named_target("sm80"))
    message = str(error.value)
    assert "no kernel can run float8_e4m3fn per_tensor (dynamic) x float8_e4m3fn per_tensor" in message
    for candidate in kernels():
        if "cuda" in candidate.requires.platforms:
            assert f"{candidate.name}: {candidate.requires.unmet(FP8, named_target('sm80'))[0]}" in message


def test_no_kernel_error_says_when_none_is_for_the_platform():
    with pytest.raises(NoKernelError, match="none is for xpu"):
        select(INT8, Target("xpu", "pvc"))


def test_an_unknown_forced_kernel_is_an_error_with_the_nearest_names():
    with pytest.raises(UnknownNameError, match=r"unknown kernel 'pytorch_intmm'. Did you mean 'pytorch_int_mm'"):
        select(INT8, named_target("x86"), force_kernel="pytorch_intmm")


def _chosen(asked: Problem, **options: object) -> Selection:
    return select(asked, named_target("x86_vnni"), **options)


@pytest.mark.parametrize("name", ["cpu_int8_vnni", "cpu"])
def test_a_disabled_kernel_or_provider_is_not_chosen(name):
    selection = _chosen(INT8, disabled=[name])
    assert selection.kernel.name == "pytorch_int_mm"
    verdict = next(v for v in selection.verdicts if v.kernel == "cpu_int8_vnni")
    assert verdict.reasons == ("is disabled",)


@pytest.mark.parametrize(
    ("lacks", "chosen"), [("", "cpu_float8_decoded_bf16"), ("avx512_vbmi", "cpu_float8_bf16")], ids=str
)
def test_float8_is_multiplied_as_bfloat16_with_vbmi_or_without(lacks, chosen):
    """Intel's Cooper Lake multiplies bfloat16 and has no VBMI, which decoding in registers needs."""
    target = named_target("x86_vnni", packages={})
    assert select(FP8_ROW, replace(target, features=target.features - {lacks})).kernel.name == chosen


@pytest.mark.parametrize("value", ["cpu_int8_vnni", " cpu ,", "cpu_float8_bf16, cpu_int8_vnni"])
def test_the_environment_disables_kernels_and_providers(monkeypatch, value):
    monkeypatch.setenv(DISABLED_VARIABLE, value)
    assert _chosen(INT8).kernel.name == "pytorch_int_mm"


def test_the_environment_adds_to_the_disabled_option(monkeypatch):
    monkeypatch.setenv(DISABLED_VARIABLE, "cpu")
    with pytest.raises(NoKernelError, match="pytorch_int_mm: is disabled"):
        _chosen(INT8, disabled=["pytorch_int_mm"])


def test_a_forced_kernel_that_is_disabled_is_an_error(monkeypatch):
    monkeypatch.setenv(DISABLED_VARIABLE, "cpu_int8_vnni")
    with pytest.raises(NoKernelError, match=r"forced kernel 'cpu_int8_vnni' cannot run .*: is disabled"):
        _chosen(INT8, force_kernel="cpu_int8_vnni")


def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv(DISABLED_VARIABLE, "cpu_int8_vni")
    with pytest.raises(UnknownNameError, match=r"'cpu_int8_vni'\. Did you mean 'cpu_int8_vnni'"):
        _chosen(INT8)


def test_an_unknown_disabled_name_is_an_error():
    with pytest.raises(UnknownNameError, match=r"unknown kernel or provider 'pytroch'\. Did you mean 'pytorch'"):
        _chosen(INT8, disabled=["pytroch"])


# --- the registry -----------------------------------------------------------------------------------------------


def test_two_kernels_cannot_share_a_name():
    impostor = replace(kernel("pytorch_int_mm"), note="another")
    with pytest.raises(FxQuantError, match="kernel name 'pytorch_int_mm' must be unique"):
        register_kernel(impostor, priority=0)


def test_registering_the_same_kernel_again_changes_nothing():
    before = kernels()
    register_kernel(kernel("pytorch_int_mm"), priority=base._PRIORITY["pytorch_int_mm"])
    assert kernels() == before


@pytest.mark.parametrize("candidate", kernels(), ids=lambda k: k.name)
def test_every_kernel_names_an_op_that_exists_with_the_kernel_schema(candidate):
    schema = candidate.overload()._schema
    assert f"({str(schema).split('(', 1)[1]}" == base.KERNEL_SCHEMA
    assert candidate.name.startswith(f"{candidate.provider}_")


def test_a_provider_that_fails_to_load_fails_every_time(monkeypatch):
    """A registry that lacks a provider would otherwise pass for a complete one from the second call on."""
    entry_point = importlib.metadata.EntryPoint("broken", "fx_quant_no_such_module", base.ENTRY_POINT_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry_point])
    base._load_providers.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="fx_quant_no_such_module"):
                kernels()
    finally:
        monkeypatch.undo()
        base._load_providers.cache_clear()
