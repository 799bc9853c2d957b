"""torchvision, which timm imports and transformers too where it is installed, beside a build of PyTorch that is not its own."""

from __future__ import annotations

import contextlib
import importlib

import torch


def import_torchvision() -> None:
    """Import torchvision where it is installed; built for CUDA, beside PyTorch for CPUs, its own ops do not load.

    Then it does not import unless those of which it registers fakes are declared. No model of the matrix calls one.
    """
    with contextlib.suppress(ModuleNotFoundError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
            importlib.import_module("torchvision")
