"""What is quantized how: granularities, operand specs and schemes, as data that prints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
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
SCALE_DTYPES: frozenset[torch.dtype] = FLOAT_DTYPES | FLOAT8_DTYPES | {torch.float8_e8m0fnu}


def float8_max(dtype: torch.dtype) -> float:
    """Largest code that quantizing to a float8 ``dtype`` gives: its largest value, but 224 for e4m3fnuz.

    Not its 240: codes and decoded values are then those of an e4m3fn weight after ``normalize_e4m3fn_to_e4m3fnuz``, bit
    for bit, so both kinds of hardware run one model. vLLM has 224 too.
    """
    return 224.0 if dtype is torch.float8_e4m3fnuz else torch.finfo(dtype).max


def scale_dtype_of(stored: torch.dtype | None) -> torch.dtype:
    """The dtype in which a kernel is given scales of dtype ``stored``, None where there are none: float32.

    Those of a byte, float8_e8m0fnu among them, stay as they are: they have no arithmetic, so no kernel widens them.
    """
    return torch.float32 if stored is None or stored.itemsize > 1 else stored


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float8_e4m3fn`` -> ``float8_e4m3fn``."""
    return str(dtype).removeprefix("torch.")


# In the shape of a block: all of the operand, as in vLLM's ``GroupShape``; and any size, in what a kernel requires.
WHOLE, ANY = -1, -2
# How many sizes each kind prints.
_SIZES = {"per_tensor": 0, "per_token": 0, "per_channel": 0, "per_group": 1, "per_block": 2, "unscaled": 0}


@dataclass(frozen=True)
class Granularity:
    """The shape of the block that shares one scale, of an activation ``[m, k]`` or a weight ``[n, k]``.

    ``PER_TENSOR`` is the whole operand; ``PER_TOKEN`` one row of the activation and ``PER_CHANNEL`` one of the weight
    (a column of ``b[k, n]``); ``per_group(g)`` ``g`` neighbours along k of a row, and ``per_block(r, c)`` ``r`` rows x
    ``c`` neighbours along k of the weight. ``UNSCALED`` is no scale, which is one scale of 1.

    Args:
        kind: one of the names above, in lower case: rows are called tokens in one operand and channels in the other.
        rows, columns: of the block. ``WHOLE`` is all there are, ``ANY`` a size that a requirement leaves open.
    """

    kind: str
    rows: int
    columns: int

    PER_TENSOR: ClassVar[Granularity]
    PER_TOKEN: ClassVar[Granularity]
    PER_CHANNEL: ClassVar[Granularity]
    UNSCALED: ClassVar[Granularity]
    ANY_GROUP: ClassVar[Granularity]
    ANY_BLOCK: ClassVar[Granularity]

    @classmethod
    def per_group(cls, size: int) -> Granularity:
        """One scale for each ``size`` neighbours along k."""
        return cls("per_group", 1, size)

    @classmethod
    def per_block(cls, rows: int, columns: int) -> Granularity:
        """One scale for each ``rows`` x ``columns`` of the weight ``[n, k]``."""
        return cls("per_block", rows, columns)

    @classmethod
    def of_block(cls, rows: int, columns: int, *, weight: bool = True) -> Granularity:
        """That of an operand, a ``weight`` or an activation, with one scale for ``rows`` x ``columns``.

        Groups are blocks of one row.
        """
        if columns == WHOLE and rows in (1, WHOLE):
            return cls.PER_TENSOR if rows == WHOLE else cls.PER_CHANNEL if weight else cls.PER_TOKEN
        return cls.per_group(columns) if rows == 1 else cls.per_block(rows, columns)

    @property
    def of_weight(self) -> bool:
        """Whether a weight can have it, of whatever size."""
        return self.kind in ("per_tensor", "per_channel", "per_group", "per_block")

    @property
    def of_activation(self) -> bool:
        """Whether an activation can have it, of whatever size."""
        return self.kind in ("per_tensor", "per_token", "per_group")

    @property
    def is_sized(self) -> bool:
        """Whether each of its sizes is one that a block can have."""
        return all(isinstance(size, int) and size > 0 for size in self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.rows, self.columns)[2 - _SIZES[self.kind] :]

    @property
    def block(self) -> tuple[int, int] | None:
        """``(rows, columns)`` where scales vary along k; None where whole rows share one."""
        return None if self.columns == WHOLE else (self.rows, self.columns)

    def block_within(self, rows: int, k: int) -> tuple[int, int]:
        """Rows and columns of the block in an operand ``[rows, k]``, at least 1: the whole of it in numbers."""
        return max(rows, 1) if self.rows == WHOLE else self.rows, max(k, 1) if self.columns == WHOLE else self.columns

    def covers(self, other: Granularity) -> bool:
        """Whether a requirement of this granularity is met by ``other``: equal, or of any size of the same kind.

        No scale is the scalar 1, which a kernel with one scale can take.
        """
        if self.kind != other.kind and (self, other) != (Granularity.PER_TENSOR, Granularity.UNSCALED):
            return False
        return self.rows in (ANY, other.rows) and self.columns in (ANY, other.columns)

    def __str__(self) -> str:
        sizes = self._sizes
        return self.kind if not sizes or ANY in sizes else f"{self.kind}({', '.join(map(str, sizes))})"


