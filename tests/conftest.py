"""What every test runs under: no downloads, no gradients left on, the same random numbers each time."""

from __future__ import annotations

import os

import pytest

# Before torch and transformers read it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


def pytest_collection_modifyitems(items):
    """Skip ``gpu`` tests, with the reason, where there is no accelerator."""
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from seed 0 and without compiled code of another test."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
