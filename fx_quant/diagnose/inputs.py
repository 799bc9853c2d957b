"""Models and inputs that cannot be run: said in a line, before a compiler says it in its own words."""

from __future__ import annotations

import contextlib
import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError

import fx_quant.errors
from fx_quant.errors import FxQuantError, ModelError

_TORCH, _OURS = (str(Path(file).parent) + os.sep for file in (torch.__file__, fx_quant.errors.__file__))
# Modules of ours that a model is made of.
_LAYERS = f"{_OURS}layers{os.sep}"


def check_inputs(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Nothing, where ``model`` can be called with these.

    Raises:
        ModelError: it cannot be called, takes others, or has tensors without values.
    """
    if not callable(model):
        raise ModelError(f"the model must be a module or a function, got {type(model).__name__}: {str(model)[:40]!r}")
    if isinstance(model, nn.Module):
        tensors = (*model.named_parameters(), *model.named_buffers())
        if meta := [name for name, tensor in tensors if tensor.is_meta]:
            raise ModelError(
                f"the model is run once, so its tensors must have values, and {meta[0]} (of {len(meta)}) is on the "
                "meta device; load the weights, or make some: model.to_empty(device='cpu')"
            )
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(f"the model must take these inputs, and does not: {error}; it takes {signature}") from None


@contextlib.contextmanager
def failures_in_a_line() -> Iterator[None]:
    """Within, what PyTorch says of an op that fails on its inputs becomes a line.

    What the model's own code raises is left as it is.

    Raises:
        ModelError: an op of the model fails.
    """
    try:
        yield
    except TorchRuntimeError as error:
        stack = getattr(error, "real_stack", None)
        where = f" at {stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        raise _in_a_line(error.__cause__ or error, where) from error
    except (FxQuantError, TorchDynamoException):
        raise
    except Exception as error:
        if not _of_modules_alone(error):
            raise
        raise _in_a_line(error) from error


def _in_a_line(error: BaseException, where: str = "") -> ModelError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(f"the model fails on these inputs{where}: {said}")


def _of_modules_alone(error: Exception) -> bool:
    """Whether, behind us who called the model, only modules of PyTorch's and layers of ours were running."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    while files and files[0].startswith(_OURS) and not files[0].startswith(_LAYERS):
        del files[0]
    return bool(files) and all(file.startswith((_TORCH, _LAYERS)) for file in files)