Granularity.PER_TENSOR = Granularity("per_tensor", WHOLE, WHOLE)
Granularity.PER_TOKEN = Granularity("per_token", 1, WHOLE)
Granularity.PER_CHANNEL = Granularity("per_channel", 1, WHOLE)
Granularity.UNSCALED = Granularity("unscaled", WHOLE, WHOLE)
Granularity.ANY_GROUP = Granularity.per_group(ANY)
Granularity.ANY_BLOCK = Granularity.per_block(ANY, ANY)


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
        offset: a float is added after the scale: ``codes * scale + offset``, of the granularity of the scales.
        scale_dtype: the dtype of the scales as the kernel is given them.
    """

    dtype: torch.dtype
    granularity: Granularity = Granularity.UNSCALED
    dynamic: bool = False
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32
    offset: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the operand is codes, rather than plain floating point."""
        return self.dtype not in FLOAT_DTYPES

    @property
    def packed(self) -> bool:
        """Whether codes have 4 bits, and lie two to a byte along k."""
        return self.dtype in INT4_DTYPES

    @property
    def codes_per_element(self) -> int:
        """How many codes one element of the tensor that holds them has."""
        return 2 if self.packed else 1

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the tensor that holds the codes."""
        return torch.uint8 if self.packed else self.dtype

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of ``[rows, k]`` that share a scale, as the canonical ops take them; None for whole rows."""
        return self.granularity.block

    @property
    def group(self) -> int | None:
        """How many neighbours along k share a scale; None where all do."""
        return None if self.block is None else self.block[1]

    def scales_along(self, k: int) -> int:
        """How many scales a row of ``k`` codes has."""
        return 1 if self.group is None else -(-k // self.group)

    def scale_shape(self, rows: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of ``[rows, k]``: one of two dims, ``()`` where one scale is for all."""
        if self.granularity.rows == WHOLE:
            return ()
        return -(-rows // self.granularity.rows), self.scales_along(k)

    def __str__(self) -> str:
        if not self.quantized:
            return dtype_name(self.dtype)
        asymmetric = "" if self.symmetric else " asymmetric"
        offset = " with offset" if self.offset else ""
        scales = "" if self.scale_dtype is torch.float32 else f" {dtype_name(self.scale_dtype)} scales"
        return f"{dtype_name(self.dtype)} {self.granularity}{asymmetric}{offset}{scales}"


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
        weight-only. A word of ``WORDS`` stands for a scheme, and it may be short as ``short_scheme`` prints it.

        Raises:
            ValueError: ``text`` is not of that form.
        """
        parts = _in_full(WORDS.get(text.strip().lower(), text)).split(" x ")
        if len(parts) != 2:
            raise ValueError(f"a scheme must read 'activation x weight', got {text!r}; {_EXAMPLE}")
        return cls(_parse_operand(parts[0], text, dynamic=True), _parse_operand(parts[1], text, dynamic=False))


# What people call a scheme, for weights of a linear in groups of 128 where there are groups.
WORDS: Mapping[str, str] = MappingProxyType(
    {
        "int8": "int8 per_token (dynamic) x int8 per_channel",
        "w8a8": "int8 per_token (dynamic) x int8 per_channel",
        "fp8": "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel",
        "fp8_block": "float8_e4m3fn per_group(128) (dynamic) x float8_e4m3fn per_block(128, 128)",
        "w4a8": "int8 per_token (dynamic) x int4 per_group(128)",
        "w8a16": "bfloat16 x int8 per_channel",
        "w4a16": "bfloat16 x int4 per_group(128)",
        "int4": "bfloat16 x int4 per_group(128)",
    }
)
# How a scheme is shortened, and read in full again.
_SHORT = (
    (r"float8_e4m3fn\b", "fp8", r"\b(?:fp8|float8)\b", "float8_e4m3fn"),
    (r"float8_e", "fp8_e", r"\bfp8_e", "float8_e"),
    (r"\bbfloat16\b", "bf16", r"\bbf16\b", "bfloat16"),
    (r"\bfloat(16|32)\b", r"f\1", r"\bf(?:p)?(16|32)\b", r"float\1"),
    (r"\bper_group\((\d+)\)", r"group\1", r"\bgroup(\d+)\b", r"per_group(\1)"),
    (r"\bper_block\((\d+), (\d+)\)", r"block\1x\2", r"\bblock(\d+)x(\d+)\b", r"per_block(\1, \2)"),
    (r"\bper_(tensor|token|channel)\b", r"\1", r"(?<!per_)\b(tensor|token|channel)\b", r"per_\1"),
    (r"\(dynamic\)", "dyn", r"\bdyn\b", "(dynamic)"),
    (r"\(static\)", "static", r"(?<!\()\bstatic\b", "(static)"),
    (r"\basymmetric\b", "asym", r"\basym\b", "asymmetric"),
    (r" with offset\b", " +offset", r" \+offset\b", " with offset"),
)


def short_scheme(text: str) -> str:
    """A scheme as it prints in few letters, for tables that must fit: ``int8 token dyn x int8 channel``."""
    for words, short, _, _ in _SHORT:
        text = re.sub(words, short, text)
    return text


def _in_full(text: str) -> str:
    for _, _, short, words in _SHORT:
        text = re.sub(short, words, text)
    return text


_EXAMPLE = "for example 'int8 per_token (dynamic) x int8 per_channel', or 'w8a8'"
_OPERAND = re.compile(
    r"(?P<dtype>\w+)(?: (?P<kind>per_\w+|unscaled)(?:\((?P<sizes>[\d, ]+)\))?)?(?P<asymmetric> asymmetric)?"
    r"(?P<offset> with offset)?(?: (?P<scale_dtype>\w+) scales)?(?: \((?P<when>dynamic|static)\))?"
)


def _parse_operand(part: str, text: str, *, dynamic: bool) -> OperandSpec:
    words = _OPERAND.fullmatch(part.strip())
    dtype = words and getattr(torch, words["dtype"], None)
    scale_dtype = words and getattr(torch, words["scale_dtype"] or "float32", None)
    if words is None or dtype not in CODE_DTYPES | INT4_DTYPES | FLOAT_DTYPES or scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"cannot read {part.strip()!r} in the scheme {text!r}; {_EXAMPLE}")
    granularity = _parse_granularity(words["kind"] or "unscaled", words["sizes"], text)
    is_dynamic = dynamic and dtype not in FLOAT_DTYPES and words["when"] != "static"
    return OperandSpec(dtype, granularity, is_dynamic, not words["asymmetric"], scale_dtype, bool(words["offset"]))


def _parse_granularity(kind: str, sizes: str | None, text: str) -> Granularity:
    numbers = tuple(map(int, sizes.split(","))) if sizes else ()
    if _SIZES.get(kind) != len(numbers):
        raise ValueError(
            f"a granularity must be one of {', '.join(_SIZES)}, got {kind}{f'({sizes})' if sizes else ''} in {text!r}"
        )
    return getattr(Granularity, kind)(*numbers) if numbers else getattr(Granularity, kind.upper())
