"""What an adapter is, and the registry of them.

An adapter reads the modules of one library as ``QuantizedLinear``. Each is one file in this folder, or an entry point
of the group ``fx_quant.adapters``, and is found without another edit. Its file never imports the library when it is
imported: a module of the library in a model has imported it already.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fx_quant.errors import FxQuantError
from fx_quant.errors import must as _must
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.ops import decode
from fx_quant.scheme import FLOAT_DTYPES, Numerics
from fx_quant.weights import unpack_int4

ENTRY_POINT_GROUP = "fx_quant.adapters"


class NotSwappableError(FxQuantError, ValueError):
    """A module that cannot become a ``QuantizedLinear``: what must hold, what was found, what to do next."""


must = functools.partial(_must, error=NotSwappableError)


@dataclass(frozen=True, eq=False)
class Conversion:
    """One module, read.

    Args:
        linear: with the module's codes, scales and bias.
        weight: ``[n, k]`` that the module multiplies with, in its own dtype: what ``linear`` must decode to.
        numerics: how far results of ``linear`` are from the module's own: ``REASSOCIATED`` where its quantizer gives
            the codes and scales that the library gives, so that only the order of float operations differs.
        note: what makes them differ; empty if only the order of float operations does.
    """

    linear: QuantizedLinear
    weight: Tensor
    numerics: Numerics
    note: str = ""


@dataclass(frozen=True)
class Adapter:
    """How the modules of one library become ``QuantizedLinear``.

    Args:
        library: as pip knows it.
        effect: what its modules do to ``torch.compile``, after "<number> modules of <library>".
        recognizes: whether a module is one of the library's quantized ones, linear or not.
        describe: how the module is quantized, in as many words as are known without decoding it.
        check: raises ``ValueError`` with the reason where the module cannot be swapped, as far as that is known without
            decoding it.
        own_hooks: ids of the hooks on the module that the library itself put there.
        convert: the module, read; raises ``ValueError`` with the reason where it cannot be.
        finish: what remains to be done with a model once modules were swapped; returns what could not be done.
        compiles: a compiler sees into the modules, which are swapped only to be held once.
        let_go: drops what of the library keeps a module that was swapped alive.
    """

    library: str
    effect: str
    recognizes: Callable[[nn.Module], bool]
    describe: Callable[[nn.Module], str]
    check: Callable[[nn.Module], None]
    convert: Callable[[nn.Module], Conversion]
    own_hooks: Callable[[nn.Module], frozenset[int]] = lambda module: frozenset()
    finish: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    compiles: bool = False
    let_go: Callable[[nn.Module], None] = lambda module: None


_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> Adapter:
    """Add ``adapter`` to the registry.

    Raises:
        FxQuantError: another adapter is of the same library.
    """
    if _ADAPTERS.get(adapter.library, adapter) != adapter:
        raise FxQuantError(f"the library {adapter.library!r} must have one adapter, it has one already; remove either")
    _ADAPTERS[adapter.library] = adapter
    return adapter


def adapters(*, compiled: bool = False) -> tuple[Adapter, ...]:
    """All adapters by library: those of this folder and those of the entry points ``fx_quant.adapters``.

    Args:
        compiled: those too whose modules compile as they are.
    """
    _load_adapters()
    return tuple(adapter for _, adapter in sorted(_ADAPTERS.items()) if compiled or not adapter.compiles)


def adapter_of(module: nn.Module, *, compiled: bool = False) -> Adapter | None:
    """The adapter that recognizes ``module``, or None; ``compiled`` as for ``adapters``."""
    return next((adapter for adapter in adapters(compiled=compiled) if adapter.recognizes(module)), None)


@functools.cache
def _load_adapters() -> None:
    """Import every file beside this one, then the installed ones, once."""
    import fx_quant.loading.adapters as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()


def is_of(module: nn.Module, *packages: str) -> bool:
    """Whether a class that ``module`` inherits from is defined in one of ``packages``; imports none of them."""
    return any(
        cls.__module__ == package or cls.__module__.startswith(f"{package}.")
        for cls in type(module).__mro__
        for package in packages
    )


def decoded_weight(linear: QuantizedLinear) -> Tensor:
    """``(codes - zero_point) * scale`` of ``linear``, ``[n, k]`` in float32."""
    spec = linear.scheme.weight
    codes = unpack_int4(linear.weight, spec.dtype) if spec.packed else linear.weight
    return decode(codes, linear.weight_scale, linear.weight_zero_point, spec.block)


def difference(conversion: Conversion) -> str | None:
    """Why ``conversion`` is not the module's weight bit for bit; None if it is."""
    weight = conversion.weight
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight must be float32, bfloat16 or float16, got {weight.dtype}; cast the model first"
    wrong = decoded_weight(conversion.linear).to(weight.dtype) != weight
    if not wrong.any():
        return None
    return (
        f"its weight must be its codes times their scale, but {int(wrong.sum())} of {wrong.numel()} values are not: "
        "weight or scale was changed or cast after quantization; load the model again, in its own dtype"
    )


# Not what QuantizedLinear does by default, which divides in float32, as kernels do.
def float_codes(x: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None) -> Tensor:
    """``cast(clamp(round(x / scale + zero_point)))``, each step rounded to ``x``'s dtype, as libraries write it.

    The zero point is added before rounding; float8 codes are not rounded before the cast. A quotient that is NaN has no
    int8 code and gets that of 0: under a NaN or infinite scale the products are NaN nonetheless, as the library's are.

    Args:
        x: ``[..., k]``, float.
        scale: broadcastable to ``x``; taken in ``x``'s dtype.
        dtype: int8, all of -128 to 127 of it, or float8 up to its largest value.
        zero_point: integers like ``scale``, or None.
    """
    scaled = x / scale.to(x.dtype)
    if dtype.is_floating_point:
        return scaled.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    scaled = scaled.masked_fill(scaled.isnan(), 0)
    if zero_point is not None:
        scaled = scaled + zero_point.to(x.dtype)
    return scaled.clamp(-128, 127).round().to(dtype)
