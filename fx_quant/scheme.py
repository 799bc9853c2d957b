"""What is quantized how: granularities, operand specs and schemes, as data that prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch

FLOAT8_DTYPES: frozenset[torch.dtype] = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    }
)
INT8_DTYPES: frozenset[torch.dtype] = frozenset({torch.int8, torch.uint8})
CODE_DTYPES: frozenset[torch.dtype] = FLOAT8_DTYPES | INT8_DTYPES
# What weights are stored in, packed or not: integers of two dims or more, and floats of 8 bits.
STORED_DTYPES: frozenset[torch.dtype] = CODE_DTYPES | {torch.int32, torch.int64, torch.int16}
# pyrefly: ignore [missing-attribute]
INT4_DTYPES: frozenset[torch.dtype] = frozenset({torch.int4, torch.uint4})
HALF_DTYPES: frozenset[torch.dtype] = frozenset({torch.bfloat16, torch.float16})
FLOAT_DTYPES: frozenset[torch.dtype] = HALF_DTYPES | {torch.float32}


def float8_max(dtype: torch.dtype) -> float:
    """Largest code that quantizing to a float8 ``dtype`` gives: its largest value, but 224 for e4m3fnuz.

    Not its 240: codes and decoded values are then those of an e4m3fn weight after ``normalize_e4m3fn_to_e4m3fnuz``, bit
    for bit, so both kinds of hardware run one model. vLLM has 224 too.
    """
    return 224.0 if dtype is torch.float8_e4m3fnuz else torch.finfo(dtype).max


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float8_e4m3fn`` -> ``float8_e4m3fn``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Granularity:
    """Over what one scale is shared.

    ``PER_TOKEN`` is one scale for each row of the activation ``a[m, k]``; ``PER_CHANNEL`` one for each output column of
    ``b[k, n]`` (a row of the weight ``[n, k]``); ``per_group(g)`` one for each ``g`` neighbours along k of a row, and
    ``per_block(r, c)`` one for each ``r`` rows x ``c`` neighbours along k of the weight. ``UNSCALED`` is no scale.

    Args:
        kind: one of the names above, in lower case.
        size: ``(g,)`` or ``(r, c)``; empty for the other kinds, and for "of any size" in a requirement.
    """

    kind: str
    size: tuple[int, ...] = ()

    PER_TENSOR: ClassVar[Granularity]
    PER_TOKEN: ClassVar[Granularity]
    PER_CHANNEL: ClassVar[Granularity]
    UNSCALED: ClassVar[Granularity]
    ANY_GROUP: ClassVar[Granularity]
    ANY_BLOCK: ClassVar[Granularity]

    @classmethod
    def per_group(cls, size: int) -> Granularity:
        """One scale for each ``size`` neighbours along k."""
        return cls("per_group", (size,))

    @classmethod
    def per_block(cls, rows: int, columns: int) -> Granularity:
        """One scale for each ``rows`` x ``columns`` of the weight ``[n, k]``."""
        return cls("per_block", (rows, columns))

    @classmethod
    def of_block(cls, rows: int, columns: int) -> Granularity:
        """That of a weight ``[n, k]`` with one scale for ``rows`` x ``columns``: groups are blocks of one row."""
        return cls.per_group(columns) if rows == 1 else cls.per_block(rows, columns)

    def covers(self, other: Granularity) -> bool:
        """Whether a requirement of this granularity is met by ``other``: equal, or of any size of the same kind."""
        return self.kind == other.kind and self.size in ((), other.size)

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.size))})" if self.size else self.kind


Granularity.PER_TENSOR = Granularity("per_tensor")
Granularity.PER_TOKEN = Granularity("per_token")
Granularity.PER_CHANNEL = Granularity("per_channel")
Granularity.UNSCALED = Granularity("unscaled")
Granularity.ANY_GROUP = Granularity("per_group")
Granularity.ANY_BLOCK = Granularity("per_block")


class Numerics(IntEnum):
    """How far a rewrite may be from the source graph, smallest first.

    ``EXACT``: bit-equal in eager. ``SAME_ACCUM``: same codes and the same sum of products; the roundings of the
    epilogue may differ. ``REASSOCIATED``: scales moved across the sum. ``APPROXIMATE``: anything beyond.
    """

    EXACT = 0
    SAME_ACCUM = 1
    REASSOCIATED = 2
    APPROXIMATE = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class OperandSpec:
    """How one operand of a GEMM is quantized.

    Args:
        dtype: the dtype of the codes, ``torch.int4`` or ``torch.uint4`` for packed ones; a plain float dtype for an
            operand that is not quantized.
        granularity: over what a scale is shared.
        dynamic: the scale is computed from the tensor at run time (activations only).
        symmetric: the codes stand for ``codes * scale``, without a zero point.
    """

    dtype: torch.dtype
    granularity: Granularity = Granularity.UNSCALED
    dynamic: bool = False
    symmetric: bool = True

    @property
    def quantized(self) -> bool:
        """Whether the operand is codes, rather than plain floating point."""
        return self.dtype not in FLOAT_DTYPES

    @property
    def codes_per_element(self) -> int:
        """How many codes one element of the tensor that holds them has: two of 4-bit codes."""
        return 2 if self.dtype in INT4_DTYPES else 1

    def __str__(self) -> str:
        if not self.quantized:
            return dtype_name(self.dtype)
        return f"{dtype_name(self.dtype)} {self.granularity}{'' if self.symmetric else ' asymmetric'}"


@dataclass(frozen=True)
class Scheme:
    """Activation spec x weight spec; prints as ``int8 per_token (dynamic) x int8 per_channel``."""

    activation: OperandSpec
    weight: OperandSpec

    @property
    def weight_only(self) -> bool:
        """Whether only the weight is quantized."""
        return not self.activation.quantized

    def __str__(self) -> str:
        when = "" if self.weight_only else " (dynamic)" if self.activation.dynamic else " (static)"
        return f"{self.activation}{when} x {self.weight}"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that prints as ``text``: ``int8 per_token (dynamic) x int8 per_channel``.

        Without ``(dynamic)`` or ``(static)`` a quantized activation is dynamic. ``bfloat16 x int4 per_group(128)`` is
        weight-only.

        Raises:
            ValueError: ``text`` is not of that form.
        """
        parts = text.split(" x ")
        if len(parts) != 2:
            raise ValueError(f"a scheme must read 'activation x weight', got {text!r}; {_EXAMPLE}")
        return cls(_parse_operand(parts[0], text, dynamic=True), _parse_operand(parts[1], text, dynamic=False))


