"""Regular expressions of a checkpoint, matched in bounded time: ``re`` may take for ever over ``(a+)+$``.

A pattern is followed over all positions of a name at once, kept as the bits of an integer, so that nothing is tried
twice. It means what it means to ``re``; what cannot be followed so (back-references, atomic groups) is refused.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fx_quant.loading.checkpoint_values import CheckpointError, must, said

if sys.version_info >= (3, 11):
    from re import _constants as ops
    from re import _parser as parser  # pyrefly: ignore [missing-module-attribute]
else:
    import sre_constants as ops
    import sre_parse as parser

_MOST_CHARACTERS = 2000
# For all names that are asked: less than a minute, and far more than patterns that select modules take.
_MOST_STEPS = 3_000_000
_CHECK = "check its config.json"

# As integers, whose operators take no time.
_DOTALL, _IGNORECASE, _MULTILINE = map(int, (re.DOTALL, re.IGNORECASE, re.MULTILINE))
_CHARACTERS = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)

Items = Sequence[tuple[Any, Any]]


class Patterns:
    """Regular expressions that a name is matched with from its beginning, as ``re.match`` does.

    Args:
        patterns: in the order in which they are tried.
        tail: an expression of ours that follows each.

    Raises:
        CheckpointError: one is no regular expression, or not one that can be matched in bounded time.
    """

    def __init__(self, patterns: Iterable[str], tail: str = "") -> None:
        self._parsed = [_parsed(pattern, tail) for pattern in patterns]
        self._steps = 0

    def first(self, name: str) -> str | None:
        """The first that matches ``name``; None where none does.

        Raises:
            CheckpointError: it takes too long.
        """
        return next((each.pattern for each in self._parsed if self._matches(each, name)), None)

    def _matches(self, each: _Parsed, name: str) -> bool:
        pattern, quick, repeats, parsed = each
        if repeats is not None:
            self._take(1 + (len(name) ** repeats >> 4), pattern)
            return quick.match(name) is not None
        try:
            return _Match(pattern, name, int(parsed.state.flags), self._take).run(parsed, 1) != 0
        except RecursionError:
            raise CheckpointError(f"{said(pattern)} must be a regular expression that nests less; {_CHECK}") from None

    def _take(self, steps: int, pattern: str) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise CheckpointError(
                f"{said(pattern)} must be a simpler regular expression, got one that takes too long; {_CHECK}"
            )


class _Parsed(NamedTuple):
    """A pattern, itself and as ``re`` has it, the number of its repeats where ``re`` is quick, and taken apart."""

    pattern: str
    compiled: re.Pattern[str]
    repeats: int | None
    items: Any


def _parsed(pattern: str, tail: str) -> _Parsed:
    must(
        len(pattern) <= _MOST_CHARACTERS,
        f"a regular expression must have at most {_MOST_CHARACTERS} characters, got {said(pattern)}; {_CHECK}",
    )
    whole = f"(?:{pattern}){tail}" if tail else pattern
    try:
        taken_apart: Any = parser.parse(pattern)
        return _Parsed(pattern, re.compile(whole), _repeats(taken_apart), parser.parse(whole))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{said(pattern)} must be a regular expression, got {error}; {_CHECK}") from error


def _repeats(items: Items) -> int | None:
    """How many parts repeat, where these are at most two of one character each: then ``re`` takes no longer than that
    power of a name's length. None for any other pattern.
    """
    simple = (*_CHARACTERS, ops.AT)
    bodies = [args[2] for op, args in items if op in (ops.MAX_REPEAT, ops.MIN_REPEAT)]
    rest = [op for op, _ in items if op not in (ops.MAX_REPEAT, ops.MIN_REPEAT)]
    is_quick = all(len(body) == 1 and body[0][0] in simple for body in bodies) and all(op in simple for op in rest)
    return len(bodies) if is_quick and len(bodies) <= 2 else None


class _Match:
    """One name: ``run`` takes the positions that it is at, bit i for position i, to those that it can be at next."""

    def __init__(self, pattern: str, name: str, flags: int, take: Callable[[int, str], None]) -> None:
        self.pattern, self.name, self.flags, self.take = pattern, name, flags, take
        self.masks: dict[tuple, int] = {}

    def run(self, items: Items, at: int) -> int:
        """The positions behind ``items``, all in turn, from any of ``at``."""
        for op, args in items:
            if not at:
                return 0
            self.take(1, self.pattern)
            at = self._one(op, args, at)
        return at

    def _one(self, op: Any, args: Any, at: int) -> int:
        if op in _CHARACTERS:
            return (at & self._mask(op, args)) << 1
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, body = args
            return self._repeat(least, most, body, at)
        if op is ops.BRANCH:
            return _union(self.run(branch, at) for branch in args[1])
        if op is ops.SUBPATTERN:
            _, added, removed, body = args
            before, self.flags = self.flags, (self.flags | added) & ~removed
            found = self.run(body, at)
            self.flags = before
            return found
        if op is ops.AT:
            return _union(1 << i for i in self._positions(at) if self._stands(args, i))
        if op in (ops.ASSERT, ops.ASSERT_NOT):
            direction, body = args
            holds = [i for i in self._positions(at) if self._asserted(direction, body, i) == (op is ops.ASSERT)]
            return _union(1 << i for i in holds)
        raise CheckpointError(
            f"{said(self.pattern)} must be a regular expression without back-references and atomic groups, got "
            f"{str(op).lower()}; write it without"
        )

    def _positions(self, at: int) -> list[int]:
        return [i for i in range(len(self.name) + 1) if at >> i & 1]

    def _repeat(self, least: int, most: int, body: Items, at: int) -> int:
        # Past as many rounds as there are positions, more of them change nothing.
        rounds = len(self.name) + 2
        is_character = len(body) == 1 and body[0][0] in _CHARACTERS
        mask = self._mask(*body[0]) if is_character else 0

        def once(at: int) -> int:
            return (at & mask) << 1 if is_character else self.run(body, at)

        for _ in range(min(least, rounds)):
            at = once(at)
        if is_character and most >= rounds:
            return self._along(mask, at)
        found = at
        for _ in range(min(most - least, rounds)):
            at = once(at)
            if not at & ~found:
                break
            found |= at
        return found

    def _along(self, mask: int, at: int) -> int:
        """Where a run of any length of ``mask`` leads: steps of 1, 2, 4 ... positions, all of which it takes."""
        step = 1
        while step <= len(self.name):
            at |= (at & mask) << step
            mask &= mask >> step
            step *= 2
        return at

    def _asserted(self, direction: int, body: Any, i: int) -> bool:
        if direction > 0:
            return self.run(body, 1 << i) != 0
        start = i - body.getwidth()[0]
        return start >= 0 and self.run(body, 1 << start) >> i & 1 == 1

    def _stands(self, where: Any, i: int) -> bool:
        name = self.name
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            lines = where is ops.AT_BEGINNING and self.flags & _MULTILINE
            return i == 0 or bool(lines and name[i - 1] == "\n")
        if where is ops.AT_END:
            lines = self.flags & _MULTILINE
            return i == len(name) or (name[i] == "\n" and bool(lines or i == len(name) - 1))
        if where is ops.AT_END_STRING:
            return i == len(name)
        is_boundary = _is_word(name[i - 1 : i]) != _is_word(name[i : i + 1])
        return is_boundary == (where is ops.AT_BOUNDARY)

    def _mask(self, op: Any, args: Any) -> int:
        """The positions of characters that ``op`` takes."""
        key = (op, args if isinstance(args, int) else id(args), self.flags)
        if key not in self.masks:
            self.masks[key] = _union(bits for c, bits in _places(self.name) if self._takes(op, args, c))
        return self.masks[key]

    def _takes(self, op: Any, args: Any, c: str) -> bool:
        if op is ops.LITERAL and not self.flags & _IGNORECASE:
            return ord(c) == args
        if op is ops.ANY:
            return bool(self.flags & _DOTALL) or c != "\n"
        choices = args if op is ops.IN else ((ops.LITERAL, args),)
        negated = op is ops.NOT_LITERAL or choices[0][0] is ops.NEGATE
        cases = {c, c.lower(), c.upper()} if self.flags & _IGNORECASE else {c}
        return negated != any(_is_in(choices, each) for each in cases if len(each) == 1)


@functools.lru_cache(16)
def _places(name: str) -> tuple[tuple[str, int], ...]:
    """Each character of ``name`` and the positions it is at."""
    found: dict[str, int] = {}
    for i, c in enumerate(name):
        found[c] = found.get(c, 0) | 1 << i
    return tuple(found.items())


def _union(bits: Iterable[int]) -> int:
    found = 0
    for each in bits:
        found |= each
    return found


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


_CATEGORIES: dict[str, Callable[[str], bool]] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}


def _is_in(choices: Items, c: str) -> bool:
    """Whether one of ``choices`` is ``c``, whether or not they are negated."""
    for op, args in choices:
        if op is ops.LITERAL:
            found = ord(c) == args
        elif op is ops.RANGE:
            found = args[0] <= ord(c) <= args[1]
        else:
            name = str(args).removeprefix("CATEGORY_")
            found = op is ops.CATEGORY and _CATEGORIES[name.removeprefix("NOT_")](c) != name.startswith("NOT_")
        if found:
            return True
    return False
