"""The models of the benchmark, and every way to quantize and run one: ours, PyTorch's, other runtimes', llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_cases import KINDS, Source, operands_of, source
from cpu_decoder import Size, decoder
from cpu_model_runtimes import Phases, Runs, onnxruntime_start, openvino_start
from cpu_peers import FROZEN, TUNED, inductor_quantizer
from torch import Tensor, nn

from fx_quant.layers.quantize_model import quantize_

PROMPT = 128  # tokens, where no other number is asked for


@dataclass(frozen=True)
class Workload:
    """A float32 model and what it is run on.

    Args:
        dtype: of the activations where a variant does not say.
        phases: inputs by name, run in this order.
        tokens: of each phase.
    """

    model: nn.Module
    dtype: torch.dtype
    phases: Phases
    tokens: Mapping[str, int]


def decoder_workload(layers: int, prompt: int) -> Workload:
    """The decoder of ``cpu_decoder``: a prompt, then a token, in a cache of twice the prompt."""
    model = decoder(Size(layers=layers, context=2 * prompt))
    ids = torch.randint(0, model.size.vocab, (1, prompt), generator=torch.Generator().manual_seed(0))
    phases = {"prefill": (ids, torch.arange(prompt)), "decode": (ids[:, :1].clone(), torch.tensor([prompt]))}
    return Workload(model, torch.bfloat16, phases, {"prefill": prompt, "decode": 1})


def minilm_workload(layers: int, prompt: int) -> Workload:
    """MiniLM-L6 with its weights: one sentence, and 32 of them; neither argument is asked."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from encoder import float32, tokenize
    from sentences import SENTENCES

    phases = {f"batch {size}": tokenize(SENTENCES[:size]) for size in (1, 32)}
    return Workload(float32(), torch.float32, phases, {name: inputs[0].numel() for name, inputs in phases.items()})


WORKLOADS: Mapping[str, Callable[[int, int], Workload]] = {"decoder": decoder_workload, "minilm": minilm_workload}


# --- how a model is quantized -----------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A linear of two-dimensional activations, for any number of leading dims."""

    def __init__(self, linear: Source) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``."""
        return self.linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def by_hand(model: nn.Module, dtype: torch.dtype, scheme: str) -> nn.Module:
    """Every linear as a model writes ``scheme``; the rest in ``dtype``."""
    kind, name = KINDS[scheme], str(dtype).removeprefix("torch.")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            operands = operands_of(kind, name, module.weight.float(), module.bias)
            model.set_submodule(path, nn.Identity())  # the float weight goes before the next is quantized
            model.set_submodule(path, Rows(source(scheme)(operands)))
    return _cast(model, dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model.to(dtype)``, but for what holds codes and scales."""
    for module in model.modules():
        if not isinstance(module, Source):
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and tensor.dtype is torch.float32:
                        tensor.data = tensor.data.to(dtype)
    return model


def packed(model: nn.Module, dtype: torch.dtype, scheme: str, scales: str = "") -> nn.Module:
    """Every linear a ``QuantizedLinear``, with ``scales`` of another dtype than float32 where it says so."""
    quantize_(model, KINDS[scheme].scheme.format(str(dtype).removeprefix("torch.")) + scales)
    return model.to(dtype)


