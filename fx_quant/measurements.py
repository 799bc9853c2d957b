"""Files that hold what was measured on a machine, for that machine and the sources that it was measured with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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
    """``FX_QUANT_CACHE_DIR``, else ``fx_quant`` in the user's folder for caches, which need not exist."""
    given = os.environ.get("FX_QUANT_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if not base and sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    if not base:
        base = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(base).expanduser() / "fx_quant"


def file_path(name: str, lasting: str) -> Path:
    """The file of ``name`` for what ``lasting`` says of a machine."""
    return cache_folder() / f"{name}-{hashlib.sha256(lasting.encode()).hexdigest()[:16]}.json"


def read(path: Path, machine: Mapping[str, Any], kind: Kind, parse: Callable[[Any], Found]) -> Found | None:
    """What ``write`` saved for ``machine``, parsed; None, with a warning where it is unreadable, foreign or stale.

    Args:
        parse: makes of the saved data what it means; ValueError, TypeError or KeyError when it is not of that form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, kind, f"it cannot be read ({error})")
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            return _ignored(path, kind, f"its format is {data['format']!r}, not {_FORMAT}")
        saved = dict(data["machine"])
        found = parse(data["tables"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return _ignored(path, kind, f"it does not hold {kind.name} ({error!r})")
    here = json.loads(json.dumps(machine))
    others = [name for name in here if saved.get(name) != here[name]]
    if others == ["sources"]:
        return _ignored(path, kind, f"it was measured with other {kind.sources}")
    if others:
        return _ignored(path, kind, f"it was measured elsewhere: {others[0]} is {saved.get(others[0])!r} there")
    return found


def _ignored(path: Path, kind: Kind, why: str) -> None:
    warnings.warn(
        f"fx_quant: the {kind.name} in {path} are ignored and the defaults used, because {why}. "
        f"Measure again with `{kind.command}`, or delete them with `{kind.command} --reset`.",
        stacklevel=2,
    )


def check_path(path: Path, kind: Kind) -> None:
    """Nothing, where ``path`` could be written.

    Raises:
        FxQuantError: its folder, or the nearest one above it that exists, cannot be written.
    """
    there = next(folder for folder in path.parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise _unwritable(path, kind, f"{there} is no folder that this user can write")


def _unwritable(path: Path, kind: Kind, why: object) -> FxQuantError:
    return FxQuantError(
        f"{kind.name} must be written to {path.parent}, which failed: {why}; set FX_QUANT_CACHE_DIR to another folder"
    )


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
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise _unwritable(path, kind, error) from error
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
    except OSError as error:
        raise FxQuantError(f"{path} must be deleted, which failed ({error}); delete it by hand") from error
    return path
