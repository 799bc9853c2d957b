"""Targets: named, detected, compared."""

from __future__ import annotations

import itertools
import platform
import shutil

import pytest
import torch
from packaging.version import Version

from fx_quant.errors import UnknownNameError
from fx_quant.kernels.machine import capability_target, detect_target, installed_packages, resolve_target
from fx_quant.target import _INSTRUCTIONS, Target, cpu_features, named_target, named_targets


def test_named_targets_are_those_of_the_documentation():
    gpus = ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950")
    assert named_targets() == (*gpus, "x86_vnni", "x86_amx", "x86_avx_vnni", "x86_avx512", "x86", "arm")


@pytest.mark.parametrize("name", named_targets())
def test_a_named_target_prints_as_its_name(name):
    assert str(named_target(name)) == name


@pytest.mark.parametrize(
    ("name", "capability"),
    [("sm80", 80), ("sm89", 89), ("sm90", 90), ("sm100", 100), ("gfx942", None), ("x86_vnni", None), ("x86", None)],
)
def test_only_nvidia_targets_have_a_compute_capability(name, capability):
    assert named_target(name).capability == capability


def test_an_unknown_target_is_an_error_with_the_nearest_names():
    with pytest.raises(UnknownNameError) as error:
        named_target("sm_90")
    said = str(error.value)
    assert said.startswith("unknown target 'sm_90'. Did you mean 'sm90' or 'sm89' or 'sm80'? Known: a100, arm, ")
    assert said.endswith("x86_avx512, x86_avx_vnni, x86_vnni, zen3, zen4, zen5.")


@pytest.mark.parametrize(
    ("name", "arch"),
    [("h100", "sm90"), ("A100", "sm80"), ("mi300x", "gfx942"), ("zen4", "x86_vnni"), ("spr", "x86_amx")],
)
def test_machines_go_by_what_they_are_sold_as(name, arch):
    assert named_target(name) == named_target(arch)


def test_a_named_target_has_the_torch_of_this_machine_unless_told():
    assert named_target("sm90").version("torch") == Version(torch.__version__)
    assert named_target("sm90", packages={"torch": "2.11.0"}).version("torch") == Version("2.11.0")


def test_a_package_that_is_not_there_has_no_version():
    assert named_target("sm90", packages={}).version("vllm") is None


def test_equal_targets_hash_equal_whatever_mapping_holds_their_packages():
    one, other = named_target("x86"), named_target("x86", packages={"torch": str(torch.__version__)})
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "other",
    [
        Target("cpu", "x86", frozenset({"avx2"}), {"torch": "2.12"}),
        Target("cpu", "x86", frozenset(), {"torch": "2.11"}),
        Target("cpu", "x86_vnni", frozenset({"avx2"}), {"torch": "2.11"}),
        Target("cuda", "x86", frozenset({"avx2"}), {"torch": "2.11"}),
    ],
    ids=["package", "features", "arch", "platform"],
)
def test_targets_that_differ_in_anything_are_different(other):
    assert other != Target("cpu", "x86", frozenset({"avx2"}), {"torch": "2.11"})


def test_the_detected_cpu_has_the_packages_installed_here():
    target = detect_target("cpu")
    assert target.platform == "cpu"
    assert target.packages == installed_packages()
    assert target.version("torch") == Version(torch.__version__)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="an x86 CPU")
def test_the_detected_x86_cpu_is_vnni_exactly_when_it_has_the_instructions():
    target = detect_target()
    names = ("amx", "avx512_vnni", "avx_vnni", "avx512")
    archs = ("x86_amx", "x86_vnni", "x86_avx_vnni", "x86_avx512")
    best = next((arch for name, arch in zip(names, archs, strict=True) if name in target.features), "x86")
    assert target.arch == best
    assert ("avx2" in target.features) == (
        "AVX2" in torch.backends.cpu.get_cpu_capability() or "AVX512" in torch.backends.cpu.get_cpu_capability()
    )


@pytest.mark.parametrize(("machine", "arch"), [("aarch64", "arm"), ("arm64", "arm"), ("riscv64", "riscv64")])
def test_a_cpu_that_is_not_x86_has_its_own_arch_and_no_x86_features(machine, arch, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    target = detect_target()
    assert (target.arch, target.features - {"cpp_compiler", "exact_int_mm"}) == (arch, frozenset())


def test_a_compiler_is_a_feature_of_a_cpu(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    assert "cpp_compiler" in detect_target().features
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "cpp_compiler" not in detect_target().features


@pytest.mark.parametrize("is_let", [True, False])
def test_amx_is_a_feature_only_where_the_process_may_use_its_tiles(is_let, monkeypatch):
    every = dict.fromkeys(itertools.chain(*_INSTRUCTIONS.values()), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: every)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: is_let)
    assert ("amx" in cpu_features()) == is_let
    assert "avx512_vnni" in cpu_features()


@pytest.mark.parametrize(("capability", "features"), [(80, set()), (89, {"float8"}), (120, {"float8", "tma"})])
def test_a_compute_capability_is_a_target(capability, features):
    target = capability_target(capability)
    assert (target.capability, target.features) == (capability, features)


def test_a_major_version_is_no_compute_capability():
    with pytest.raises(ValueError, match="such as 90 for sm90, got 9"):
        capability_target(9)


def test_resolve_takes_a_target_a_name_or_nothing():
    given = Target("cuda", "sm120")
    assert resolve_target(given) is given
    assert resolve_target("sm90") == named_target("sm90")
    assert resolve_target(None) == detect_target("cpu")


def test_finding_packages_imports_none_of_them(printed):
    found = printed(
        "import sys\n"
        "from fx_quant.kernels.machine import installed_packages\n"
        "installed_packages()\n"
        "print([m for m in ('triton', 'vllm', 'flashinfer', 'aiter', 'torch._inductor') if m in sys.modules])"
    )
    assert found.strip() == "[]"
