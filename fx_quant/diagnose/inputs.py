"""Models and inputs that cannot be run: said in a line, before a compiler says it in its own words."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch._dynamo.exc import TorchRuntimeError

from fx_quant.errors import ModelError


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
    """Within, what Dynamo says of an op that fails on its inputs becomes a line.

    Raises:
        ModelError: an op of the model fails.
    """
    try:
        yield
    except TorchRuntimeError as error:
        cause = error.__cause__ or error
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        stack = getattr(error, "real_stack", None)
        where = f" at {stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        raise ModelError(f"the model fails on these inputs{where}: {said}") from error