_EXAMPLE = "for example 'int8 per_token (dynamic) x int8 per_channel'"
_OPERAND = re.compile(
    r"(?P<dtype>\w+)(?: (?P<kind>per_\w+|unscaled)(?:\((?P<size>[\d, ]+)\))?)?(?P<asymmetric> asymmetric)?"
    r"(?: \((?P<when>dynamic|static)\))?"
)


def _parse_operand(part: str, text: str, *, dynamic: bool) -> OperandSpec:
    found = _OPERAND.fullmatch(part.strip())
    dtype = None if found is None else getattr(torch, found["dtype"], None)
    if found is None or dtype not in CODE_DTYPES | INT4_DTYPES | FLOAT_DTYPES:
        raise ValueError(f"cannot read {part.strip()!r} in the scheme {text!r}; {_EXAMPLE}")
    kind, size = found["kind"] or "unscaled", found["size"]
    sizes = {"per_group": 1, "per_block": 2}.get(kind, 0)
    granularity = Granularity(kind, tuple(map(int, size.split(","))) if size else ())
    if kind not in _KINDS or len(granularity.size) != sizes:
        raise ValueError(
            f"a granularity must be one of {', '.join(_KINDS)}, got {kind}{f'({size})' if size else ''} in {text!r}"
        )
    is_dynamic = dynamic and dtype not in FLOAT_DTYPES and found["when"] != "static"
    return OperandSpec(dtype, granularity, dynamic=is_dynamic, symmetric=not found["asymmetric"])


_KINDS = ("per_tensor", "per_token", "per_channel", "per_group", "per_block", "unscaled")
