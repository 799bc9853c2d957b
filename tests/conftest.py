"""What every test runs under: no downloads, no gradients left on, the same random numbers each time."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os

import pytest

# Before torch and transformers read it.
os.environ["HF_HUB_OFFLINE"] = "1"
# What reports fit, whatever terminal the tests run in.
os.environ["COLUMNS"] = "80"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for each other sleep: beside another worker's they would burn more time than the tests compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Inductor takes what this CPU says it has, instead of compiling and loading a probe of each instruction set for each
# empty cache; and no process to compile Triton in is started beside each one that compiles C++.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCH_WARM_POOL", "0")

import torch
import torch._functorch.config
import torch._inductor.config

from fx_quant.kernels.packed_weights import clear_packed_weights
from tests.fresh_process import torch_alone
from tests.graphs import running_op_by_op
from tests.quick_compiles import compile_as_shipped, compile_quickly
from tests.triton_interpreter import interpreting

compile_quickly()

# For a line of the log, Dynamo empties the CPU's caches and clocks the guards of all that it compiles: 30 ms each time.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

# pytest listens to every logger that does not propagate, and for a listener PyTorch prints every graph of every step.
logging.getLogger("torch.__trace").propagate = True

if importlib.util.find_spec("expecttest") is None:
    # As on GPU machines; PyTorch's own check imports it.
    torch.library.opcheck = lambda *_, **__: pytest.skip("torch.library.opcheck needs expecttest")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Nothing that is collected is garbage: looking for some took a third of the collection, and half a second each
    time that something asks for all garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        # Tracing makes many objects that live until its end: at the usual thresholds looking for garbage among them took a
        # twentieth of all tests' time.
        gc.set_threshold(50_000, 20, 10)


def pytest_unconfigure():
    """What is frozen would be called a leak at the end of the process."""
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    """Skip ``gpu`` tests, with the reason, where there is no accelerator."""
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Under ``make libraries`` a test that is skipped has failed: it installs what they need."""
    report = yield
    if report.skipped and "FX_QUANT_LIBRARIES" in os.environ:
        report.outcome, report.longrepr = "failed", f"did not run: {report.longrepr[-1]}"
    return report


if not torch.accelerator.is_available():
    # `torch.manual_seed` would format the stack for the day when there is one, which takes half a millisecond.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda _: None


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from seed 0 and without compiled code of another test."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def uncached():
    """No packed weight and no compiled graph of before: Inductor's cache does not know what our lowerings were."""
    clear_packed_weights()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    clear_packed_weights()


@pytest.fixture
def as_shipped():
    """What Inductor makes of a graph is optimised as it is for users: the claim is that its C++ is right at that level too."""
    with compile_as_shipped():
        yield


@pytest.fixture
def op_by_op():
    """What the passes leave of a graph that is compiled runs op by op: no C++ of Inductor's, where it is not the claim."""
    with running_op_by_op():
        yield


@pytest.fixture(scope="session")
def printed():
    """What code prints that runs in a process of its own, which has imported torch alone."""
    with torch_alone() as run:
        yield run


@pytest.fixture(scope="session")
def interpreter():
    """A process in which Triton interprets, for ``triton_interpreter.ask`` and ``call``."""
    with interpreting() as pool:
        yield pool
