"""Loading a quantized Hugging Face directory into ``QuantizedLinear`` modules, with its own codes and scales."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fx_quant.kernels.huge_pages import trim
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.checkpoint_files import Files, read_json
from fx_quant.loading.checkpoint_formats import Config, read_config, scheme_of_group
from fx_quant.loading.checkpoint_linear import decode_linear, tensors_of
from fx_quant.loading.checkpoint_values import CheckpointError, must
from fx_quant.report import Block, Entries, Paragraph, Reported, Table, counted
from fx_quant.report.progress import progress
from fx_quant.scheme import Scheme, short_scheme

__all__ = ["CheckpointError", "LoadReport", "load_quantized_", "scheme_of_group"]


@dataclass(frozen=True, repr=False)
class LoadReport(Reported):
    """What ``load_quantized_`` did.

    Args:
        replaced: names of the linears that are quantized now, by scheme.
        ignored: names of the linears that stay float.
        missing: parameters and buffers of the model that the checkpoint does not hold; they are as they were.
        unexpected: tensors of the checkpoint that the model has no place for.
        notes: what of the config was left out on purpose.
    """

    replaced: Mapping[Scheme, tuple[str, ...]]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: how many linears are quantized now, and whether all names agree."""
        count = sum(map(len, self.replaced.values()))
        odd = [f"{len(names)} {what}" for what, names in self._odd() if names]
        return f"{counted(count, 'linear', 'linears')} loaded quantized{''.join(f', {each}' for each in odd)}"

    def _odd(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return ("left in float", self.ignored), ("missing", self.missing), ("unexpected", self.unexpected)

    def blocks(self, *, wide: bool) -> list[Block]:
        """Each scheme with its linears, then names that are in one of the two only."""
        rows = tuple(
            (str(scheme) if wide else short_scheme(str(scheme)), str(len(names)))
            for scheme, names in self.replaced.items()
        )
        odd = [f"{what}: {_some(names)}" for what, names in self._odd() if names]
        return [
            *([Table(("scheme", "linears"), rows)] if rows else []),
            *([Entries("others", tuple(odd))] if odd else []),
            *map(Paragraph, self.notes),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "replaced"}
        replaced = {str(scheme): names for scheme, names in self.replaced.items()}
        return {"summary": self.summary(), "replaced": replaced, **facts}


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def load_quantized_(model: nn.Module, directory: str | os.PathLike, *, strict: bool = True) -> LoadReport:
    """Load a quantized checkpoint into a float model, in place.

    Each linear that the checkpoint holds quantized becomes a ``QuantizedLinear`` with its codes and scales, bit for
    bit. Everything else is loaded as usual, in the dtype that the model has; shared parameters stay shared. What is on
    the meta device comes to the CPU: parameters from the checkpoint, buffers that no checkpoint holds (rotary
    frequencies) from the model's own ``_init_weights``.

    A model on meta needs memory for the result and about one layer more: codes are packed out of the mapped files.

    Module names of the model must be those of the checkpoint: fused projections (``qkv_proj`` for ``q_proj``,
    ``k_proj`` and ``v_proj``) and stacked experts are out of scope, and show as missing and unexpected.

    Args:
        model: the float modules that ``config.json`` describes, for example ``AutoModelForCausalLM.from_config``.
        directory: with ``config.json``, whose ``quantization_config`` is of compressed-tensors or ``fp8``, and
            ``model.safetensors``, or several files and ``model.safetensors.index.json``.
        strict: raise where tensors are missing or unexpected.

    Raises:
        CheckpointError: a file or field that is not there, a format that is not supported, names or shapes that differ
            from the model's, tensors that do not fit their scheme; a file that is not below the folder, by its name or
            by a link, but for those of the Hugging Face cache. The model is then as it was: nothing of it changes
            before all codes are read, which so are in memory beside a model that is not on meta.

    Source: https://github.com/vllm-project/compressed-tensors (``compressors``) and transformers'
    ``integrations/finegrained_fp8.py``
    """
    must(not isinstance(model, nn.Linear), "model must hold the linears to replace, got a linear; wrap it in a module")
    directory = Path(directory)
    config = read_config(_quantization_config(directory))
    files = Files(directory)
    plan = _plan(model, config, files)
    report = _report(model, config, files, plan)
    if strict and (report.missing or report.unexpected):
        raise CheckpointError(
            f"{directory} must hold the model's tensors and no others; missing: {_some(report.missing) or 'none'}; "
            f"unexpected: {_some(report.unexpected) or 'none'}; build the model from that config.json, or pass "
            "strict=False"
        )
    quantized = [_decoded(model, linear, files) for linear in progress(plan.linears, "loading", "linear")]
    values = [None if slot.key is None else files.mapped(slot.key) for slot in plan.slots]
    _make_buffers(model)
    for planned, module in zip(plan.linears, quantized, strict=True):
        for name in planned.names:
            model.set_submodule(name, module)
    for slot, value in zip(plan.slots, values, strict=True):
        if value is not None:
            _fill(slot, value)
    trim()
    return report


def _is_folder(directory: Path) -> bool:
    try:
        return directory.is_dir()
    except OSError:  # a folder above it that may not be searched
        return False


def _quantization_config(directory: Path) -> Mapping[str, Any]:
    must(
        _is_folder(directory),
        f"directory must be a folder on this machine, got {str(directory)!r}; download the model first "
        "(huggingface_hub.snapshot_download)",
    )
    config = read_json(directory, "config.json")
    # The name that llm-compressor gave it at first.
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"{directory / 'config.json'} must have a quantization_config, got none: the model is not quantized; load "
            "it with transformers and quantize it with fx_quant.quantize_"
        )
    return quantization


