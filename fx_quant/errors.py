"""The exceptions of fx_quant: each says what must hold, what was found and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

# More names than this are not listed where some are near.
_LISTED = 60


class FxQuantError(Exception):
    """Base of every error that fx_quant raises on purpose."""


class UnknownNameError(FxQuantError, ValueError):
    """A name (option, target, kernel, numerics class, ...) that is not one of the known names."""


class ModelError(FxQuantError, ValueError):
    """A model or its inputs that cannot be run."""


class MissError(FxQuantError):
    """``strict=True`` and a quantized matmul was not rewritten, or a pass failed."""


class NoKernelError(FxQuantError, ValueError):
    """No kernel can run a problem on a target, or a forced kernel cannot. Carries every reason.

    Args:
        message: the reasons, in words.
        verdicts: what was asked of each kernel.
    """

    def __init__(self, message: str, verdicts: tuple = ()) -> None:
        super().__init__(message)
        self.verdicts = verdicts


class ToleranceError(FxQuantError, AssertionError):
    """``check()`` found a site whose error is larger than the caller allows."""


def must(holds: bool, message: str | Callable[[], str], error: type[Exception] = ValueError) -> None:
    """Raise ``error`` with ``message``, which is asked for only then where it is a function, unless it ``holds``."""
    if not holds:
        raise error(message if isinstance(message, str) else message())


def unknown_name(what: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for ``name`` not being in ``known``: near matches first, then all names, sorted, unless too many."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    listed = f" Known: {', '.join(names) or 'none'}." if len(names) <= _LISTED or not near else ""
    return UnknownNameError(f"unknown {what} {name!r}.{hint}{listed}")
