"""Files that hold what was measured on a machine, for that machine and the sources that it was measured with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fx_quant.errors import FxQuantError

_FORMAT = 1
# Far more than any tuner writes.
_MOST_BYTES = 4 << 20
_ELSEWHERE = "set FX_QUANT_CACHE_DIR to a folder that this user can read and write"


class Machine(Protocol):
    """What a measurement holds for: a dataclass whose last field, ``sources``, is a hash of the code that was timed."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Key = TypeVar("Key")
MachineT = TypeVar("MachineT", bound=Machine)
Value = TypeVar("Value")


class Store(Generic[Key, MachineT, Value]):
    """What one tuner keeps: values by name, in one file for each machine.

    Args:
        name: of the values, such as ``plans``.
        sources: what the machine's ``sources`` is a hash of, in words.
        command: measures anew, and with ``--reset`` deletes the file.
        machine: the machine, by what of it may change while a process runs.
        to_data, from_data: a value as JSON holds it, and back; the latter raises ValueError, TypeError or KeyError for
            data that is not of that form.
    """

    def __init__(
        self,
        name: str,
        sources: str,
        command: str,
        machine: Callable[[Key], MachineT],
        to_data: Callable[[Value], Any],
        from_data: Callable[[Any], Value],
    ) -> None:
        self.name, self.sources, self.command = name, sources, command
        self._to_data, self._from_data = to_data, from_data
        self._loaded = functools.cache(lambda key: self.load(machine(key)))

    def path(self, machine: MachineT) -> Path:
        """Where the values of ``machine`` are; other sources do not change it, so that what is stale is found and said.

        Raises:
            FxQuantError: no folder is known, as ``cache_folder`` says.
        """
        lasting = repr(dataclasses.astuple(machine)[:-1])
        return cache_folder() / f"{self.name}-{hashlib.sha256(lasting.encode()).hexdigest()[:16]}.json"

    def in_force(self, key: Key) -> Mapping[str, Value]:
        """What was saved for the machine of ``key``; read once per process, until something is saved or reset."""
        return self._loaded(key)

    def forget(self) -> None:
        """Read what was saved anew when it is asked for next. Graphs that are compiled keep what they were given."""
        self._loaded.cache_clear()

    def load(self, machine: MachineT) -> Mapping[str, Value]:
        """What was saved for ``machine``; nothing, with a warning, where the file is unreadable, foreign or stale.

        Whatever is at the path, nothing raises or waits: a folder that cannot be read has one warning for every store.
        """
        return MappingProxyType(self._read(machine) or {})

    def _read(self, machine: MachineT) -> dict[str, Value] | None:
        try:
            path = self.path(machine)
        except FxQuantError as error:
            return _nowhere(str(error))
        try:
            text = _text(path)
        except (FileNotFoundError, NotADirectoryError):
            obstacle = _obstacle(path)
            return None if obstacle is None else _nowhere(f"{obstacle}; {_ELSEWHERE}")
        except (OSError, ValueError) as error:
            why = f"cannot be read ({_reason(error)})"
            return (
                self._ignored(path, f"it {why}")
                if _is_there(path)
                else _nowhere(f"{_short(path.parent)} {why}; {_ELSEWHERE}")
            )
        if text is None:
            return self._ignored(path, f"it is no file of at most {_MOST_BYTES >> 20} MiB")
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                return self._ignored(path, f"its format is {_short(data['format'])}, not {_FORMAT}")
            saved = dict(data["machine"])
            values = {str(name): self._from_data(value) for name, value in data["tables"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            return self._ignored(path, f"it does not hold {self.name} ({_short(error)})")
        here = json.loads(json.dumps(dataclasses.asdict(machine)))
        others = [name for name in here if saved.get(name) != here[name]]
        if others == ["sources"]:
            return self._ignored(path, f"it was measured with other {self.sources}")
        if others:
            there = _short(saved.get(others[0]))
            return self._ignored(path, f"it was measured elsewhere: {others[0]} is {there} there")
        return values

    def _ignored(self, path: Path, why: str) -> None:
        warnings.warn(
            f"fx_quant: the {self.name} in {_short(path)} are ignored and the defaults used, because {why}. "
            f"Measure again with `{self.command}`, or delete them with `{self.command} --reset`.",
            stacklevel=2,
        )

    def check_writable(self, machine: MachineT) -> None:
        """Nothing, where values could be saved for ``machine``.

        Raises:
            FxQuantError: the folder, or the nearest one above it that exists, cannot be written.
        """
        path = self.path(machine)
        obstacle = _obstacle(path.parent / "any")
        if obstacle is not None:
            raise self._unwritable(path, obstacle)
        there = next((folder for folder in path.parents if folder.exists()), None)
        if there is None or not os.access(there, os.W_OK | os.X_OK):
            raise self._unwritable(path, f"{_short(there or path.parent)} is no folder that this user can write")

    def _unwritable(self, path: Path, why: object) -> FxQuantError:
        return FxQuantError(f"{self.name} must be written to {_short(path.parent)}, which failed: {why}; {_ELSEWHERE}")

    def save(self, values: Mapping[str, Value], machine: MachineT) -> Path:
        """Write ``values`` for ``machine``, all or nothing; they are in force from then on.

        Raises:
            FxQuantError: the folder cannot be written.
        """
        path = self.path(machine)
        tables = {name: self._to_data(value) for name, value in sorted(values.items())}
        data = {"format": _FORMAT, "machine": dataclasses.asdict(machine), "tables": tables}
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
            raise self._unwritable(path, _reason(error)) from error
        self.forget()
        return path

    def reset(self, machine: MachineT) -> Path | None:
        """Delete what was saved for ``machine``; the path, or None where there was nothing.

        Raises:
            FxQuantError: the file cannot be deleted.
        """
        self.forget()
        path = self.path(machine)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise FxQuantError(
                f"{_short(path)} must be deleted, which failed ({_reason(error)}); delete it by hand"
            ) from error
        return path


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


def _nowhere(why: str) -> None:
    """Warn, in words that are the same for every store, so that Python says them once."""
    warnings.warn(f"fx_quant: nothing that was measured is found and the defaults used, because {why}", stacklevel=2)
