"""One run of the command line: from its arguments to its exit status."""

from __future__ import annotations

import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

from fx_quant.cli.parser import parsed
from fx_quant.errors import FxQuantError

WRONG = 2
_INTERRUPTED, _CLOSED = 130, 141  # as shells report SIGINT and SIGPIPE
_PACKAGE = str(pathlib.Path(__file__).parent.parent)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 is success, 1 a check that failed, and 2 what its user has to put right: one line on standard error, or the
    traceback of the user's own code.
    """
    try:
        arguments = parsed(sys.argv[1:] if argv is None else argv)
        sys.path.insert(0, str(pathlib.Path.cwd()))
        status = arguments.run(arguments)
        sys.stdout.flush()
    except FxQuantError as error:
        print(f"fx_quant: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("fx_quant: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED
    except Exception as error:
        own = _of_user(error.__traceback__)
        if own is None:
            raise
        traceback.print_exception(type(error), error.with_traceback(own), own, chain=False)
        return WRONG
    return status


def _of_user(raised: TracebackType | None) -> TracebackType | None:
    """The part of a traceback from the user's code on; None where it is in none, or ends in ours."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(raised)]
    if not frames or frames[-1].startswith(_PACKAGE):
        return None
    while raised is not None:
        name = raised.tb_frame.f_code.co_filename
        if not name.startswith((_PACKAGE, "<")) and f"{os.sep}torch{os.sep}" not in name and "importlib" not in name:
            return raised
        raised = raised.tb_next
    return None
