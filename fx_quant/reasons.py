"""Why a kernel is no candidate at all, in words that are written and read here."""

from __future__ import annotations

from collections.abc import Iterable

_PLATFORM, _CODES = "needs platform ", " matmul"
_COMPILER = "cpp_compiler"


def other_platform(needed: str, found: str) -> str:
    """The reason of a kernel that is for ``needed`` platforms, on a target of ``found``."""
    return f"{_PLATFORM}{needed}, target is {found}"


def other_codes(activation: str, weight: str) -> str:
    """The reason of a kernel that multiplies no codes of these dtypes."""
    return f"has no {activation} x {weight}{_CODES}"


def missing_feature(feature: str, arch: str) -> str:
    """The reason of a kernel that needs ``feature``, on a target of ``arch`` without it."""
    return f"needs {feature}, which {arch} has not"


def lacks_only_compiler(reasons: Iterable[str]) -> bool:
    """Whether a kernel with these unmet requirements would run once there is a C++ compiler."""
    return [reason.split(",")[0] for reason in reasons] == [f"needs {_COMPILER}"]


def without_compiler(kernels: Iterable[str]) -> str:
    """What a machine without a C++ compiler loses, and how to get it: one line."""
    names = ", ".join(kernels)
    return f"No C++ compiler was found, so {names} cannot be used: install g++ or clang++, or set CXX to one."


def for_platform(reasons: Iterable[str]) -> bool:
    """Whether a kernel with these unmet requirements is for the target's platform."""
    return not any(reason.startswith(_PLATFORM) for reason in reasons)


def is_candidate(reasons: Iterable[str]) -> bool:
    """Whether a kernel with these unmet requirements is for the target's platform and for the problem's codes.

    A reader asks of such a kernel why it was not chosen, and of no other.
    """
    reasons = tuple(reasons)
    return for_platform(reasons) and not any(reason.endswith(_CODES) for reason in reasons)
