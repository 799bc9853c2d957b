"""The registry of flows: what each one is, what it needs, and what fx_quant is expected to make of it."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from tests.dialects.variants import Activation, Inputs, Variant, variants

Group = Literal["developers", "further"]
Expected = Literal["rewritten", "recognised", "prepare", "unsupported"]
Builder = Callable[[torch.dtype, bool], nn.Module]

# One module for each way to quantize; the order is the table's.
MODULES = (
    "hand",
    "hand_float8",
    "vllm",
    "gptq",
    "gguf",
    "hqq",
    "microscaling",
    "torchao_flows",
    "torchao_catalogue",
    "pt2e",
    "torch_ao",
    "compressed_tensors_flows",
    "quanto",
    "nncf_flows",
    "bitsandbytes_flows",
    "whole_models",
)


@dataclass(frozen=True)
class Flow:
    """One way to quantize a linear layer, or a model of them.

    Args:
        name: as in the table.
        build: ``(dtype, bias) -> module``, already quantized and in eval mode.
        what: the module's formula or API in a line.
        group: ``developers`` must be as expected for the command to end with 0.
        expected: ``rewritten``; ``recognised``, understood but left because no kernel is faster (rewritten is fine
            too); ``prepare``, no matmul reaches a graph before the modules are converted; ``unsupported``, a miss with
            a reason.
        why: the reason of any expectation but ``rewritten``.
        matmuls: how many quantized matmuls the module has; fewer in the report is a silent miss.
        others: further contractions of quantized operands that no kernel is for, such as convolutions; each is missed.
        needs: distributions that must be installed, such as ``torchao``.
        dtypes: those that the module can be built with.
        inputs: makes ``(args, kwargs)`` for a variant.
        only: whether a variant makes sense.
        whole_model: rank and bias are the model's own, so it has fewer variants.
        gpu_only: eager raises on a CPU, so that the graph alone is looked at.
    """

    name: str
    build: Builder
    what: str
    group: Group = "further"
    expected: Expected = "rewritten"
    why: str = ""
    matmuls: int = 1
    others: int = 0
    needs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    inputs: Inputs = field(default_factory=Activation)
    only: Callable[[Variant], bool] | None = None
    whole_model: bool = False
    gpu_only: bool = False

    def __post_init__(self) -> None:
        if self.group not in get_args(Group) or self.expected not in get_args(Expected):
            raise ValueError(f"flow {self.name!r}: no such group or expectation: {self.group!r}, {self.expected!r}")
        if bool(self.why) == (self.expected == "rewritten"):
            raise ValueError(f"flow {self.name!r}: say why exactly where the expectation is not 'rewritten'")

    def missing(self) -> tuple[str, ...]:
        """The distributions in ``needs`` that are not installed."""
        return tuple(name for name in self.needs if not installed(name))

    def variants(self, which: str) -> tuple[Variant, ...]:
        """The variants of this flow among ``few`` or ``all``."""
        return tuple(
            variant
            for variant in variants(which, whole_model=self.whole_model)
            if variant.dtype in self.dtypes and (self.only is None or self.only(variant))
        )


FLOWS: dict[str, Flow] = {}


def flow(name: str, **fields: Any) -> Callable[[Any], Any]:
    """Register the decorated builder, or module class taking ``(dtype, bias)``, as the flow ``name``.

    Raises:
        ValueError: the name is taken, or a field does not hold.
    """

    def register(build: Any) -> Any:
        if name in FLOWS:
            raise ValueError(f"flow {name!r} is already registered; give it another name")
        what = " ".join((build.__doc__ or "").split("\n\n")[0].split())
        FLOWS[name] = Flow(name, build, **{"what": what, **fields})
        return build

    return register


def load() -> dict[str, Flow]:
    """Every flow by name. Importing a flow's module needs none of the libraries; building it does."""
    for module in MODULES:
        importlib.import_module(f"tests.dialects.{module}")
    return FLOWS


def matching(patterns: Sequence[str] = (), group: str = "all") -> list[Flow]:
    """The flows of ``group`` whose name is, or matches as a glob, one of ``patterns``; all for no pattern.

    Raises:
        LookupError: a pattern that no flow matches.
    """
    flows = list(load().values())
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(each.name, pattern) for each in flows):
            raise LookupError(f"no flow matches {pattern!r}; the flows are {', '.join(FLOWS)}")
    # A name that is asked for is wanted whatever its group.
    if patterns:
        return [each for each in flows if any(fnmatch.fnmatchcase(each.name, pattern) for pattern in patterns)]
    return [each for each in flows if group == "all" or each.group == group]


def installed(distribution: str) -> bool:
    """Whether the package ``distribution`` is there."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
