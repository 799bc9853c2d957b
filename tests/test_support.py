"""The support matrix of every named target, as ``python -m fx_quant kernels --target`` prints it.

``EXPECTTEST_ACCEPT=1 pytest tests/test_support.py`` writes the goldens anew; read every line before you keep it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fx_quant.__main__ import main
from fx_quant.diagnose.support import SCHEMES, support_matrix
from fx_quant.kernels.registry import kernels
from fx_quant.scheme import Scheme
from fx_quant.target import named_target, named_targets

GOLDENS = Path(__file__).parent / "goldens" / "support"


@pytest.fixture(autouse=True)
def nothing_disabled(monkeypatch):
    monkeypatch.delenv("FX_QUANT_DISABLED_KERNELS", raising=False)


@pytest.mark.parametrize("name", named_targets())
def test_the_matrix_is_the_golden_one(name):
    # What a machine with nothing but PyTorch gets.
    actual = "\n".join(map(str, support_matrix(named_target(name)))) + "\n"
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(actual)
    assert actual == path.read_text(), f"accept with EXPECTTEST_ACCEPT=1 once every line of {path} is right"


@pytest.mark.parametrize("name", named_targets())
def test_every_other_kernel_has_a_reason(name):
    names = {kernel.name for kernel in kernels()}
    for support in support_matrix(named_target(name)):
        assert set(support.losers) == names - {support.kernel}
        assert all(reasons and all(reasons) for reasons in support.losers.values()), support


@pytest.mark.parametrize("text", SCHEMES)
def test_a_scheme_prints_as_it_parses(text):
    assert str(Scheme.parse(text)) == text


def test_the_command_prints_the_matrix_and_json(capsys):
    assert main(["kernels", "--target", "sm90", "--all"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "float8_e4m3fn per_tensor (dynamic) x float8_e4m3fn per_tensor -> pytorch_scaled_mm, not:" in printed
    assert main(["kernels", "--target", "sm90", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["target"] == "sm90"
    assert [each["scheme"] for each in data["schemes"]] == list(SCHEMES)
