"""What to do with models of libraries whose quantized matmuls no rewrite can reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set

import torch
from torch import nn

from fx_quant.loading.adapters.base import is_of
from fx_quant.loading.coded_modules import holds_codes
from fx_quant.loading.module_names import tensors_of

_INSTEAD = "quantize the float model with fx_quant.quantize_ or torchao instead"
_FAKE = f"round in float and multiply in float, to simulate what is meant to run elsewhere: {_INSTEAD}"
# Linear8bitLt with a threshold; without one it compiles.
_OUTLIERS = "bitsandbytes int8 with a threshold"
# By package: what its modules do, after "<number> modules of <package>", and what to do about it.
_LIBRARIES = {
    "bitsandbytes": f"call kernels of their own, which a compiler can only call as well: {_INSTEAD}",
    _OUTLIERS: "multiply some columns of each activation in float, chosen by their values, which breaks the graph: "
    "load the model with llm_int8_threshold=0.0",
    "modelopt": _FAKE,
    "brevitas": _FAKE,
    "neural_compressor": f"decode their weights in steps of their own: {_INSTEAD}",
    "torch.ao.nn.qat": f"are trained with rounding in float: convert the model first, or {_INSTEAD}",
    "torch.ao.nn.quantized": f"hold weights in an engine's own format, which a compiler cannot read: {_INSTEAD}",
}


def library_notes(model: nn.Module, known: Set[nn.Module] = frozenset()) -> list[str]:
    """One line for each library whose modules ``model`` holds, and one for encoder layers that skip their linears.

    Classes tell the library; none is imported.

    Args:
        known: modules of which is said already what to do.
    """
    counts = Counter(package for module, package in _out_of_reach(model) if module not in known)
    notes = [f"{_count(count, 'module')} of {package} {_LIBRARIES[package]}." for package, count in counts.items()]
    if layers := sum(map(_may_skip_its_linears, model.modules())):
        notes.append(
            f"{_count(layers, 'nn.TransformerEncoderLayer')} may take PyTorch's fast path, which reads the weights of "
            "linears without calling them: switch it off, torch.backends.mha.set_fastpath_enabled(False)."
        )
    return notes


def hiding_modules(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """The linears within ``model`` that a library's class quantizes where no rewrite can reach them.

    Each with the library's package, and with why and what to do.
    """
    return {
        module: (package.partition(" ")[0], f"modules of {package} {_LIBRARIES[package]}")
        for module, package in _out_of_reach(model)
    }


def _out_of_reach(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules with their keys in ``_LIBRARIES``, but for what a library's own modules are made of."""
    waiting, seen = [model], {model}
    while waiting:
        module = waiting.pop()
        package = _package(module)
        if package is not None and _multiplies(module):
            if not _is_off(module):
                yield module, package
            continue
        children = [child for child in module.children() if child not in seen]
        seen.update(children)
        waiting += reversed(children)


def _is_off(module: nn.Module) -> bool:
    """Whether the library left ``module`` in float: it has quantizers of weight or input, and none is enabled."""
    flags = [
        getattr(child, enabled)
        for name, child in module.named_children()
        for enabled in ("is_enabled", "is_quant_enabled")
        if name.startswith(("weight_quant", "input_quant")) and hasattr(child, enabled)
    ]
    return bool(flags) and not any(flags)


def _package(module: nn.Module) -> str | None:
    """The key in ``_LIBRARIES`` of a module that cannot be rewritten as it is."""
    threshold = getattr(getattr(module, "state", None), "threshold", None)
    if is_of(module, "bitsandbytes") and threshold is not None:
        return _OUTLIERS if threshold > 0 else None
    return next((name for name in _LIBRARIES if is_of(module, name)), None)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _multiplies(module: nn.Module) -> bool:
    """Whether ``module`` has a weight to multiply with, or holds one where it cannot be seen."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "PackedParam" in type(module).__name__:
        return False  # a module of torch.ao holds its weight in the latter
    return hasattr(module, "_packed_params") or any(value.dim() > 1 for _, value in tensors_of(module))


def _may_skip_its_linears(module: nn.Module) -> bool:
    if not isinstance(module, nn.TransformerEncoderLayer) or module.training or not module.activation_relu_or_gelu:
        return False
    if not torch.backends.mha.get_fastpath_enabled():
        return False
    return any(type(child) is not nn.Linear or holds_codes(child) for child in (module.linear1, module.linear2))
