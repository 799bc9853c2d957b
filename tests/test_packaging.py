"""What a user installs and a type checker sees."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import fx_quant

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_name_that_is_not_there_fails_type_checking(tmp_path):
    if importlib.util.find_spec("pyrefly") is None:
        pytest.skip("pyrefly is not installed")
    asks = tmp_path / "asks.py"
    asks.write_text("import fx_quant\n\nfx_quant.explain\nfx_quant.nosuch\n")
    command = [sys.executable, "-m", "pyrefly", "check", "--preset=default", f"--search-path={ROOT}", str(asks)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert re.findall(r"No attribute `(\w+)`", said.stdout) == ["nosuch"], said.stdout + said.stderr


def test_the_oldest_python_is_one_everywhere():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]


def test_the_changelog_has_the_version():
    assert f"\n## [{fx_quant.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_extras_name_extras_that_are_there():
    extras = PROJECT["optional-dependencies"]
    named = re.findall(r"fx-quant\[([\w,]+)\]", str(extras))
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    named += re.findall(r"fx-quant\[([\w,]+)\]", "".join(file.read_text() for file in files))
    assert named and {name for names in named for name in names.split(",")} <= extras.keys()
