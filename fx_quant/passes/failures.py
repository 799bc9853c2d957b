"""What is said of a step that raised: it loses its own node or site, never the graph."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def failed(what: str, error: Exception) -> str:
    """Reason of a miss whose cause is an exception in ``what``; the traceback goes to the debug log."""
    log.debug("%s failed", what, exc_info=error)
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{what} failed with {type(error).__name__}: {message}"
