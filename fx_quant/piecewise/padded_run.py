"""A piece run by what was compiled for its number of rows, for the next size, or for all."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_quant.errors import FxQuantError
from fx_quant.piecewise.rows import Rows
from fx_quant.piecewise.sizes import Layout, SizePlan, numbers_at

log = logging.getLogger("fx_quant")

Run = Callable[..., Sequence[Any]]


class SizedPiece:
    """What runs a piece for any number of rows.

    A size is compiled when it is first needed: a server that sees few of them does not pay for the others at its start.

    Args:
        any_size: what was compiled for all numbers of rows.
        plan: sizes, and whether rows are padded to them.
        compile_for: compiles for a number of rows, given inputs of so many; what it returns takes all inputs.
        name: of the piece, for warnings.
    """

    def __init__(self, any_size: Run, plan: SizePlan, compile_for: Callable[[int, Sequence[Any]], Run], name: str):
        self._any_size, self._plan, self._compile_for, self._name = any_size, plan, compile_for, name
        self._largest = max(plan.sizes)
        self._position, self._dim, self._times = plan.reads
        self._runs: dict[int, Run] = {}
        self._compiled: dict[int, Run] = {}
        self._lock = threading.RLock()

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """The results of the piece."""
        value = inputs[self._position]
        rows = (value if self._dim is None else value.shape[self._dim]) // self._times
        if rows > self._largest:
            return self._any_size(*inputs)
        run = self._runs.get(rows)
        if run is None:
            with self._lock:
                run = self._runs[rows] = self._run_for(rows, inputs)
        return run(*inputs)

    def _run_for(self, rows: int, inputs: Sequence[Any]) -> Run:
        plan = self._plan
        if rows in plan.sizes:
            return self._size(rows, inputs)
        size = next(each for each in plan.sizes if each >= rows)
        if plan.unpadded or rows < 2:
            return self._any_size
        padded = Padded(plan, rows, size)
        run = self._size(size, padded.grown(inputs))
        return self._any_size if run is self._any_size else padded.around(run)

    def _size(self, size: int, inputs: Sequence[Any]) -> Run:
        """The piece for ``size`` rows, compiled if it was not; that for all where it cannot be compiled."""
        if size not in self._compiled:
            try:
                run = self._compile_for(size, inputs)
            except FxQuantError:
                raise
            except Exception as error:
                log.debug("compiling a size failed", exc_info=True)
                warnings.warn(
                    f"fx_quant: {self._name} could not be compiled for m = {size}, and runs as what was compiled for "
                    f"all m: {error!r}",
                    stacklevel=2,
                )
                self._compiled[size] = self._any_size
            else:
                self._compiled[size] = _with_numbers(run, self._plan, size)
        return self._compiled[size]


def _with_numbers(run: Run, plan: SizePlan, rows: int) -> Run:
    """``run``, with the numbers that it leaves out of its results."""
    numbers = numbers_at(plan, rows)
    if not numbers:
        return run

    def with_numbers(*inputs: Any) -> Sequence[Any]:
        results = run(*inputs)
        return [numbers.get(i, result) for i, result in enumerate(results)]

    return with_numbers


class Padded:
    """What makes ``size`` rows of ``rows`` before a piece, and ``rows`` of ``size`` after it.

    The rows that are added repeat the last: what cannot fault for that cannot fault for them.
    """

    def __init__(self, plan: SizePlan, rows: int, size: int) -> None:
        self._plan, self._rows, self._size = plan, rows, size
        self._grow = [
            (i, given[0], given[1].at(plan.symbol, size)) for i, given in enumerate(plan.inputs) if given is not None
        ]
        self._numbers = numbers_at(plan, rows)
        self._cut = [
            (i, state, made.at(plan.symbol, rows))
            for i, (state, made) in enumerate(zip(plan.states, plan.outputs, strict=True))
            if state is not None and isinstance(made, Layout)
        ]

    def grown(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs with ``size`` rows."""
        given = list(inputs)
        for i, at, layout in self._grow:
            given[i] = _grown(given[i], at, layout)
        return given

    def around(self, run: Run) -> Run:
        """``run``, for ``size`` rows, for ``rows`` of them."""

        def padded(*inputs: Any) -> Sequence[Any]:
            results = list(run(*self.grown(inputs)))
            for i, state, layout in self._cut:
                results[i] = _cut(results[i], state, self._rows, layout)
            for i, number in self._numbers.items():
                results[i] = number
            return results

        return padded


def _grown(value: Tensor, at: Rows, layout: Layout) -> Tensor:
    """``value`` laid out as ``layout``, its last row repeated for the rows that it lacks."""
    # Along a stride of 0 all is the same memory: one index of it is written.
    repeated = [dim for dim, stride in enumerate(layout.stride) if stride == 0 and layout.shape[dim] > 1]
    for dim in repeated:
        value = value.narrow(dim, 0, 1)
    shape = [1 if dim in repeated else size for dim, size in enumerate(layout.shape)]
    out = torch.empty_strided(shape, layout.stride, dtype=value.dtype, device=value.device)
    if at.dim in repeated:
        out.copy_(value)
    else:
        given, dim = value.shape[at.dim], at.dim
        out.narrow(dim, 0, given).copy_(value)
        last = value.narrow(dim, given - at.inner, at.inner).unsqueeze(dim)
        out.narrow(dim, given, shape[dim] - given).unflatten(dim, (-1, at.inner)).copy_(last)
    return out.expand(layout.shape) if repeated else out


def _cut(value: Tensor, at: Rows, rows: int, layout: Layout) -> Tensor:
    """The first ``rows`` rows of ``value``, laid out as ``layout``."""
    if at.outer == 1:
        cut = value.narrow(at.dim, 0, rows * at.inner)
    else:
        split = value.unflatten(at.dim, (at.outer, -1))
        cut = split.narrow(at.dim + 1, 0, rows * at.inner).flatten(at.dim, at.dim + 1)
    if all(size == 1 or have == want for size, have, want in zip(cut.shape, cut.stride(), layout.stride, strict=True)):
        return cut
    out = torch.empty_strided(layout.shape, layout.stride, dtype=cut.dtype, device=cut.device)
    return out.copy_(cut)
