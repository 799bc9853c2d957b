"""What compiled code reads of a quantized linear.

Whatever a trace reads of a module is looked at again in each call: an object once for each of its fields, a plain text
once, and not at all where PyTorch remembers that no dict of the module changed since, which only plain values allow.
So all that is no tensor is one text, and what it stands for is in a registry.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor, nn

from fx_quant.layers.activation import Quantizer
from fx_quant.layers.packed_weight import HELD, PackedWeight
from fx_quant.scheme import OperandSpec, Scheme

OF_ITS_OWN = " by a quantizer of its own"
# Scheme and quantizer of layers, by the text of ``registered``.
SAID: dict[str, tuple[Scheme, Quantizer | None]] = {}
_TOLD_BY_REPR = (bool, int, float, str, torch.dtype, OperandSpec)


def registered(scheme: Scheme, quantizer: Quantizer | None) -> str:
    """The text that stands for both in ``SAID``; it ends with ``OF_ITS_OWN`` where the layer must be asked."""
    quantized = _said_of(quantizer)
    text = sys.intern(f"{scheme}{quantized}")
    SAID.setdefault(text, (scheme, None if quantized == OF_ITS_OWN else quantizer))
    return text


def _said_of(quantizer: Quantizer | None) -> str:
    """Where a quantizer is found and what it is given; ``OF_ITS_OWN`` where that does not tell one from another."""
    if quantizer is None:
        return ""
    function, args, named = quantizer, (), {}
    if type(quantizer) is partial:
        function, args, named = quantizer.func, quantizer.args, quantizer.keywords
    home, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    found = getattr(sys.modules.get(home), name, None) is function
    if not found or args or not all(isinstance(value, _TOLD_BY_REPR) for value in named.values()):
        return OF_ITS_OWN
    return f" by {home}.{name} of {sorted(named.items(), key=str)}"


def buffer_of(module: nn.Module, name: str) -> Tensor:
    """``module``'s tensor ``name``, a buffer as a rule: then nothing but the buffers is looked at."""
    found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


def traced_codes(module: PackedWeight) -> Tensor:
    """``module.weight``."""
    buffers = module._buffers
    # A weight that was made a parameter is none of the buffers.
    codes, packed = buffers.get("weight", False), buffers.get("packed_weight")
    if codes is False:
        return module._parameters["weight"]  # pyrefly: ignore [bad-return]
    if codes is not None or packed is None:
        return codes  # pyrefly: ignore [bad-return]
    layout, n, k = module._held_as[HELD].split(" ")
    return torch.ops.fx_quant.unpack(packed, layout, int(n), int(k))
