"""Steps that may raise: that loses their own node or site, never the graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from fx_quant.errors import FxQuantError

log = logging.getLogger(__name__)

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """What a step raised instead of a result."""

    error: Exception

    def reason(self, step: str) -> str:
        """Why a matmul is missed, in words; a plain ``LookupError`` is how a step declines, and says it itself."""
        message = (str(self.error).strip() or "no message").splitlines()[0]
        if type(self.error) is LookupError:
            return message
        return f"{step} failed with {type(self.error).__name__}: {message}"


def attempt(step: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result | Failure:
    """What ``step`` returns, or what it raised; the traceback goes to the debug log.

    Raises:
        FxQuantError: what is raised on purpose is for the user.
    """
    try:
        return step(*args, **kwargs)
    except FxQuantError:
        raise
    except Exception as error:
        log.debug("%s failed", step, exc_info=True)
        return Failure(error)
