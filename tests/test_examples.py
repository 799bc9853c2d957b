"""Each example's ``main()``: what it promises in its first lines, it returns 0 for.

What the passes leave of a graph runs op by op here; ``make examples`` runs all of them as they stand, compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx

from fx_quant.diagnose.capture import run_eagerly
from fx_quant.passes import dialects

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Run by other tests of this file, or by `make demo` and `make examples` alone: minutes of C++, or real weights.
ELSEWHERE = {
    *("01_minilm", "03_serving", "04_generate", "06_http", "10_aot_inductor"),  # tests/test_generate.py has generate()
    *("13_tensor_parallel", "14_workers"),
}
SIZES: dict[str, dict[str, Any]] = {"05_checkpoint": {"hidden": 32}}
NEEDS = {"05_checkpoint": "compressed_tensors"}
NUMBERED = sorted(path.stem for path in EXAMPLES.glob("[0-9]*.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None or importlib.util.find_spec("transformers") is None,
    reason="torchao and transformers are not installed",
)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def inductor_op_by_op(monkeypatch):
    """As ``op_by_op``, for Inductor's own backend."""
    compile_fx = torch._inductor.compile_fx.compile_fx
    monkeypatch.setattr(
        torch._inductor.compile_fx,
        "compile_fx",
        lambda *args, **kwargs: compile_fx(*args, **{**kwargs, "inner_compile": run_eagerly}),
    )


@pytest.mark.usefixtures("op_by_op", "inductor_op_by_op")
@pytest.mark.parametrize("name", [name for name in NUMBERED if name not in ELSEWHERE])
def test_an_example_is_as_it_says(name):
    needs = NEEDS.get(name)
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    kept = dict(dialects.RULES)
    try:
        with torch.no_grad():
            assert example(name).main(**SIZES.get(name, {})) == 0
    finally:
        dialects.register_dialect("acme")
    assert kept == dialects.RULES


def test_an_example_can_fail(monkeypatch):
    """One that does not find what it is there to show ends with 1."""
    diffusion = example("08_diffusion")
    monkeypatch.setattr(diffusion, "int8_", lambda model: model)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    assert diffusion.main() == 1


@pytest.mark.usefixtures("op_by_op")
def test_the_notebook_runs_from_its_first_cell_to_its_last(capsys):
    cells = json.loads((EXAMPLES / "first_look.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    with torch.no_grad():
        for cell in cells:
            if cell["cell_type"] == "code":
                assert not cell["outputs"], "a notebook is kept without outputs"
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert "7 of 7 quantized matmuls rewritten" in capsys.readouterr().out
    torch.set_grad_enabled(True)


TENSOR_PARALLEL = """
import os, sys
sys.path[:0] = {paths!r}
import torch
from tests.graphs import running_op_by_op
import importlib
example = importlib.import_module("13_tensor_parallel")
rank = int(os.fork() == 0)
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
with running_op_by_op():
    status = example.on_rank()
torch.distributed.destroy_process_group()
if rank:
    os._exit(status)
sys.exit(status or os.wait()[1])
"""


def test_two_ranks_compile_their_parts_of_a_model(printed, tmp_path):
    """What ``torchrun`` starts, in two processes of one that has imported everything."""
    paths = [str(EXAMPLES.parent), str(EXAMPLES)]
    lines = printed(TENSOR_PARALLEL.format(paths=paths, store=tmp_path / "store")).splitlines()
    assert sorted(line.split(",")[0] for line in lines) == ["rank 0: 2 of 2 rewritten", "rank 1: 2 of 2 rewritten"]


FORKED = """
import sys
sys.path[:0] = {paths!r}
import importlib
from tests.graphs import running_op_by_op
with running_op_by_op():
    sys.exit(importlib.import_module("14_workers").main(["--layers", "4", "--width", "1024"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps_rollup")
def test_forked_workers_share_packed_weights(printed):
    """Four at most 1.3 times the memory of one."""
    said = printed(FORKED.format(paths=[str(EXAMPLES.parent), str(EXAMPLES)]))
    assert "with 4 forked workers" in said and "same results: True" in said
