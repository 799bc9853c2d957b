"""What a checkpoint's ``quantization_config`` says, and the tensors of one linear as a ``QuantizedLinear``.

Two formats: ``compressed-tensors`` and ``fp8`` (fine-grained float8, as DeepSeek stores it).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fx_quant.loading.checkpoint_patterns import Patterns
from fx_quant.loading.checkpoint_values import CheckpointError, field, is_size, must, said, texts
from fx_quant.scheme import Granularity, OperandSpec, Scheme
from fx_quant.weights import INT4, UINT4

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
            not multiplied with codes like those of the weight.

    Source: https://github.com/vllm-project/compressed-tensors, quantization/quant_args.py
    """
    must(isinstance(group, Mapping), f"a config group must be an object, got {said(group)}; {_ELSEWHERE}")
    weights, activations = group.get("weights"), field(group, "input_activations", Mapping, "a config group")
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"a config group that targets linears must quantize their weights, got weights={said(weights)}; "
            f"{_ELSEWHERE}"
        )
    must(
        group.get("output_activations") is None,
        f"output_activations must be null: fx_quant does not quantize the output of a linear; {_ELSEWHERE}",
    )
    must(
        not weights.get("dynamic"), f"weights must be static, got dynamic={said(weights.get('dynamic'))}; {_ELSEWHERE}"
    )
    _check_args(weights, "weights")
    weight = OperandSpec(
        _codes(weights, "weights"), _weight_granularity(weights), symmetric=_symmetric(weights, "weights")
    )
    if activations is None:
        return Scheme(_WEIGHT_ONLY, weight)
    _check_args(activations, "input_activations")
    return _checked(Scheme(_activation(activations), weight))


