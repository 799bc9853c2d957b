"""Which ways a case is run in: those of PyTorch and those of other runtimes, by family."""

from __future__ import annotations

from collections.abc import Sequence

from cpu_cases import Case
from cpu_ggml import GGML_WAYS
from cpu_peers import TORCH_WAYS, Way
from cpu_runtimes import RUNTIME_WAYS

WAYS: tuple[Way, ...] = (*TORCH_WAYS, *RUNTIME_WAYS, *GGML_WAYS)
ALWAYS = ("fx_quant", "inductor")
FAMILIES = tuple(dict.fromkeys(way.family for way in WAYS))


def chosen(case: Case, peers: Sequence[str], *, quick: bool = False) -> list[Way]:
    """The ways that run ``case``; ours and plain Inductor, which ratios need, always.

    Args:
        peers: families, ``torch`` for all of PyTorch's, ``all`` for everything.
        quick: only those of the short benchmark.
    """
    torchs = {way.family for way in TORCH_WAYS}
    asked = {family for peer in peers for family in {"all": FAMILIES, "torch": torchs}.get(peer, (peer,))}
    return [
        way
        for way in WAYS
        if way.runs(case) and (way.name in ALWAYS or (way.family in asked and (way.quick or not quick)))
    ]