# --- the plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    """A linear to replace: its names in the model, and where its tensors are in the checkpoint."""

    names: tuple[str, ...]
    scheme: Scheme
    keys: Mapping[str, str]


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer that stays as it is: every place that holds it, and where its values are."""

    places: tuple[tuple[nn.Module, str], ...]
    names: tuple[str, ...]
    key: str | None

    @property
    def tensor(self) -> Tensor:
        module, name = self.places[0]
        return getattr(module, name)


@dataclass(frozen=True)
class _Plan:
    linears: tuple[_Linear, ...]
    floats: tuple[str, ...]
    slots: tuple[_Slot, ...]


def _plan(model: nn.Module, config: Config, files: Files) -> _Plan:
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    planned = {
        module: _plan_linear(module, names, config, files)
        for module, names in names_of.items()
        if isinstance(module, nn.Linear)
    }
    replaced = {module: linear for module, linear in planned.items() if linear is not None}
    rest = {module: names for module, names in names_of.items() if module not in replaced}
    floats = tuple(names_of[module][0] for module, linear in planned.items() if linear is None)
    return _Plan(tuple(replaced.values()), floats, tuple(_slots(rest, files)))


def _plan_linear(module: nn.Linear, names: list[str], config: Config, files: Files) -> _Linear | None:
    for name in names:
        there = [key for key in ("weight", "weight_packed") if f"{name}.{key}" in files]
        left_out = config.float_weights and there == ["weight"] and files.kind(f"{name}.weight") == "float"
        scheme = config.scheme_of(name, module) if there and not left_out else None
        if scheme is None:
            continue
        must(
            type(module).forward is nn.Linear.forward,
            f"{name} must compute as nn.Linear does to be replaced, got a {type(module).__name__} with a forward of "
            "its own; load it with transformers",
        )
        keys = tensors_of(scheme, f"{name}.", files, module.bias is not None)
        must(
            "weight_scale" in keys,
            f"{name}.weight_scale must be there for {scheme}, got none; look for it in the files, or add the module "
            "to ignore if its weight is float",
        )
        must(
            module.bias is None or "bias" in keys,
            f"{name}.bias must be there, as the linear has one, got none; build the model from the config.json",
        )
        return _Linear(tuple(names), scheme, keys)
    return None


def _slots(modules: Mapping[nn.Module, list[str]], files: Files) -> Iterator[_Slot]:
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    full: dict[Tensor, list[str]] = {}
    for module, prefixes in modules.items():
        if isinstance(module, QuantizedLinear):
            module.unpack()
        kept = {name: x for name, x in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, x in {**module._parameters, **kept}.items():
            if x is not None:
                places.setdefault(x, []).append((module, name))
                full.setdefault(x, []).extend(f"{prefix}.{name}".removeprefix(".") for prefix in prefixes)
    for x, where in places.items():
        keys = [name for name in full[x] if name in files]
        for key in keys:
            _check_slot(x, key, files)
        must(
            all(torch.equal(files.mapped(keys[0]), files.mapped(key)) for key in keys[1:]),
            f"{' and '.join(keys)} must be equal, as they are one parameter of the model, got different values; build "
            "the model with tie_word_embeddings=False",
        )
        yield _Slot(tuple(where), tuple(full[x]), keys[0] if keys else None)


def _check_slot(x: Tensor, key: str, files: Files) -> None:
    kind = _kind(x)
    must(
        kind == files.kind(key),
        f"{key} must be {kind} as in the model, got another kind: fx_quant loads codes only into linears that the "
        "config quantizes; load it with transformers",
    )
    must(
        files.shape(key) == list(x.shape),
        f"{key} must be {list(x.shape)} as in the model, got {files.shape(key)}; build the model from the "
        "checkpoint's config.json",
    )


def _kind(x: Tensor) -> str:
    """What ``Files.kind`` says of a tensor that ``x`` can be loaded from; complex numbers from none."""
    if x.is_complex():
        return "complex"
    return "float" if x.is_floating_point() else "bool" if x.dtype is torch.bool else "integer"


# Of a quantized KV cache: on the attention module, or the outputs of k_proj and v_proj.
_CACHE_SCALE = re.compile(r".*\.([kqv]|output)_(scale|zero_point)")


def _report(model: nn.Module, config: Config, files: Files, plan: _Plan) -> LoadReport:
    used = {key for linear in plan.linears for key in linear.keys.values()}
    used |= {name for slot in plan.slots for name in slot.names}
    missing = [slot.names[0] for slot in plan.slots if slot.key is None]
    unexpected = [key for key in files if key not in used]
    if config.kv_cache:
        unexpected = [key for key in unexpected if not _CACHE_SCALE.fullmatch(key)]
    schemes: dict[Scheme, tuple[str, ...]] = {}
    for linear in plan.linears:
        schemes[linear.scheme] = (*schemes.get(linear.scheme, ()), linear.names[0])
    return LoadReport(
        schemes,
        plan.floats,
        _but(missing, getattr(model, "_keys_to_ignore_on_load_missing", None)),
        _but(unexpected, getattr(model, "_keys_to_ignore_on_load_unexpected", None)),
        config.notes,
    )


def _but(keys: list[str], patterns: Sequence[str] | None) -> tuple[str, ...]:
    """``keys`` in order, without those that a transformers model says may be missing or unexpected."""
    return tuple(key for key in sorted(keys) if not any(re.search(pattern, key) for pattern in patterns or ()))


# --- loading --------------------------------------------------------------------------------------------------


def _decoded(model: nn.Module, planned: _Linear, files: Files) -> QuantizedLinear:
    name = planned.names[0]
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    n, k = linear.weight.shape
    for key in planned.keys.values():
        # Before it is read: a file of no size can say that it holds more than any memory.
        must(
            math.prod(files.shape(key)) <= max(n * k, n, k, 2),
            f"{key} must have at most the {n * k} elements of a {[n, k]} weight, got {files.shape(key)}; build the "
            "model from the checkpoint's config.json",
        )
    # Codes are packed as they lie in the file.
    tensors = {what: (files.mapped if what == "weight" else files.tensor)(key) for what, key in planned.keys.items()}
    try:
        quantized = decode_linear(linear, planned.scheme, tensors)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    device = linear.weight.device
    quantized = quantized.to("cpu" if device.type == "meta" else device).train(linear.training)
    quantized.pack_for(linear.weight.dtype, owned=True)
    weight, held = quantized.held_weight()
    if held is None and weight.untyped_storage()._cdata == tensors["weight"].untyped_storage()._cdata:
        quantized._buffers["weight"] = weight.clone()
    del tensors
    trim()  # what is kept lies between what is not
    return quantized


@torch.no_grad()
def _fill(slot: _Slot, values: Tensor) -> None:
    x = slot.tensor
    if x.device.type != "meta":
        x.copy_(values)
        return
    loaded = values.to(x.dtype, copy=True)
    if isinstance(x, nn.Parameter):
        loaded = nn.Parameter(loaded, requires_grad=x.requires_grad)
    for module, name in slot.places:
        setattr(module, name, loaded)


@torch.no_grad()
def _make_buffers(model: nn.Module) -> None:
    """Buffers on the meta device that no checkpoint holds, by the nearest ``_init_weights`` of a transformers model.

    Where one cannot be made, all are as they were.
    """
    before: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name, module in model.named_modules():
            wanted = {
                key: x
                for key, x in module._buffers.items()
                if x is not None and x.device.type == "meta" and key in module._non_persistent_buffers_set
            }
            before += [(module, key, x) for key, x in wanted.items()]
            if wanted:
                _make(model, name, module, wanted)
    except BaseException:
        for module, key, x in before:
            setattr(module, key, x)
        raise


def _make(model: nn.Module, name: str, module: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    for key, x in wanted.items():
        setattr(module, key, torch.full_like(x, _unwritten(x.dtype), device="cpu"))
    owner = _initializer(model, name)
    if owner is not None and not module._parameters:
        owner._init_weights(module)
    lost = [key for key in wanted if _is_unwritten(getattr(module, key))]
    must(
        not lost,
        f"{name}.{', '.join(lost)} must be made by the model, as no checkpoint holds it; build the model on a real "
        "device rather than meta",
    )


def _unwritten(dtype: torch.dtype) -> float:
    """What no initializer writes, to see afterwards whether one has."""
    return torch.nan if dtype.is_floating_point else 0 if dtype is torch.bool else torch.iinfo(dtype).min


def _is_unwritten(x: Tensor) -> bool:
    return x.dtype is torch.bool or bool((x.isnan() if x.is_floating_point() else x == _unwritten(x.dtype)).any())


def _initializer(model: nn.Module, name: str) -> Any:
    parts = name.split(".")
    parents = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    return next((parent for parent in parents if hasattr(parent, "_init_weights")), None)
