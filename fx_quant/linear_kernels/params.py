"""The tensors of a layer, typed, and how one is replaced."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fx_quant.errors import FxQuantError, must


class LayerError(FxQuantError, AttributeError):
    """A layer that lacks an attribute that its kernel reads."""


@dataclass
class Params:
    """Quantized tensors of a layer. A subclass adds fields; a class variable in upper case names the attribute.

    ``from_layer`` reads each field from the attribute of that name; a field that may be None, or that has
    a default, may be missing.

    Args:
        weight: codes ``[n, k]``.
        weight_scale: its scales.
        input_scale: the activation's scale, of a static scheme.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None

    WEIGHT: ClassVar[str] = "weight"
    WEIGHT_SCALE: ClassVar[str] = "weight_scale"
    INPUT_SCALE: ClassVar[str] = "input_scale"

    @classmethod
    def called(cls, names: Sequence[str]) -> type[Self]:
        """These parameters of layers that call their tensors ``names``, in the order of the fields.

        Raises:
            ValueError: not one name for each field.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        must(
            len(names) == len(fields) and all(isinstance(name, str) for name in names),
            lambda: f"layer_param_names must be one name for each of {', '.join(fields)}, got {list(names)}",
        )
        attributes = {field.upper(): name for field, name in zip(fields, names, strict=True)}
        return type(cls.__name__, (cls,), {"__module__": cls.__module__, **attributes})

    @classmethod
    def from_layer(cls, layer: nn.Module) -> Self:
        """The parameters of ``layer``.

        Raises:
            LayerError: an attribute that may not be None is missing.
        """
        values: dict[str, Any] = {}
        for field, has_default, may_be_none in _fields(cls):
            name = getattr(cls, field.upper(), field)
            value = getattr(layer, name, None)
            if value is None and has_default:
                continue
            if value is None and not may_be_none:
                raise LayerError(
                    f"{type(layer).__name__} must have {name!r}, which {cls.__name__} reads; it has "
                    f"{_tensors_of(layer)}. Set it, or name another attribute with {cls.__name__}.{field.upper()}"
                )
            values[field] = value
        return cls(**values)


# Dynamo takes the result as it is: it can look neither into dataclasses nor at a cache.
@torch.compiler.assume_constant_result
def _fields(cls: type[Params]) -> tuple[tuple[str, bool, bool], ...]:
    return _found_fields(cls)


@functools.cache
def _found_fields(cls: type[Params]) -> tuple[tuple[str, bool, bool], ...]:
    """Of each field its name, whether it has a default, and whether it may be None."""
    return tuple(
        (
            field.name,
            field.default is not MISSING or field.default_factory is not MISSING,
            _may_be_none(field.type),
        )
        for field in dataclasses.fields(cls)
    )


def _may_be_none(annotation: Any) -> bool:
    # Read as text: a name that was imported for type checkers only cannot be evaluated.
    text = annotation if isinstance(annotation, str) else str(annotation)
    return re.search(r"\b(None|NoneType|Optional|Any)\b", text) is not None


def _tensors_of(layer: nn.Module) -> str:
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return ", ".join(name for name, _ in tensors) or "no tensors"


@dataclass
class FP8Params(Params):
    """Tensors of a float8 layer; ``input_scale_ub`` bounds the amax of a dynamic per-token scale."""

    input_scale_ub: Tensor | None

    INPUT_SCALE_UB: ClassVar[str] = "input_scale_ub"


@dataclass
class Int8Params(Params):
    """Tensors of an int8 layer; ``azp_adj`` ``[1, n]`` int32 is the sum of the weight's codes over k."""

    input_zero_point: Tensor | None
    azp_adj: Tensor | None

    INPUT_ZERO_POINT: ClassVar[str] = "input_zero_point"
    AZP_ADJ: ClassVar[str] = "azp_adj"


@dataclass
class MPParams(Params):
    """Tensors of a weight-only layer; int4 codes are packed two to a byte (``fx_quant.weights.pack_int4``)."""

    weight_zero_point: Tensor | None

    WEIGHT_ZERO_POINT: ClassVar[str] = "weight_zero_point"


def replace_parameter(layer: nn.Module, name: str, new: Tensor) -> None:
    """Put ``new`` in the place of the tensor ``name``, with the attributes that loaders left on it.

    A parameter stays one (without grad), a buffer stays one (as persistent as it was), and a plain attribute becomes
    a parameter.

    Raises:
        LayerError: ``layer`` has no such tensor.
    """
    old = getattr(layer, name, None)
    if not isinstance(old, Tensor):
        raise LayerError(f"{type(layer).__name__} must have a parameter {name!r} to replace, found {old!r}")
    if name in layer._buffers:
        replacement = new.detach()
        layer.register_buffer(name, replacement, persistent=name not in layer._non_persistent_buffers_set)
    else:
        replacement = nn.Parameter(new.detach(), requires_grad=False)
        vars(layer).pop(name, None)  # a plain attribute would hide the parameter
        layer.register_parameter(name, replacement)
    for key, value in vars(old).items():
        setattr(replacement, key, value)


def set_buffer(layer: nn.Module, name: str, new: Tensor) -> None:
    """Make ``new`` the non-persistent buffer ``name``, whatever was None under that name before."""
    if hasattr(layer, name):
        delattr(layer, name)
    layer.register_buffer(name, new, persistent=False)