def as_float(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself."""
    return model.to(dtype)


def torchao(model: nn.Module, dtype: torch.dtype, config: str, *, passes: bool = False) -> nn.Module:
    """By torchao, with its Inductor passes where asked; where ``config`` asks for the bits, 4 in groups of 32."""
    import torchao.quantization as ao

    if passes:
        inductor_quantizer()
    four: Any = torch.int4  # pyrefly: ignore[missing-attribute]
    bits = {"weight_dtype": four, "weight_granularity": ao.PerGroup(32)} if "Intx" in config else {}
    ao.quantize_(model.to(dtype), getattr(ao, config)(**bits))
    return model


def dynamic(model: nn.Module, dtype: torch.dtype, engine: str) -> nn.Module:
    """By torch.ao's ``quantize_dynamic``, which takes float32 only."""
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = engine
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# --- the variants -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to quantize and run a model.

    Args:
        prepare: ``(float32 model, dtype) -> model``; None leaves it to ``start``.
        backend: of torch.compile; None runs eagerly.
        config: of Inductor.
        dtype: of the activations; None is the workload's.
        start: ``(model, phases, threads) -> runs`` of another runtime.
        plain: the variant of plain Inductor on the same source, for the ratio of compile times.
        schemes: what ``--schemes`` selects it by.
        gguf: the blocks that llama.cpp, which runs a decoder only, has the weights in.
        quick: belongs to the short benchmark.
    """

    prepare: Callable[..., nn.Module] | None = None
    backend: str | None = None
    config: Mapping[str, Any] | None = None
    dtype: torch.dtype | None = None
    start: Callable[[nn.Module, Phases, int], Runs] | None = None
    plain: str = ""
    schemes: tuple[str, ...] = ("w8a8",)
    gguf: str = ""
    quick: bool = False


_AO = partial(torchao, config="Int8DynamicActivationInt8WeightConfig")
_AO_WEIGHT = partial(torchao, config="Int8WeightOnlyConfig")
_AO_4 = partial(torchao, config="Int8DynamicActivationIntxWeightConfig")
_W8A8, _W8A16 = partial(by_hand, scheme="w8a8"), partial(by_hand, scheme="w8a16")
# Scales are float16 as in llama.cpp's Q4_0.
_PACKED_4 = partial(packed, scales=" float16 scales")
_W4A16, _W4A8 = partial(_PACKED_4, scheme="w4a16-g128"), partial(_PACKED_4, scheme="w4a8-g32")
_FLOAT, _BY_8, _BY_4, _4_BY_8 = ("float",), ("w8a16",), ("w4a16",), ("w4a8",)
F32, BF16 = torch.float32, torch.bfloat16
VARIANTS: Mapping[str, Variant] = {
    "float32": Variant(as_float, "inductor", dtype=F32, schemes=_FLOAT),
    "bfloat16": Variant(as_float, "inductor", dtype=BF16, schemes=_FLOAT),
    "bfloat16 frozen": Variant(as_float, "inductor", FROZEN, BF16, schemes=_FLOAT),
    "fx_quant w8a8": Variant(_W8A8, "fx_quant", plain="inductor w8a8"),
    "inductor w8a8": Variant(_W8A8, "inductor"),
    "fx_quant w8a8 float32": Variant(_W8A8, "fx_quant", dtype=F32, plain="inductor w8a8 float32"),
    "fx_quant w8a8 float32 frozen": Variant(_W8A8, "fx_quant", FROZEN, F32),
    "fx_quant quantize_ w8a8 float32": Variant(partial(packed, scheme="w8a8"), "fx_quant", dtype=F32, quick=True),
    "inductor w8a8 float32": Variant(_W8A8, "inductor", dtype=F32),
    "fx_quant w8a16": Variant(_W8A16, "fx_quant", plain="inductor w8a16", schemes=_BY_8),
    "inductor w8a16": Variant(_W8A16, "inductor", schemes=_BY_8),
    "fx_quant w4a16": Variant(_W4A16, "fx_quant", schemes=_BY_4, quick=True),
    "fx_quant w4a8": Variant(_W4A8, "fx_quant", schemes=_4_BY_8),
    "fx_quant w4a8 float32": Variant(_W4A8, "fx_quant", dtype=F32, schemes=_4_BY_8, quick=True),
    "torchao w8a8": Variant(_AO, "inductor"),
    "torchao w8a8 by fx_quant": Variant(_AO, "fx_quant", plain="torchao w8a8"),
    "torchao w8a8 max-autotune": Variant(partial(_AO, passes=True), "inductor", TUNED),
    "torchao w8a8 float32 max-autotune": Variant(partial(_AO, passes=True), "inductor", TUNED, F32),
    "torchao w8a16 max-autotune": Variant(partial(_AO_WEIGHT, passes=True), "inductor", TUNED, schemes=_BY_8),
    "torchao w4a8 float32": Variant(_AO_4, "inductor", dtype=F32, schemes=_4_BY_8),
    "torchao w4a8 float32 by fx_quant": Variant(
        _AO_4, "fx_quant", dtype=F32, plain="torchao w4a8 float32", schemes=_4_BY_8
    ),
    "quantize_dynamic x86": Variant(partial(dynamic, engine="x86"), dtype=F32),
    "quantize_dynamic onednn": Variant(partial(dynamic, engine="onednn"), dtype=F32),
    "onnxruntime float32": Variant(start=partial(onnxruntime_start, int8=False), schemes=_FLOAT),
    "onnxruntime int8": Variant(start=partial(onnxruntime_start, int8=True)),
    "openvino float32": Variant(start=partial(openvino_start, int8=False), schemes=_FLOAT),
    "openvino bfloat16": Variant(start=partial(openvino_start, int8=False, precision="bf16"), schemes=_FLOAT),
    "openvino int8": Variant(start=partial(openvino_start, int8=True)),
    "llama.cpp Q8_0": Variant(gguf="Q8_0", schemes=("w8a8", "w8a16"), quick=True),
    "llama.cpp Q4_0": Variant(gguf="Q4_0", schemes=("w4a8", "w4a16"), quick=True),
}
OURS = "fx_quant"


def family(name: str) -> str:
    """What ``--peers`` selects the variant ``name`` by."""
    first = name.split(maxsplit=1)[0]
    return "float" if first in ("float32", "bfloat16") else first


FAMILIES = tuple(dict.fromkeys(map(family, VARIANTS)))
SCHEMES = tuple(dict.fromkeys(scheme for variant in VARIANTS.values() for scheme in variant.schemes))


def runs(name: str, model: str) -> bool:
    """Whether the variant ``name`` can run ``model``: llama.cpp is given a decoder only."""
    return model == "decoder" or not VARIANTS[name].gguf


def chosen(model: str, peers: Sequence[str], schemes: Sequence[str], *, quick: bool = False) -> list[str]:
    """Names of the variants of ``schemes`` that run ``model``; ours always.

    Args:
        peers: families, or ``all``.
        quick: only those of the short benchmark.
    """
    return [
        name
        for name, variant in VARIANTS.items()
        if (family(name) in (OURS, *peers) or "all" in peers)
        and set(variant.schemes) & set(schemes)
        and (variant.quick or not quick)
        and runs(name, model)
    ]
