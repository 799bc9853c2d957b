"""Why a kernel cannot run: each requirement that is not met, by kind and in words. Code decides by kind alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """What a requirement is about."""

    PLATFORM = "platform"
    CAPABILITY = "capability"
    FEATURE = "feature"
    PACKAGE = "package"
    CODES = "codes"
    GRANULARITY = "granularity"
    SCALE_DTYPE = "scale_dtype"
    ZERO_POINT = "zero_point"
    OUT_DTYPE = "out_dtype"
    BIAS = "bias"
    ALIGNMENT = "alignment"
    MAX_K = "max_k"
    ROWS = "rows"
    CONSTANT_WEIGHT = "constant_weight"
    DISABLED = "disabled"
    DETERMINISTIC = "deterministic"


@dataclass(frozen=True)
class Unmet:
    """One requirement that is not met; prints as its text.

    Args:
        kind: what it is about.
        text: why it is not met, in words.
        name: the feature or the package that is missing; ``""`` of other kinds.
    """

    kind: Kind
    text: str
    name: str = ""

    def __str__(self) -> str:
        return self.text


DISABLED = Unmet(Kind.DISABLED, "is disabled")
COMPILER = "cpp_compiler"
# What is not met of each of several kernels, by its name.
Verdicts = Mapping[str, Sequence[Unmet]]


def lacks_only_compiler(unmet: Iterable[Unmet]) -> bool:
    """Whether a kernel with these unmet requirements would run once there is a C++ compiler."""
    return [(each.kind, each.name) for each in unmet] == [(Kind.FEATURE, COMPILER)]


def without_compiler(kernels: Iterable[str]) -> str:
    """What a machine without a C++ compiler loses, and how to get it: one line."""
    names = ", ".join(kernels)
    return f"No C++ compiler was found, so {names} cannot be used: install g++ or clang++, or set CXX to one."


def for_platform(unmet: Iterable[Unmet]) -> bool:
    """Whether a kernel with these unmet requirements is for the target's platform."""
    return all(each.kind is not Kind.PLATFORM for each in unmet)


def is_candidate(unmet: Iterable[Unmet]) -> bool:
    """Whether a kernel with these unmet requirements is for the target's platform and for the problem's codes.

    A reader asks of such a kernel why it was not chosen, and of no other.
    """
    return all(each.kind not in (Kind.PLATFORM, Kind.CODES) for each in unmet)


def in_words(verdicts: Verdicts, can_run: str = "can run, lower priority") -> dict[str, list[str]]:
    """The texts of ``verdicts``; ``can_run`` for a kernel that meets all."""
    return {kernel: list(map(str, unmet)) or [can_run] for kernel, unmet in verdicts.items()}


def as_data(verdicts: Verdicts) -> dict[str, list[dict[str, str]]]:
    """``verdicts`` as plain data, which ``from_data`` reads; nothing stands against a kernel that could have run."""
    return {
        kernel: [
            {"kind": each.kind.value, "text": each.text} | ({"name": each.name} if each.name else {}) for each in unmet
        ]
        for kernel, unmet in verdicts.items()
    }


def from_data(data: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, tuple[Unmet, ...]]:
    """The verdicts of which ``as_data`` made ``data``."""
    return {
        kernel: tuple(Unmet(Kind(each["kind"]), each["text"], each.get("name", "")) for each in unmet)
        for kernel, unmet in data.items()
    }
