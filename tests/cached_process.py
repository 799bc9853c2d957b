"""Processes that compile three models, compare them with eager and print what fx_quant says, one after the other.

``python -m tests.cached_process CACHES,save|load|plain,FILE,aot|noaot ...``: a process for each argument, that has the imports
and nothing compiled. CACHES is the folder of Inductor's caches, FILE PyTorch's own package of artefacts, and the last
word whether AOTAutograd's cache is on.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import sys

import torch
import torch._functorch.config
import torch._inductor.compile_fx
from torch._dynamo.utils import counters

import fx_quant.backend  # noqa: F401  (once for all processes)
from tests import models
from tests.quick_compiles import compile_quickly


class Missed(torch.nn.Module):
    """A miss: one scale for each k cannot leave the sum."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.arange(64 * 64).to(torch.int8).reshape(64, 64))
        self.register_buffer("scale", torch.linspace(0.01, 0.02, 64))

    def forward(self, x):
        return x @ (self.codes.float() * self.scale).t()


class Rewritten(torch.nn.Module):
    """A weight-only int8 linear, with a float one behind it that trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.arange(64 * 64).to(torch.int8).reshape(64, 64))
        self.register_buffer("scale", torch.linspace(0.01, 0.02, 64))
        self.narrow = torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.narrow(x @ (self.codes.float() * self.scale[:, None]).t())


def compile_all(caches: str, mode: str, file: str, cache: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    path, lines = pathlib.Path(file), []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(f"{record.levelname} {record.getMessage()}")

    logging.getLogger("fx_quant").setLevel(logging.INFO)
    logging.getLogger("fx_quant").addHandler(Keep())
    torch._functorch.config.enable_autograd_cache = cache == "aot"
    if mode == "load":
        # Its C++ is not in the package: another machine compiles it anew, to the libraries that are here already.
        for library in path.parent.glob("caches/*/*.so"):
            folder = pathlib.Path(caches, library.parent.name)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, folder)
        assert torch.compiler.load_cache_artifacts(path.read_bytes()) is not None
    torch.manual_seed(0)
    for model, x, grad in (
        (torch.nn.Sequential(Missed(), torch.nn.GELU(), Rewritten()), torch.randn(5, 64), False),
        (torch.nn.Sequential(Rewritten()), torch.randn(5, 64), True),
        (models.POSITIVE["int8_int_mm"].build(torch.float32, True), models.inputs(torch.float32), False),
    ):
        with torch.set_grad_enabled(grad):
            out = torch.compile(model, backend="fx_quant")(x)
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-3)
        if grad:
            out.sum().backward()
    if mode == "save":
        path.write_bytes(torch.compiler.save_cache_artifacts()[0])
    hits = [counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]]
    sys.stdout.write(json.dumps({"hits": hits, "counters": counters["fx_quant"], "lines": lines}) + "\n")
    sys.stdout.flush()


def main(jobs: list[str]) -> None:
    compile_quickly()
    # What Dynamo and AOTAutograd import when they are first used, once for all processes.
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(2))
    torch._dynamo.reset()
    counters.clear()
    for job in jobs:
        child = os.fork()
        if child == 0:
            compile_all(*job.split(","))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{job} failed")


if __name__ == "__main__":
    main(sys.argv[1:])
