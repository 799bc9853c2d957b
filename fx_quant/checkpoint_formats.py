"""What a checkpoint's ``quantization_config`` says, and the tensors of one linear as a ``QuantizedLinear``.

Two formats: ``compressed-tensors`` and ``fp8`` (fine-grained float8, as DeepSeek stores it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fx_quant.errors import FxQuantError
from fx_quant.scheme import Granularity, OperandSpec, Scheme
from fx_quant.weights import INT4, UINT4


class CheckpointError(FxQuantError, ValueError):
    """A checkpoint that cannot be loaded: what must hold, what was found, what to do next."""


def require(holds: bool, message: str) -> None:
    """Raise ``CheckpointError(message)`` unless ``holds``."""
    if not holds:
        raise CheckpointError(message)


# --- schemes --------------------------------------------------------------------------------------------------

_WEIGHT_ONLY = OperandSpec(torch.bfloat16)
_FLOAT8 = torch.float8_e4m3fn
# By type, num_bits and symmetric.
_CODES: Mapping[tuple[str, int, bool], torch.dtype] = {
    ("int", 8, True): torch.int8,
    ("int", 8, False): torch.int8,
    ("int", 4, True): INT4,
    ("int", 4, False): UINT4,
    ("float", 8, True): _FLOAT8,
}
_SCALE_DTYPES = (None, "torch.float32", "torch.bfloat16", "torch.float16", "float32", "bfloat16", "float16")
_ELSEWHERE = "leave these layers in float (ignore) or quantize the model with a supported scheme"


def scheme_of_group(group: Mapping[str, Any]) -> Scheme:
    """The scheme of one of ``config_groups`` of a compressed-tensors config.

    A weight-only group has the activation ``bfloat16``, which stands for whatever dtype ``x`` has. Asymmetric 4-bit
    weights, stored with codes and zero points of -8..7, are ``uint4`` with both of 0..15: the same bits.

    Args:
        group: with ``weights`` and ``input_activations``, each of ``num_bits``, ``type``, ``symmetric``, ``strategy``,
            ``group_size``, ``block_structure``, ``dynamic``; what is not there has compressed-tensors' own default.

    Raises:
        CheckpointError: what fx_quant has no scheme for: codes other than int8, int4 and float8 (2-bit, nvfp4, mxfp4),
            scales that are not plain floats, group activation ordering, quantized outputs, activations that are
            quantized unlike their weight.

    Source: https://github.com/vllm-project/compressed-tensors, quantization/quant_args.py
    """
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"a config group that targets linears must quantize their weights, got weights={weights}; {_ELSEWHERE}"
        )
    require(
        group.get("output_activations") is None,
        f"output_activations must be null: fx_quant does not quantize the output of a linear; {_ELSEWHERE}",
    )
    require(not weights.get("dynamic"), f"weights must be static, got dynamic={weights.get('dynamic')!r}; {_ELSEWHERE}")
    _check_args(weights, "weights")
    weight = OperandSpec(_codes(weights, "weights"), _weight_granularity(weights), symmetric=_symmetric(weights))
    if activations is None:
        return Scheme(_WEIGHT_ONLY, weight)
    _check_args(activations, "input_activations")
    return _checked(Scheme(_activation(activations), weight))


def _check_args(args: Mapping[str, Any], what: str) -> None:
    require(
        args.get("scale_dtype") in _SCALE_DTYPES,
        f"{what} must have plain float scales, got scale_dtype={args.get('scale_dtype')} (mxfp4, mxfp8 or nvfp4), "
        f"which fx_quant does not run; {_ELSEWHERE}",
    )
    require(
        args.get("actorder") in (None, False, "weight", "static"),
        f"{what} must have actorder null, 'weight' or 'static', got {args.get('actorder')!r}, which permutes k; "
        "quantize the model again without it",
    )


def _symmetric(args: Mapping[str, Any]) -> bool:
    return bool(args.get("symmetric", True))


def _codes(args: Mapping[str, Any], what: str) -> torch.dtype:
    kind, bits = str(args.get("type", "int")).lower(), args.get("num_bits", 8)
    found = _CODES.get((kind, bits, _symmetric(args)))
    if found is None:
        name = " (nvfp4 or mxfp4)" if (kind, bits) == ("float", 4) else ""
        raise CheckpointError(
            f"{what} must be int8, int4 or symmetric float8, got {'' if _symmetric(args) else 'asymmetric '}"
            f"{bits}-bit {kind}{name}; {_ELSEWHERE}"
        )
    return found


def _strategy(args: Mapping[str, Any]) -> str:
    strategy, size = args.get("strategy"), args.get("group_size")
    if strategy is None:
        return "tensor" if size is None else "channel" if size == -1 else "group"
    return str(strategy).lower()


def _group_size(args: Mapping[str, Any], what: str) -> int:
    size = args.get("group_size")
    if not isinstance(size, int) or size <= 0:
        raise CheckpointError(f"{what} per group must have a positive group_size, got {size}; check its config.json")
    return size


def _block(size: Any, what: str) -> tuple[int, int]:
    fits = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(step, int) and step > 0 for step in size)
    require(fits, f"{what} must be [rows, columns], both positive, got {size}; check its config.json")
    return size[0], size[1]


def _weight_granularity(args: Mapping[str, Any]) -> Granularity:
    strategy = _strategy(args)
    if strategy == "group":
        return Granularity.per_group(_group_size(args, "weights"))
    if strategy == "block":
        return Granularity.per_block(*_block(args.get("block_structure"), "block_structure"))
    known = {"tensor": Granularity.PER_TENSOR, "channel": Granularity.PER_CHANNEL}
    require(
        strategy in known,
        f"the strategy of weights must be block, channel, group or tensor, got {strategy!r}; {_ELSEWHERE}",
    )
    return known[strategy]


def _activation(args: Mapping[str, Any]) -> OperandSpec:
    strategy, dynamic = _strategy(args), args.get("dynamic", False)
    require(
        isinstance(dynamic, bool) and strategy in ("tensor", "token", "group") and (dynamic or strategy == "tensor"),
        "input_activations must be dynamic per group, tensor or token, or static per tensor, "
        f"got strategy {strategy!r} with dynamic={dynamic!r}; {_ELSEWHERE}",
    )
    granularity = {"tensor": Granularity.PER_TENSOR, "token": Granularity.PER_TOKEN}.get(strategy)
    if granularity is None:
        granularity = Granularity.per_group(_group_size(args, "input_activations"))
    return OperandSpec(_codes(args, "input_activations"), granularity, dynamic=dynamic, symmetric=_symmetric(args))


def _checked(scheme: Scheme) -> Scheme:
    """``scheme`` if a quantized product of it exists: codes of one kind, and scales that can leave the sum."""
    a, b = scheme.activation, scheme.weight
    require(
        a.dtype == b.dtype and a.dtype in (torch.int8, _FLOAT8),
        f"quantized activations and their weight must both be int8 or both float8, got {scheme}; {_ELSEWHERE}",
    )
    require(b.symmetric, f"the weight beside a quantized activation must be symmetric, got {scheme}; {_ELSEWHERE}")
    blocks = b.granularity.kind == "per_block"
    fits = blocks and a.dtype is _FLOAT8 and a.granularity == Granularity.per_group(b.granularity.size[1])
    plain = a.granularity.kind != "per_group" and b.granularity.kind in ("per_tensor", "per_channel")
    require(
        fits or plain,
        "quantized activations must be per tensor or token with a weight per channel or tensor, or float8 per group "
        f"with a weight in blocks of as many columns, got {scheme}; {_ELSEWHERE}",
    )
    return scheme


# --- configs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressedTensors:
    """A compressed-tensors config: for each target (class name, module name, ``re:`` regex) its group.

    Args:
        groups: ``(targets, group)`` in the order of the file.
        ignore: targets of modules that stay float.
        notes: what was left out on purpose.
        kv_cache: the checkpoint may hold scales of a quantized KV cache.
    """

    groups: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]
    ignore: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kv_cache: bool = False
    # A targeted linear with a float weight is a broken checkpoint, not one that was left out.
    float_weights: bool = False

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """The scheme of a module, None if it stays float. A name beats a regex, and a regex a class.

        Raises:
            CheckpointError: its group is not supported.
        """
        if any(_named(name, target) or _is_a(module, target) for target in self.ignore):
            return None
        # A target of two groups is the later one's, as in compressed-tensors.
        group_of = {target: group for targets, group in self.groups for target in targets}
        by_name = [target for target in sorted(group_of, key=_rank) if _named(name, target)]
        target = next(iter(by_name + [target for target in sorted(group_of) if _is_a(module, target)]), None)
        return None if target is None else scheme_of_group(group_of[target])


@dataclass(frozen=True)
class FineGrainedFP8:
    """A config with ``quant_method`` ``fp8``: one scheme for every linear that is not skipped.

    Args:
        scheme: of every linear whose weight the checkpoint holds as float8.
        skipped: module names, their beginnings or ends, or regexes; as ``modules_to_not_convert``.
        notes: what was left out on purpose.
        kv_cache: the checkpoint may hold scales of a quantized KV cache.
    """

    scheme: Scheme
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kv_cache: bool = False
    # Hugging Face leaves what does not divide into blocks, and an lm_head that no list names, in float.
    float_weights: bool = True

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """The scheme of a module, None if it stays float."""
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        skipped = any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in self.skipped)
        return self.scheme if isinstance(module, nn.Linear) and not skipped else None


Config = CompressedTensors | FineGrainedFP8


def read_config(config: Mapping[str, Any]) -> Config:
    """What ``quantization_config`` of a ``config.json`` says.

    Raises:
        CheckpointError: a format that fx_quant does not load, or a config without its fields.
    """
    method = config.get("quant_method")
    readers = {"compressed-tensors": _read_compressed_tensors, "fp8": _read_fp8}
    require(
        method in readers,
        f"quant_method must be {' or '.join(map(repr, sorted(readers)))}, got {method!r}; load it with transformers "
        "or, for another method, quantize the float model with fx_quant.quantize_",
    )
    return readers[str(method)](config)


_FORMATS = ("float-quantized", "int-quantized", "mixed-precision", "naive-quantized", "pack-quantized")


def _read_compressed_tensors(config: Mapping[str, Any]) -> CompressedTensors:
    sparsity = config.get("sparsity_config") or {}
    require(
        sparsity.get("format", "dense") == "dense" and not config.get("moe_sparsity_config"),
        f"a checkpoint must not be sparse, got sparsity_config={dict(sparsity)}; save it without sparse compression",
    )
    transforms = (config.get("transform_config") or {}).get("config_groups")
    require(
        not transforms,
        f"transform_config must be empty, got {sorted(transforms or ())}: fx_quant does not run transforms of "
        "activations; quantize the model without them",
    )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            f"a compressed-tensors config must have config_groups, got {groups!r}; check its config.json"
        )
    for holder, where in ((config, "quantization_config"), *((group, name) for name, group in groups.items())):
        require(
            isinstance(holder, Mapping) and (holder is config or isinstance(holder.get("targets"), Sequence)),
            f"{where} must be an object with targets, weights and input_activations, got {holder!r}",
        )
        require(
            holder.get("format") is None or holder["format"] in _FORMATS,
            f"the format of {where} must be {', '.join(_FORMATS)}, got {holder.get('format')!r}; {_ELSEWHERE}",
        )
    kv_cache = _kv_cache_notes(config)
    return CompressedTensors(
        tuple((tuple(group["targets"]), group) for group in groups.values()),
        tuple(config.get("ignore") or ()),
        kv_cache,
        bool(kv_cache),
    )


def _read_fp8(config: Mapping[str, Any]) -> FineGrainedFP8:
    size, when = config.get("weight_block_size"), str(config.get("activation_scheme", "dynamic")).lower()
    require(
        when in ("dynamic", "static"),
        f"activation_scheme must be 'dynamic' or 'static', got {when!r}; check its config.json",
    )
    fmt, scale_fmt = config.get("fmt", "e4m3"), config.get("scale_fmt") or "float"
    require(fmt in ("e4m3", "float8_e4m3fn"), f"fmt must be 'e4m3', got {fmt!r}; {_ELSEWHERE}")
    require(scale_fmt in ("float", "ue8m0"), f"scale_fmt must be 'float' or 'ue8m0', got {scale_fmt!r}; {_ELSEWHERE}")
    require(
        size is None or when == "dynamic",
        f"a weight in blocks must have activation_scheme 'dynamic', got {when!r}; quantize the model with 'dynamic'",
    )
    if size is None:
        tokens = Granularity.PER_TENSOR if when == "static" else Granularity.PER_TOKEN
        blocks = Granularity.PER_TENSOR
    else:
        blocks = Granularity.per_block(*_block(size, "weight_block_size"))
        tokens = Granularity.per_group(blocks.size[1])
    notes = _kv_cache_notes(config)
    kv_cache = bool(notes)
    if scale_fmt == "ue8m0":
        notes += ("scale_fmt 'ue8m0': weight scales are exact; activation scales are float32, not powers of two",)
    skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    scheme = Scheme(OperandSpec(_FLOAT8, tokens, dynamic=when == "dynamic"), OperandSpec(_FLOAT8, blocks))
    return FineGrainedFP8(scheme, tuple(skipped), notes, kv_cache)


def _kv_cache_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    if not config.get("kv_cache_scheme"):
        return ()
    return ("kv_cache_scheme is ignored: the cache keeps the model's dtype, and its scales are not loaded",)


def _rank(target: str) -> tuple[bool, str]:
    return target.startswith("re:"), target


def _named(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _is_a(module: nn.Module, target: str) -> bool:
    return any(cls.__name__ == target for cls in type(module).__mro__)
