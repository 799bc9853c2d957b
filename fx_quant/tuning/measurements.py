"""Files that hold what was measured on a machine, for that machine and the sources that it was measured with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fx_quant.errors import FxQuantError

Found = TypeVar("Found")

_FORMAT = 1
# Far more than any tuner writes.
_MOST_BYTES = 4 << 20
_ELSEWHERE = "set FX_QUANT_CACHE_DIR to a folder that this user can read and write"


@dataclass(frozen=True)
class Kind:
    """What a file holds, in the words of its messages.

    Args:
        name: such as ``plans``.
        sources: what ``machine["sources"]`` is a hash of.
        command: measures anew, and with ``--reset`` deletes the file.
    """

    name: str
    sources: str
    command: str


def cache_folder() -> Path:
    """``FX_QUANT_CACHE_DIR``, else ``fx_quant`` in the user's folder for caches, which need not exist.

    Raises:
        FxQuantError: it starts with the home folder of a user who has none.
    """
    given = os.environ.get("FX_QUANT_CACHE_DIR")
    if given:
        return _expanded(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if not base and sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    if not base:
        base = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return _expanded(base) / "fx_quant"


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # an arbitrary uid, as containers have, is in no list of users
        raise FxQuantError(f"no home folder is known for {name}; {_ELSEWHERE}") from error


def file_path(name: str, lasting: str) -> Path:
    """The file of ``name`` for what ``lasting`` says of a machine.

    Raises:
        FxQuantError: as ``cache_folder``.
    """
    return cache_folder() / f"{name}-{hashlib.sha256(lasting.encode()).hexdigest()[:16]}.json"


def read(
    path: Callable[[], Path], machine: Mapping[str, Any], kind: Kind, parse: Callable[[Any], Found]
) -> Found | None:
    """What ``write`` saved for ``machine``, parsed; None, with a warning where it is unreadable, foreign or stale.

    Whatever is at ``path``, nothing raises or waits: a folder that cannot be read has one warning for every kind.

    Args:
        path: gives the path, or raises FxQuantError where there is none.
        parse: makes of the saved data what it means; ValueError, TypeError or KeyError when it is not of that form.
    """
    try:
        found = path()
    except FxQuantError as error:
        return _nowhere(str(error))
    try:
        text = _text(found)
    except (FileNotFoundError, NotADirectoryError):
        obstacle = _obstacle(found)
        return None if obstacle is None else _nowhere(f"{obstacle}; {_ELSEWHERE}")
    except (OSError, ValueError) as error:
        why = f"cannot be read ({_reason(error)})"
        return (
            _ignored(found, kind, f"it {why}")
            if _is_there(found)
            else _nowhere(f"{_short(found.parent)} {why}; {_ELSEWHERE}")
        )
    if text is None:
        return _ignored(found, kind, f"it is no file of at most {_MOST_BYTES >> 20} MiB")
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            return _ignored(found, kind, f"its format is {_short(data['format'])}, not {_FORMAT}")
        saved = dict(data["machine"])
        parsed = parse(data["tables"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        return _ignored(found, kind, f"it does not hold {kind.name} ({_short(error)})")
    here = json.loads(json.dumps(machine))
    others = [name for name in here if saved.get(name) != here[name]]
    if others == ["sources"]:
        return _ignored(found, kind, f"it was measured with other {kind.sources}")
    if others:
        return _ignored(found, kind, f"it was measured elsewhere: {others[0]} is {_short(saved.get(others[0]))} there")
    return parsed


def _text(path: Path) -> bytes | None:
    """What the file holds; None for what is no file, such as a FIFO, which is never waited for, and for too much."""
    if not stat.S_ISREG(path.stat().st_mode):
        return None
    # What was a file just now may be none any more.
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(opened, "rb") as file:
        text = file.read(_MOST_BYTES + 1)
    return text if len(text) <= _MOST_BYTES else None


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


def _obstacle(path: Path) -> str | None:
    """What stands where ``path`` or a folder above it should be; None where there is nothing yet."""
    for each in (path, *path.parents):
        try:
            mode = each.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if each.is_symlink():
                return f"{_short(each)} is a link to nothing"
            continue
        except (OSError, ValueError) as error:
            return f"{_short(each)} cannot be read ({_reason(error)})"
        return None if each == path or stat.S_ISDIR(mode) else f"{_short(each)} is no folder"
    return None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _short(what: object) -> str:
    """``what`` in at most 200 characters of one line."""
    text = str(what) if isinstance(what, Path) and str(what).isprintable() else repr(what)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-97:]}"


def _ignored(path: Path, kind: Kind, why: str) -> None:
    warnings.warn(
        f"fx_quant: the {kind.name} in {_short(path)} are ignored and the defaults used, because {why}. "
        f"Measure again with `{kind.command}`, or delete them with `{kind.command} --reset`.",
        stacklevel=2,
    )


def _nowhere(why: str) -> None:
    """Warn, in words that are the same for every kind, so that Python says them once."""
    warnings.warn(f"fx_quant: nothing that was measured is found and the defaults used, because {why}", stacklevel=2)


def check_path(path: Path, kind: Kind) -> None:
    """Nothing, where ``path`` could be written.

    Raises:
        FxQuantError: its folder, or the nearest one above it that exists, cannot be written.
    """
    obstacle = _obstacle(path.parent / "any")
    if obstacle is not None:
        raise _unwritable(path, kind, obstacle)
    there = next((folder for folder in path.parents if folder.exists()), None)
    if there is None or not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(path, kind, f"{_short(there or path.parent)} is no folder that this user can write")


def _unwritable(path: Path, kind: Kind, why: object) -> FxQuantError:
    return FxQuantError(f"{kind.name} must be written to {_short(path.parent)}, which failed: {why}; {_ELSEWHERE}")


def write(path: Path, machine: Mapping[str, Any], kind: Kind, tables: Any) -> Path:
    """Save ``tables``, which JSON can hold, for ``machine``: all or nothing.

    Raises:
        FxQuantError: the folder cannot be written.
    """
    data = {"format": _FORMAT, "machine": dict(machine), "tables": tables}
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.stem}-", suffix=".partial", delete=False
        ) as file:
            partial = Path(file.name)
            file.write(json.dumps(data, indent=1) + "\n")
        partial.replace(path)
    except (OSError, ValueError) as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise _unwritable(path, kind, _reason(error)) from error
    return path


def delete(path: Path) -> Path | None:
    """Delete the file; its path, or None where there was none.

    Raises:
        FxQuantError: it cannot be deleted.
    """
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise FxQuantError(
            f"{_short(path)} must be deleted, which failed ({_reason(error)}); delete it by hand"
        ) from error
    return path
