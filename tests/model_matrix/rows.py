"""Which rows the matrix has, and each of them by its name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from tests.model_matrix.measure import measure
from tests.model_matrix.models import MODELS
from tests.model_matrix.outcome import Outcome
from tests.model_matrix.torchvision import import_torchvision
from tests.model_matrix.uses import USES, use
from tests.model_matrix.ways import WAYS

PAIRS = {f"{model.name}, {way.name}": (model, way) for model in MODELS for way in WAYS}
BY_NAME = {each.name: each for each in USES}

# Of these the C++ is compiled too, where that is asked for.
COMPILED = (
    "llama, torchao W8A8",
    "gemma3, quantize_ W4A16",
    "bert, quantize_ W8A8",
    "mixtral, torchao 8da4w",
    "vit, torchao int8 weights",
    "whisper, compressed-tensors W8A8",
)


def names(patterns: Sequence[str] = ()) -> list[str]:
    """The rows whose name, or model, is one of ``patterns`` or matches it as a glob; all for no pattern.

    Raises:
        LookupError: a pattern that no row matches.
    """
    known = [*PAIRS, *BY_NAME]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in known):
            raise LookupError(f"no row matches {pattern!r}; the models are {', '.join(model.name for model in MODELS)}")
    return [name for name in known if not patterns or any(_matches(name, pattern) for pattern in patterns)]


def row(name: str, compiled: bool = False) -> Outcome:
    """The row ``name``, measured in this process."""
    import_torchvision()
    if name in BY_NAME:
        return use(BY_NAME[name])
    model, way = PAIRS[name]
    # Counting graphs takes longer than all else; what guards there are depends on the model.
    return measure(model, way, recompiles=way is WAYS[0], compiled=compiled and name in COMPILED)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.partition(",")[0] == pattern
