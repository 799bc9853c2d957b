"""Triton's interpreter in a process of its own, because it replaces Triton for the whole of it.

What it computes wrongly is not asked of it: products of bfloat16, and casts to float8. Its cast to bfloat16 truncates.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from packaging.version import Version
from torch import Tensor

LEAST = "3.6"


def why_not() -> str | None:
    """What is missing for Triton to run here at all."""
    try:
        found = Version(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return f"needs triton>={LEAST}, which is not installed"
    return None if found >= Version(LEAST) else f"needs triton>={LEAST}, found {found}"


def why_no_interpreter() -> str | None:
    """What is missing for Triton's interpreter to run here."""
    numpy = Version(importlib.metadata.version("numpy"))
    if why_not() is None and Version(importlib.metadata.version("triton")) < Version("3.9") and numpy >= Version("2.4"):
        return f"the interpreter of triton<3.9 needs numpy<2.4, found {numpy}"
    return why_not()


needs_triton = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


compiler_is_real = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler"
)
every_variant = pytest.mark.skipif(
    os.environ.get("FX_QUANT_GATES") != "all",
    reason="tests/gpu_gates.py compiles each configuration once; FX_QUANT_GATES=all: in every variant",
)


def to_bytes(value: object) -> bytes:
    """``value`` with its tensors' strides, independent of the process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    _patch_once()


def _patch_once() -> None:
    """Let the interpreter replace what is in ``triton.language`` once, not at each launch and each inner call."""
    import triton.language as tl  # pyrefly: ignore[missing-import]
    from triton.runtime import interpreter  # pyrefly: ignore[missing-import]

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable[..., object]) -> object:
        seen = frozenset(lang.__name__ for lang in (tl, tl.core) if lang in function.__globals__.values())
        if seen not in patched:
            patch(function)
            patched.add(seen)
        return _Kept()

    interpreter._patch_lang = patch_once


class _Kept:
    """What was replaced in ``triton.language``, which stays so in a process that only interprets."""

    def restore(self) -> None:
        pass


def _answer(data: bytes) -> bytes:
    import fx_quant.kernels.triton.scaled_mm_kernels  # noqa: F401  (registers the ops)

    op, args, kwargs = from_bytes(data)
    return to_bytes(getattr(torch.ops.fx_quant, op)(*args, **kwargs))


def _answer_function(module: str, name: str, data: bytes) -> bytes:
    args, kwargs = from_bytes(data)
    return to_bytes(getattr(importlib.import_module(module), name)(*args, **kwargs))


@contextmanager
def interpreting() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets."""
    if why_no_interpreter() is not None:
        pytest.skip(why_no_interpreter())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start) as pool:
        yield pool


def ask(pool: ProcessPoolExecutor, op: str, *args: object, **kwargs: object) -> Tensor:
    """``fx_quant::<op>`` as the interpreter computes it."""
    return from_bytes(pool.submit(_answer, to_bytes((op, args, kwargs))).result(timeout=120))


def call(pool: ProcessPoolExecutor, function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """``function``, which must be at the top of its module, in the process that interprets."""
    data = to_bytes((args, kwargs))
    return from_bytes(pool.submit(_answer_function, function.__module__, function.__name__, data).result(timeout=120))
