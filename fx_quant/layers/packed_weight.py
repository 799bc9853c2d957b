"""The weight of a linear, held once: as codes, or as the same codes in the layout that a kernel reads.

``PackedWeight`` goes from one form to the other. Codes are packed where nobody else can write to them: where nothing
but the module refers to their memory. Who asks a module for the ``weight`` that it holds packed is given ``LazyCodes``,
which costs nothing until it is read. Whatever refers to codes for longer than one call (a view, a NumPy array, an entry
of ``state_dict()``) makes the module hold codes, and they are packed again once nothing else refers to them. So all
writes are seen: those to codes by the rules of ``ops/constants.py``, and a packed weight is written to by nobody.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import Self

from fx_quant.errors import FxQuantError
from fx_quant.kernels.huge_pages import in_huge_pages, trim
from fx_quant.kernels.layouts import Held, code_dtype, pack_weight, packed_layout, unpack_weight
from fx_quant.kernels.select import Selection
from fx_quant.layers.references import is_own
from fx_quant.ops.fingerprint import Fingerprint, fingerprint

_WEIGHT = "weight"
HELD = "held"
# Held while a module goes from one form to the other.
_changing = threading.RLock()


class _Form:
    """How a module holds its weight; shared by its shallow copies, as its buffers are.

    Args:
        held: what the packed weight is, or was before codes were asked for; None until there is one.
        settled: its layout is that of a kernel that was called, and not of one that was expected to be.

    Attributes:
        words: ``held`` as one text under ``"held"``, for ``layers/traced.py``.
        lazy: what stands for the codes of the weight while it is packed.
    """

    __slots__ = ("_held", "lazy", "settled", "words")

    def __init__(self, held: Held | None = None, settled: bool = False) -> None:
        self.words = {HELD: ""}
        self.held = held
        self.settled = settled
        self.lazy: list[weakref.ref[LazyCodes]] = []

    @property
    def held(self) -> Held | None:
        return self._held

    @held.setter
    def held(self, held: Held | None) -> None:
        self._held = held
        self.words[HELD] = "" if held is None else f"{held.layout} {held.n} {held.k}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _Form, (self.held, self.settled)


class PackedWeight(nn.Module):
    """A module with a buffer ``weight`` of codes ``[n, k]``, of which it holds one copy.

    ``weight`` are the codes, however they are held: they are read, written to and assigned like any buffer, but in
    compiled code, where they are only read. ``state_dict()`` has them and ``load_state_dict`` takes them. Packed they
    are the buffer ``packed_weight`` instead, which is no part of the state dict: do not write to it.
    """

    packed_weight: Tensor | None
    _held_as: dict[str, str]

    def hold(self, codes: Tensor) -> None:
        """Make ``codes`` the weight, as they are."""
        self.register_buffer(_WEIGHT, _plain(codes))
        self.register_buffer("packed_weight", None, persistent=False)
        self._form = _Form()
        self._held_as = self._form.words

    @property
    def weight(self) -> Tensor:
        """The codes: those that are held, or what stands for them."""
        if _WEIGHT not in self._buffers:
            raise AttributeError(_WEIGHT)  # nn.Module goes on to look among its parameters
        weight, held = self.held_weight()
        if held is None:
            return weight
        if torch.compiler.is_compiling():
            return torch.ops.fx_quant.unpack(weight, held.layout, held.n, held.k)
        return LazyCodes(self, weight, held)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """``(n, k)`` of the codes."""
        weight, held = self.held_weight()
        return tuple(weight.shape) if held is None else (held.n, held.k)

    def held_weight(self) -> tuple[Tensor, Held | None]:
        """The tensor that is held, and what it is where it is not the codes."""
        codes = self._buffers.get(_WEIGHT)
        if codes is not None:
            return codes, None
        form, packed = self._form, None
        held = form.held
        if _WEIGHT in self._buffers:
            packed = self.packed_weight
        if packed is None:
            return self._buffers.get(_WEIGHT, self._parameters.get(_WEIGHT)), None  # pyrefly: ignore [bad-return]
        # Another thread may have packed it in another layout meanwhile.
        return (packed, held) if torch.compiler.is_compiling() or form.held is held else self.held_weight()

    def weight_for(self, selection: Selection) -> tuple[Tensor, Held | None]:
        """``held_weight()`` for a call of the kernel of ``selection``: packed for it if it can be."""
        weight, held = self.held_weight()
        if weight.device.type != "cpu":
            return weight, held
        layout, form = selection.kernel.layout, self._form
        if held is None:
            del weight
            self._pack(layout, settled=True)
        elif form.settled or layout == held.layout:
            form.settled = True
            return weight, held
        else:
            # It was packed for what was expected to be called, or on another machine.
            del weight
            self.unpack()
            form.settled = self._pack(layout, settled=True) or self._pack(held.layout, settled=True)
        return self.held_weight()

    def can_pack(self, selection: Selection) -> bool:
        """Whether the kernel of ``selection`` has a layout of its own, which can hold the codes."""
        layout = selection.kernel.layout
        return layout is not None and _can_hold(layout, self._buffers.get(_WEIGHT))

    def pack(self, selection: Selection, *, owned: bool = False) -> None:
        """Hold the weight in the layout of the kernel of ``selection``, where that can hold it.

        Nothing changes where something else refers to the codes, or on other devices than a CPU.

        Args:
            owned: whatever else refers to the codes will not write to them.
        """
        self._pack(selection.kernel.layout, owned=owned)

    def _pack(self, layout: str | None, *, settled: bool = False, owned: bool = False, at_an_end: bool = False) -> bool:
        """Hold the codes in ``layout``; whether that could be done."""
        buffers = self._buffers
        if layout is None or type(buffers.get(_WEIGHT)) is not Tensor:
            return False
        if not (owned or is_own(buffers, _WEIGHT, at_an_end=at_an_end)) or not _can_hold(layout, buffers[_WEIGHT]):
            return False
        with _changing:
            codes = buffers[_WEIGHT]
            if codes is None:
                return False
            held = Held(layout, *codes.shape)
            with torch.inference_mode(False):
                packed = pack_weight(codes, layout)
            del codes
            # Nobody took them meanwhile.
            if not (owned or is_own(buffers, _WEIGHT, at_an_end=at_an_end)):
                return False
            self._form.held, self._form.settled = held, settled
            self._put_back(packed)
            return True

    def _put_back(self, packed: Tensor) -> None:
        # In this order, as other threads read what is held.
        self.packed_weight = packed
        self._buffers[_WEIGHT] = None

    def unpack(self) -> Tensor:
        """Hold the codes as they are, and return them."""
        with _changing:
            codes, held = self.held_weight()
            if held is not None:
                packed, codes = codes, _unpacked(codes, held)
                self._buffers[_WEIGHT] = codes
                self.packed_weight = None
                for reference in self._form.lazy:
                    lazy = reference()
                    if lazy is not None and lazy.packed is packed:
                        lazy.codes = codes
                self._form.lazy.clear()
            return codes

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _plain(value))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        packed, held = self.held_weight()
        if held is not None and fn(packed.new_empty(0)).device != packed.device:
            self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if _WEIGHT in self._buffers:
            self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._form.held is not None and not keep_vars:
            _pack_after(destination[f"{prefix}{_WEIGHT}"], self)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **named: Any) -> None:
        _, held = self.held_weight()
        if held is not None:
            self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *arguments, **named)
        if held is not None:
            self._pack(held.layout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held_as = self._form.words
        self._form.settled = False  # it may be another machine
        packed = self.packed_weight
        if type(packed) is Tensor and not packed.is_shared():
            self.packed_weight = in_huge_pages(packed)


def _unpacked(packed: Tensor, held: Held) -> Tensor:
    """The codes ``[n, k]`` of ``packed``, even where the caller only traces."""
    with torch.inference_mode(False), _disable_current_modes():
        return unpack_weight(packed, held.layout, held.n, held.k)


def _can_hold(layout: str, codes: Tensor | None) -> bool:
    """Whether ``codes`` are plain ones of this process, which ``layout`` holds in as many bytes."""
    return (
        codes is not None
        and codes.device.type == "cpu"
        and codes.layout is torch.strided
        and codes.dim() == 2
        and codes.numel() > 0
        and packed_layout(layout).holds(codes.dtype)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
    )


def _pack_after(tensor: Tensor, module: PackedWeight) -> None:
    """Let ``module`` pack its codes when ``tensor``, which refers to them, is gone."""
    finalizer = weakref.finalize(tensor, _pack_again, weakref.ref(module))
    finalizer.atexit = False  # pyrefly: ignore [missing-attribute]


def _pack_again(reference: weakref.ref[PackedWeight]) -> None:
    # Runs anywhere: where a graph is traced, and in a thread that waits for another one.
    module = reference()
    if module is None or torch._guards.TracingContext.try_get() is not None or not _changing.acquire(blocking=False):
        return
    try:
        held = module._form.held
        if held is not None and module._buffers.get(_WEIGHT) is not None:
            module._pack(held.layout, settled=module._form.settled, at_an_end=True)
            trim()  # of what was a state dict
    finally:
        _changing.release()


# --- what stands for codes --------------------------------------------------------------------------------------


class LazyCodes(Tensor):
    """The codes of a module that holds them packed: any function of them is called with the codes themselves.

    Its shape, dtype and device are known without. It stands for one tensor, whatever becomes of the module: when that
    unpacks its weight for anybody, this is that tensor too, and where the module was given another weight it is what
    the module held. A module that nothing refers to the codes of after the call holds them packed again.
    """

    module: PackedWeight
    packed: Tensor  # to which nobody writes
    held: Held
    codes: Tensor | None

    @staticmethod
    def __new__(cls, module: PackedWeight, packed: Tensor, held: Held) -> LazyCodes:
        """What stands for the codes of ``module``, which holds them as ``held`` says of ``packed``."""
        dtype = code_dtype(held.layout, packed.dtype)
        self = Tensor._make_wrapper_subclass(cls, (held.n, held.k), dtype=dtype, device=packed.device)
        self.module, self.codes = module, None
        self.stand_for(packed, held)
        return self

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def stand_for(self, packed: Tensor, held: Held) -> None:
        """Be the codes of ``packed``, which the module holds."""
        self.packed, self.held = packed, held
        # It also makes torch.utils.swap_tensors, which would swap this object alone, refuse it.
        living = [reference for reference in self.module._form.lazy if reference() is not None]
        self.module._form.lazy = [*living, weakref.ref(self)]

    def as_codes(self) -> Tensor:
        """The codes."""
        with _changing:
            if self.codes is None and self.module.held_weight()[0] is self.packed:
                self.module.unpack()
            if self.codes is None:
                self.codes = _unpacked(self.packed, self.held)
            return self.codes

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _OF_ITSELF and args[0].codes is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _on_codes(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyrefly: ignore [bad-override]
        raise FxQuantError(
            f"the weight of a quantized linear must be a plain tensor to {func}, got one that is packed for a kernel; "
            "give it layer.weight.clone()"
        )


_OF_ITSELF = frozenset(
    {
        *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.get_device, Tensor.__hash__),
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "requires_grad", "grad"),
                *("grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested"),
            )
        ),
    }
)


def _plain(value: Any) -> Any:
    """``value``, or the codes that it stands for, which two modules share from then on."""
    return value.as_codes() if isinstance(value, LazyCodes) else value


class _Loan:
    """The codes that ``lazy`` stands for, for one call."""

    def __init__(self, lazy: LazyCodes) -> None:
        self._lazy = lazy
        was_packed = lazy.codes is None
        codes = lazy.as_codes()
        # To tell whether the call wrote to them: not all writes raise a version.
        self._before: tuple[Tensor, Fingerprint | None] | None = None
        if was_packed and lazy.module._buffers.get(_WEIGHT) is codes:
            self._before = lazy.packed, fingerprint(codes)

    def end(self) -> None:
        """Let the module hold its weight packed again, unless something refers to the codes."""
        lazy, module = self._lazy, self._lazy.module
        buffers, held = module._buffers, module._form.held
        with _changing:
            if held is None or lazy.codes is None or buffers.get(_WEIGHT) is not lazy.codes:
                return
            lazy.codes = None
            if is_own(buffers, _WEIGHT):
                if self._before is not None and _has(buffers, self._before[1]):
                    module._put_back(self._before[0])
                else:
                    module._pack(held.layout, settled=module._form.settled)
            if buffers.get(_WEIGHT) is not None:
                lazy.codes = buffers[_WEIGHT]
                return
            now, held = module.held_weight()
            assert held is not None
            lazy.stand_for(now, held)


def _has(buffers: Mapping[str, Tensor | None], before: Fingerprint | None) -> bool:
    now = fingerprint(buffers[_WEIGHT])  # pyrefly: ignore [bad-argument-type]
    return now is not None and before is not None and now.same_bytes(before)


def _on_codes(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    lazy = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyCodes)}
    loans = [_Loan(x) for x in lazy.values()]
    try:
        # Not the very tensor, which somebody may want to swap for another; versions are counted together.
        codes = {key: x.as_codes() for key, x in lazy.items()}
        if func != Tensor.data.__set__:  # pyrefly: ignore [missing-attribute]
            codes = {key: x.detach() for key, x in codes.items()}
        args, kwargs = tree_map_only(LazyCodes, lambda x: codes[id(x)], (args, kwargs))
        out = func(*args, **kwargs)
        # What is written to in place is returned.
        out = next((lazy[key] for key, x in codes.items() if out is x), out)
        if func in _ALIASES:
            _pack_after(out, next(iter(lazy.values())).module)
    finally:
        del args, kwargs
        codes = None
        for loan in loans:
            loan.end()
    return out


# What people write through in one statement.
_ALIASES = frozenset({Tensor.detach, Tensor.data.__get__})  # pyrefly: ignore [missing-attribute]