def _check_args(args: Mapping[str, Any], what: str) -> None:
    must(
        args.get("scale_dtype") in _SCALE_DTYPES,
        f"{what} must have plain float scales, got scale_dtype={_plain(args.get('scale_dtype'))} (mxfp4, mxfp8 or "
        f"nvfp4), which fx_quant does not run; {_ELSEWHERE}",
    )
    must(
        args.get("actorder") in (None, False, "weight", "static"),
        f"{what} must have actorder null, 'weight' or 'static', got {said(args.get('actorder'))}, which permutes k; "
        "quantize the model again without it",
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else said(value)


def _symmetric(args: Mapping[str, Any], what: str) -> bool:
    symmetric = field(args, "symmetric", bool, what)
    return True if symmetric is None else symmetric


def _codes(args: Mapping[str, Any], what: str) -> torch.dtype:
    kind, bits, symmetric = (
        (field(args, "type", str, what) or "int").lower(),
        args.get("num_bits", 8),
        _symmetric(args, what),
    )
    dtype = _CODES.get((kind, bits, symmetric)) if type(bits) is int else None
    if dtype is None:
        name = " (nvfp4 or mxfp4)" if (kind, bits) == ("float", 4) else ""
        raise CheckpointError(
            f"{what} must be int8, int4 or symmetric float8, got {'' if symmetric else 'asymmetric '}"
            f"{said(bits)}-bit {kind}{name}; {_ELSEWHERE}"
        )
    return dtype


def _strategy(args: Mapping[str, Any], what: str) -> str:
    strategy, size = field(args, "strategy", str, what), args.get("group_size")
    if strategy is None:
        return "tensor" if size is None else "channel" if type(size) is int and size == -1 else "group"
    return strategy.lower()


def _group_size(args: Mapping[str, Any], what: str) -> int:
    size = args.get("group_size")
    must(is_size(size), f"{what} per group must have a positive group_size, got {said(size)}; check its config.json")
    return size  # type: ignore[return-value]


def _block(size: Any, what: str) -> tuple[int, int]:
    fits = isinstance(size, (list, tuple)) and len(size) == 2 and all(map(is_size, size))
    must(fits, f"{what} must be [rows, columns], both positive, got {said(size)}; check its config.json")
    return size[0], size[1]


def _weight_granularity(args: Mapping[str, Any]) -> Granularity:
    strategy = _strategy(args, "weights")
    if strategy == "group":
        return Granularity.per_group(_group_size(args, "weights"))
    if strategy == "block":
        return Granularity.per_block(*_block(args.get("block_structure"), "block_structure"))
    known = {"tensor": Granularity.PER_TENSOR, "channel": Granularity.PER_CHANNEL}
    must(
        strategy in known,
        f"the strategy of weights must be block, channel, group or tensor, got {strategy!r}; {_ELSEWHERE}",
    )
    return known[strategy]


def _activation(args: Mapping[str, Any]) -> OperandSpec:
    what = "input_activations"
    strategy, dynamic = _strategy(args, what), args.get("dynamic", False)
    must(
        isinstance(dynamic, bool) and strategy in ("tensor", "token", "group") and (dynamic or strategy == "tensor"),
        "input_activations must be dynamic per group, tensor or token, or static per tensor, "
        f"got strategy {strategy!r} with dynamic={said(dynamic)}; {_ELSEWHERE}",
    )
    granularity = {"tensor": Granularity.PER_TENSOR, "token": Granularity.PER_TOKEN}.get(strategy)
    if granularity is None:
        granularity = Granularity.per_group(_group_size(args, what))
    return OperandSpec(_codes(args, what), granularity, dynamic=dynamic, symmetric=_symmetric(args, what))


def _checked(scheme: Scheme) -> Scheme:
    """``scheme`` if a quantized product of it exists: codes that are multiplied, and scales that can leave the sum."""
    a, b = scheme.activation, scheme.weight
    of_integers = a.dtype is torch.int8 and (b.dtype is torch.int8 or b.packed)
    must(
        of_integers or a.dtype == b.dtype == _FLOAT8,
        "quantized activations must be int8 beside an int8 or int4 weight, or both be float8, "
        f"got {scheme}; {_ELSEWHERE}",
    )
    must(
        b.symmetric or b.packed or b.group is not None,
        f"an int8 weight beside a quantized activation must be symmetric or per group, got {scheme}; {_ELSEWHERE}",
    )
    blocks = Granularity.ANY_BLOCK.covers(b.granularity) and a.dtype is _FLOAT8 and a.group == b.group
    must(
        blocks or (a.group is None and (of_integers or b.group is None)),
        "quantized activations must be per tensor or token, with a float8 weight per channel or tensor, or float8 per "
        f"group with a weight in blocks of as many columns, got {scheme}; {_ELSEWHERE}",
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
            CheckpointError: its group is not supported; a regex that cannot be matched.
        """
        if self._ignored.best(name, module) is not None:
            return None
        target = self._targeted.best(name, module)
        return None if target is None else scheme_of_group(self._group_of[target])

    @functools.cached_property
    def _group_of(self) -> Mapping[str, Mapping[str, Any]]:
        # A target of two groups is the later one's, as in compressed-tensors.
        return {target: group for targets, group in self.groups for target in targets}

    @functools.cached_property
    def _targeted(self) -> _Targets:
        return _Targets(self._group_of)

    @functools.cached_property
    def _ignored(self) -> _Targets:
        return _Targets(self.ignore)


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
        """The scheme of a module, None if it stays float.

        Raises:
            CheckpointError: a regex that cannot be matched.
        """
        skipped = any(map(name.endswith, self.skipped)) or self._skipping.first(name) is not None
        return self.scheme if isinstance(module, nn.Linear) and not skipped else None

    @functools.cached_property
    def _skipping(self) -> Patterns:
        return Patterns(self.skipped, r"(?:(?<=\.)|(?=\.|$))")


Config = CompressedTensors | FineGrainedFP8


def read_config(config: Mapping[str, Any]) -> Config:
    """What ``quantization_config`` of a ``config.json`` says.

    Raises:
        CheckpointError: a format that fx_quant does not load, or a config without its fields.
    """
    method = config.get("quant_method")
    readers = {"compressed-tensors": _read_compressed_tensors, "fp8": _read_fp8}
    must(
        isinstance(method, str) and method in readers,
        f"quant_method must be {' or '.join(map(repr, sorted(readers)))}, got {said(method)}; load it with "
        "transformers or, for another method, quantize the float model with fx_quant.quantize_",
    )
    return readers[str(method)](config)


_FORMATS = ("float-quantized", "int-quantized", "mixed-precision", "naive-quantized", "pack-quantized")


def _read_compressed_tensors(config: Mapping[str, Any]) -> CompressedTensors:
    where = "quantization_config"
    sparsity = field(config, "sparsity_config", Mapping, where) or {}
    must(
        sparsity.get("format", "dense") == "dense" and not config.get("moe_sparsity_config"),
        f"a checkpoint must not be sparse, got sparsity_config={said(dict(sparsity))}; save it without sparse "
        "compression",
    )
    transforms = (field(config, "transform_config", Mapping, where) or {}).get("config_groups")
    names = list(transforms) if isinstance(transforms, Mapping) else transforms
    must(
        not transforms,
        f"transform_config must be empty, got {said(names)}: "
        "fx_quant does not run transforms of activations; quantize the model without them",
    )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            f"a compressed-tensors config must have config_groups, got {said(groups)}; check its config.json"
        )
    for holder, name in ((config, where), *((group, name) for name, group in groups.items())):
        must(
            isinstance(holder, Mapping) and (holder is config or "targets" in holder),
            f"{name} must be an object with targets, weights and input_activations, got {said(holder)}",
        )
        must(
            holder.get("format") is None or holder["format"] in _FORMATS,
            f"the format of {name} must be {', '.join(_FORMATS)}, got {said(holder.get('format'))}; {_ELSEWHERE}",
        )
    kv_cache = _kv_cache_notes(config)
    return CompressedTensors(
        tuple((texts(group, "targets", name), group) for name, group in groups.items()),
        texts(config, "ignore", where),
        kv_cache,
        bool(kv_cache),
    )


def _read_fp8(config: Mapping[str, Any]) -> FineGrainedFP8:
    where = "quantization_config"
    size, when = config.get("weight_block_size"), (field(config, "activation_scheme", str, where) or "dynamic").lower()
    must(
        when in ("dynamic", "static"),
        f"activation_scheme must be 'dynamic' or 'static', got {when!r}; check its config.json",
    )
    fmt, scale_fmt = config.get("fmt", "e4m3"), config.get("scale_fmt") or "float"
    must(fmt in ("e4m3", "float8_e4m3fn"), f"fmt must be 'e4m3', got {said(fmt)}; {_ELSEWHERE}")
    must(scale_fmt in ("float", "ue8m0"), f"scale_fmt must be 'float' or 'ue8m0', got {said(scale_fmt)}; {_ELSEWHERE}")
    must(
        size is None or when == "dynamic",
        f"a weight in blocks must have activation_scheme 'dynamic', got {when!r}; quantize the model with 'dynamic'",
    )
    if size is None:
        tokens = Granularity.PER_TENSOR if when == "static" else Granularity.PER_TOKEN
        blocks = Granularity.PER_TENSOR
    else:
        blocks = Granularity.per_block(*_block(size, "weight_block_size"))
        tokens = Granularity.per_group(blocks.columns)
    notes = _kv_cache_notes(config)
    kv_cache = bool(notes)
    if scale_fmt == "ue8m0":
        notes += ("scale_fmt 'ue8m0': weight scales are exact; activation scales are float32, not powers of two",)
    skipped = texts(config, "modules_to_not_convert", where) or texts(config, "ignored_layers", where)
    scheme = Scheme(OperandSpec(_FLOAT8, tokens, dynamic=when == "dynamic"), OperandSpec(_FLOAT8, blocks))
    return FineGrainedFP8(scheme, skipped, notes, kv_cache)


def _kv_cache_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    if not config.get("kv_cache_scheme"):
        return ()
    return ("kv_cache_scheme is ignored: the cache keeps the model's dtype, and its scales are not loaded",)


class _Targets:
    """Class names, module names and ``re:`` regexes."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._names = frozenset(targets)
        self._regexes = Patterns(sorted(name.removeprefix("re:") for name in self._names if name.startswith("re:")))

    def best(self, name: str, module: nn.Module) -> str | None:
        """The target that stands for a module: its name, else a regex, else its class; None where none does."""
        if name in self._names:
            return name
        regex = self._regexes.first(name)
        if regex is not None:
            return f"re:{regex}"
        return min(self._names & {cls.__name__ for cls in type(module).__mro__}, default=None)
