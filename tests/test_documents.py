"""What README and the pages of ``docs`` show: Python runs as it stands, files and links that they name are there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fx_quant

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks but those of which a comment says why they are not run.
BLOCK = re.compile(r"(?<! -->\n)^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What `make models` writes.
WRITTEN = {"docs/models.md"}
WITH_PYTHON = [path for path in DOCUMENTS if BLOCK.search(path.read_text())]


@pytest.mark.usefixtures("op_by_op")
@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.name)
def test_the_python_of_a_page_runs_from_its_first_block_to_its_last(path):
    """A page that does not build a model of its own is given one."""
    if importlib.util.find_spec("torchao") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("torchao and transformers are not installed")
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)).eval()
    names: dict[str, Any] = {"torch": torch, "fx_quant": fx_quant, "model": model, "x": torch.randn(4, 128)}
    try:
        for found in BLOCK.finditer(path.read_text()):
            exec(compile(found[1], f"{path.name}: {found[1].splitlines()[0]}", "exec"), names)
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_page_names_are_there(path):
    text = path.read_text()
    linked = [target.split("#")[0] for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text)]
    missing = [target for target in linked if not (path.parent / target).exists() and "generated/" not in target]
    named = re.findall(r"`((?:examples|benchmarks|tests|fx_quant|docs)/[\w./-]+\.(?:py|md|ipynb|h|txt))`", text)
    run = re.findall(r"python ((?:examples|benchmarks|docs)/\w+\.py)", text)
    missing += [name for name in {*named, *run} - WRITTEN if not (ROOT / name).exists()]
    assert not missing


def test_every_page_and_example_is_listed():
    site, examples = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs" / "examples.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"models.md"}  # listed where it was written
    assert pages == set(re.findall(r"- ([\w-]+\.md)$", site, re.MULTILINE))
    shown = {path.name for pattern in ("[0-9]*.py", "*.ipynb") for path in (ROOT / "examples").glob(pattern)}
    assert shown == set(re.findall(r"^\| `([\w.]+)` \|", examples, re.MULTILINE))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    assert [
        name for name in fx_quant.__all__ if not re.search(rf"^::: fx_quant\.[\w.]+\.{name}$", reference, re.M)
    ] == []


def test_the_words_of_a_report_are_in_the_glossary():
    glossary = (ROOT / "docs" / "explain.md").read_text()
    fields = json.loads(fx_quant.explain(nn.ReLU(), torch.ones(1)).to_json())
    named = {"sites", "misses", "recognised", "unseen"}
    assert named <= fields.keys()
    assert all(f"`report.{field}`" in glossary for field in named)
