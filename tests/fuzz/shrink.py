"""Smaller programs with the same fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tests.fuzz.grammar import NAMES
from tests.fuzz.program import CALLS, NAME, Input, Program, Step, evaluate, execute_line


def shrink(program: Program, fails: Callable[[Program], bool], budget: int = 400) -> Program:
    """The smallest program found by dropping and replacing lines of ``program`` while it ``fails``.

    Args:
        budget: how many programs are tried.
    """
    progress = True
    while progress and budget > 0:
        progress = False
        for candidate in _smaller(program):
            budget -= 1
            if budget < 0:
                break
            if fails(candidate):
                program, progress = candidate, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    if len(program.returned) > 1:
        for i in range(len(program.returned)):
            yield _tidy(replace(program, returned=program.returned[:i] + program.returned[i + 1 :]))
    if program.between:
        yield replace(program, between=())
    for i in range(len(program.between)):
        yield replace(program, between=program.between[:i] + program.between[i + 1 :])
    if program.dynamic:
        yield replace(program, dynamic=False)
    if program.numerics != "reassociated":
        yield replace(program, numerics="reassociated")
    values = _values(program)
    for i in range(len(program.steps) - 1, -1, -1):
        yield from _without(program, i, values)
    for x in program.inputs:
        if "normal(" in x.text and "dtype=f32" not in x.text:
            text = re.sub(r"dtype=\w+", "dtype=f32", x.text)
            inputs = tuple(replace(each, text=text) if each is x else each for each in program.inputs)
            yield replace(program, inputs=inputs)


def _without(program: Program, i: int, values: dict[str, object]) -> Iterator[Program]:
    """``program`` without its line ``i``, whose users get what it read or a new input instead."""
    step = program.steps[i]
    rest = (*program.steps[:i], *program.steps[i + 1 :])
    if step.out is None:
        yield _tidy(replace(program, steps=rest))
        return
    value = values.get(step.out)
    if not isinstance(value, Tensor):
        return
    for name in dict.fromkeys(step.reads):
        other = values.get(name)
        if isinstance(other, Tensor) and (other.shape, other.dtype) == (value.shape, value.dtype):
            yield _tidy(_renamed(replace(program, steps=rest), step.out, name))
    for name in dict.fromkeys(step.reads):
        other = values.get(name)
        if (
            isinstance(other, Tensor)
            and other.shape == value.shape
            and other.is_floating_point() == value.is_floating_point()
        ):
            yield _tidy(_renamed(replace(program, steps=rest), step.out, name))
    if value.is_floating_point() and value.dtype is not torch.float8_e4m3fn and len(step.reads) > 0:
        name = f"x{100 + i}"
        sizes = ", ".join(map(str, (1, *value.shape)))
        made = Input(name, f"normal({sizes}, dtype={NAMES[value.dtype]})", False)
        yield _tidy(_renamed(replace(program, steps=rest, inputs=(*program.inputs, made)), step.out, name))


def _renamed(program: Program, old: str, new: str) -> Program:
    def rename(text: str) -> str:
        return NAME.sub(lambda match: new if match.group() == old else match.group(), text)

    steps = tuple(Step(rename(step.text), step.out) for step in program.steps)
    return replace(program, steps=steps, returned=tuple(new if name == old else name for name in program.returned))


def _tidy(program: Program) -> Program:
    """Without lines and inputs that nothing needs."""
    needed = set(program.returned)
    steps: list[Step] = []
    for step in reversed(program.steps):
        if step.out is None or step.out in needed:
            needed.update(step.reads)
            steps.append(step)
    for line in program.between:
        needed.update(NAME.findall(line))
    inputs = tuple(x for i, x in enumerate(program.inputs) if x.name in needed or (i == 0 and program.dynamic))
    return replace(program, steps=tuple(reversed(steps)), inputs=inputs)


def _values(program: Program) -> dict[str, object]:
    torch.default_generator.manual_seed(0)
    CALLS[0] = 0
    values: dict[str, object] = {x.name: evaluate(x.text, {}) for x in program.inputs}
    with torch.no_grad():
        for step in program.steps:
            if step.out is None:
                execute_line(step.text, values)
            else:
                values[step.out] = evaluate(step.text, values)
    return values
