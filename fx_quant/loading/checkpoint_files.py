"""The files of a checkpoint: JSON, and the tensors of safetensors files, read one by one.

Nothing outside the checkpoint's folder is opened, whatever a file says or links to. One layout of links leads out of a
folder and is followed: that of the Hugging Face cache, from ``snapshots/<revision>`` to a file of ``blobs`` beside
``snapshots``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fx_quant.loading.checkpoint_values import CheckpointError, check_depth, must, said

_INDEX = "model.safetensors.index.json"
_MOST_BYTES = 1 << 28
# The dtypes of safetensors by what a parameter or buffer has to be to hold them; others are codes.
_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("F64", "F32", "F16", "BF16"), "float"),
    **dict.fromkeys(("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"), "integer"),
    "BOOL": "bool",
}


def path_of(directory: Path, name: str) -> Path:
    """The file called ``name`` of the checkpoint in ``directory``, which need not exist.

    Raises:
        CheckpointError: it is not below the folder, by its name or by a link.
    """
    must(
        all(part not in ("", ".", "..") and part.isprintable() and not {*part} & {*"\\:"} for part in name.split("/")),
        f"a file of a checkpoint must be named by a path below its folder, got {said(name)}; download it again",
    )
    path = directory / name
    try:
        home, real = directory.resolve(), path.resolve()
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError until Python 3.13
        raise CheckpointError(f"{path} must be a path that can be followed, got {error}; download it again") from error
    blobs = [folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"]
    must(
        real.is_relative_to(home) or real.parent in blobs,
        f"{path} must be in the folder of the checkpoint, got a link to {real}; put a copy of that file there if you "
        f"trust it{'' if is_there else ' (it does not exist)'}",
    )
    return path


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint.

    Raises:
        CheckpointError: there is no such file, or it is not that.
    """
    path = path_of(directory, name)
    must(path.is_file(), f"{path} must be a file of a Hugging Face checkpoint, got none; download the whole model")
    try:
        size = path.stat().st_size
        must(size <= _MOST_BYTES, f"{path} must be JSON of at most {_MOST_BYTES} bytes, got {size}; download it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}; download it again") from error
    must(isinstance(content, dict), f"{path} must be a JSON object, got {type(content).__name__}; download it again")
    check_depth(content, str(path))
    return content


def _weight_map(directory: Path) -> Mapping[str, str] | None:
    """The file of each tensor, by name; None for a checkpoint without an index."""
    path = path_of(directory, _INDEX)
    if not path.is_file():
        return None
    names = read_json(directory, _INDEX).get("weight_map")
    is_map = isinstance(names, dict) and bool(names) and all(isinstance(file, str) for file in names.values())
    must(is_map, f"{path} must have a weight_map from names to files, got {said(names)}; download it again")
    return names


class Files:
    """The tensors of a checkpoint's safetensors files, read one by one.

    A tensor that several files hold is that of the file which ``weight_map`` says.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointError: a file that is not there, is none of safetensors, or is not the checkpoint's own; an index that
            is not one of these files. So do all that reads a tensor.
    """

    def __init__(self, directory: Path) -> None:
        named = _weight_map(directory)
        names = named or {}
        self._file_of: dict[str, Any] = {}
        for file in sorted(set(names.values())) or ["model.safetensors"]:
            opened = _opened(path_of(directory, file))
            for key in opened.keys():  # noqa: SIM118  (no dict)
                must(
                    key in names or key not in self._file_of,
                    f"{directory / _INDEX} must say which file {said(key)} is in, as several hold it; download again",
                )
                if names.get(key, file) == file:
                    self._file_of[key] = opened
        lost = [name for name in names if name not in self._file_of]
        must(
            not lost,
            f"{directory / _INDEX} must name tensors that its files hold, got {', '.join(lost[:4])}; download it again",
        )

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, key: str) -> list[int]:
        """The shape of the tensor called ``key``."""
        return list(self._read(key, "get_slice").get_shape())

    def kind(self, key: str) -> str:
        """``float``, ``integer`` or ``bool``; ``codes`` for a dtype that is none of these, such as float8."""
        return _KINDS.get(self._read(key, "get_slice").get_dtype(), "codes")

    def tensor(self, key: str) -> Tensor:
        """A copy of the tensor called ``key``."""
        return self.mapped(key).clone()

    def mapped(self, key: str) -> Tensor:
        """The tensor called ``key``, which may be the file itself: to be read at once, as that may change."""
        return self._read(key, "get_tensor")

    def _read(self, key: str, how: str) -> Any:
        try:
            return getattr(self._file_of[key], how)(key)
        except Exception as error:  # a header may say what PyTorch cannot make, in many ways
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{key} must be a tensor that can be read, got {reason}; download it again"
            ) from error


def _opened(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError("reading a checkpoint needs safetensors, got none; pip install safetensors") from error
    must(
        path.is_file(),
        f"{path} must be there, got no such file (only safetensors are read); download the whole model",
    )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last where it cannot be mapped
        raise CheckpointError(f"{path} must be a safetensors file, got {error}; download it again") from error
