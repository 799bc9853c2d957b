"""Ways to run a quantized model beside one call of it: generate, adapters, blocks compiled by themselves, autocast, hooks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import decoders
from benchmarks.decoders import Seen, ours, watched
from tests.dialects.capture import fresh, inductor_config_restored
from tests.dialects.outcome import failed
from tests.model_matrix import images, text
from tests.model_matrix.count import quantized_calls
from tests.model_matrix.measure import (
    cpu_seconds,
    error,
    graphs_without_us,
    merged,
    of_report,
    outcome_of,
    quantized,
    uncached,
)
from tests.model_matrix.outcome import Outcome
from tests.model_matrix.registry import Model, Way, in_dtype, missing
from tests.model_matrix.ways import WAYS

_WAYS = {way.name: way for way in WAYS}
_MODELS = {model.name: model for model in (*text.DECODERS, *images.DIFFUSERS)}
_BATCHES = (2, 3, 4)


@dataclass(frozen=True)
class Use:
    """A way to run a model.

    Args:
        model, way: their names, as in the table; the use is named in ``way``.
        run: given the row with those names, fills it in.
        needs: distributions that must be installed.
    """

    model: str
    way: str
    run: Callable[[Outcome], Outcome]
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``model, way``, as that of its outcome."""
        return f"{self.model}, {self.way}"


def use(each: Use) -> Outcome:
    """What becomes of ``each``."""
    row = Outcome(each.model, each.way)
    lacking = missing(each.needs)
    if lacking:
        return dataclasses.replace(row, unavailable=f"needs {', '.join(lacking)}")
    started = cpu_seconds()
    with inductor_config_restored():
        try:
            row = each.run(row)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the outcome)
            row = dataclasses.replace(row, failed=failed(error))
    fresh()
    return dataclasses.replace(row, seconds=cpu_seconds() - started)


# --- generate ---------------------------------------------------------------------------------------------------------


def generated(name: str, by: str, cache: str, row: Outcome) -> Outcome:
    """Prompts of several batches: the error is the share of tokens that are not those of the eager model."""
    model = decoders.quantized(decoders.decoder(name), by)
    given = [decoders.prompts(model, batch) for batch in _BATCHES]
    expected = [decoders.generate(model, ids, cache) for ids in given]
    counts, _ = quantized_calls(model, lambda: model(input_ids=given[0], use_cache=False))
    tokens, seen, breaks = _generated(model, given, cache, ours())
    plain = graphs_without_us(seen.graphs, lambda compiler: _generated(model, given, cache, compiler)[1].graphs)
    wrong = sum((found != wanted).sum().item() for found, wanted in zip(tokens, expected, strict=True))
    report = merged(seen.reports)
    linears = sum(counts.values()) * seen.graphs
    told = len(report.sites) + len(report.recognised) + len(report.misses)
    return dataclasses.replace(
        row,
        **of_report(report, linears) | {"breaks": breaks},
        silent=max(0, linears - told),
        error=wrong / sum(wanted.numel() for wanted in expected),
        graphs=seen.graphs,
        plain_graphs=plain,
    )


def _generated(
    model: Any, given: Sequence[torch.Tensor], cache: str, compiler: decoders.Compiler
) -> tuple[list[torch.Tensor], Seen, int]:
    forward = model.forward
    fresh()
    try:
        with watched(eager=True) as seen, uncached():
            model.forward = torch.compile(forward, backend=seen.counting(compiler))
            tokens = [decoders.generate(model, ids, cache) for ids in given]
            return tokens, seen, sum(counters["graph_break"].values())
    finally:
        model.forward = forward


# --- blocks compiled by themselves ------------------------------------------------------------------------------------


def in_blocks(model: Model, way: Way, blocks: Callable[[Any], Sequence[nn.Module]], row: Outcome) -> Outcome:
    """Each block compiled by itself: those of a class may share their graphs, so that its linears are told once."""
    module = quantized(model, way)
    inputs = [in_dtype(model.inputs(*size), way.dtype) for size in model.sizes]
    counts, eager = quantized_calls(module, lambda: module(**inputs[0]))
    names = {each: name for name, each in module.named_modules()}
    of_class: dict[type, list[int]] = defaultdict(list)
    for block in blocks(module):
        inside = sum(calls for name, calls in counts.items() if name.startswith(f"{names[block]}."))
        of_class[type(block)].append(inside)
    output, seen, breaks = _in_blocks(module, blocks(module), inputs[:1], ours())
    shared = seen.graphs < sum(map(len, of_class.values()))
    linears = sum((min if shared else sum)(inside) for inside in of_class.values())
    report = merged(seen.reports)
    told = len(report.sites) + len(report.recognised) + len(report.misses)

    def graphs(compiler: decoders.Compiler) -> int:
        return _in_blocks(module, blocks(module), inputs, compiler)[1].graphs

    of_all_sizes = graphs(ours())
    return dataclasses.replace(
        row,
        **of_report(report, linears) | {"breaks": breaks},
        silent=max(0, linears - told),
        error=error(output, eager),
        graphs=of_all_sizes,
        plain_graphs=graphs_without_us(of_all_sizes, graphs),
    )


def _in_blocks(
    module: nn.Module, blocks: Sequence[nn.Module], inputs: Sequence[dict[str, Any]], compiler: decoders.Compiler
) -> tuple[Any, Seen, int]:
    """The output of the first of ``inputs``, what was compiled, and the graph breaks."""
    fresh()
    try:
        with watched(eager=True) as seen, uncached(), torch.no_grad():
            for block in blocks:
                block.compile(backend=seen.counting(compiler))
            outputs = [module(**each) for each in inputs]
            return outputs[0], seen, sum(counters["graph_break"].values())
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _layers(module: Any) -> list[nn.Module]:
    """The layers of a decoder."""
    return list(module.model.layers)


def _repeated(module: Any) -> list[nn.Module]:
    """What diffusers' ``compile_repeated_blocks`` compiles."""
    return [each for each in module.modules() if type(each).__name__ in module._repeated_blocks]


# --- one call, changed ------------------------------------------------------------------------------------------------


def changed(
    model: Model,
    way: Way,
    change: Callable[[nn.Module], nn.Module],
    row: Outcome,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    dtype: str = "float32",
) -> Outcome:
    """``model`` quantized and then changed by ``change``, called under ``context``; ``dtype`` is that of its sites."""
    module = change(quantized(model, way))
    inputs = [in_dtype(model.inputs(*size), way.dtype) for size in model.sizes]
    row = dataclasses.replace(row, dtype=dtype)
    return outcome_of(row, module, module, inputs, recompiles=True, context=context)


def with_adapters(module: nn.Module) -> nn.Module:
    """PEFT's LoRA beside two of the projections of each layer, none of them zero."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(module, config).eval().requires_grad_(False)


def with_hooks(module: nn.Module) -> nn.Module:
    """accelerate's hooks on every module that holds tensors, as ``device_map`` sets them."""
    from accelerate import dispatch_model

    return dispatch_model(module, device_map={"": "cpu"}, force_hooks=True)


def _autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _unchanged(module: nn.Module) -> nn.Module:
    return module


_LLAMA, _AO, _OURS = _MODELS["llama"], _WAYS["torchao W8A8"], _WAYS["quantize_ W8A8"]
_HF, _BOTH = ("transformers",), ("transformers", "torchao")

USES = (
    Use(
        "llama", "torchao W8A8, generate() with a static cache", partial(generated, "llama", "torchao", "static"), _BOTH
    ),
    Use(
        "llama",
        "quantize_ W8A8, generate() with a dynamic cache",
        partial(generated, "llama", "fx_quant", "dynamic"),
        _HF,
    ),
    Use(
        "gemma3",
        "quantize_ W8A8, generate() with a static cache",
        partial(generated, "gemma3", "fx_quant", "static"),
        _HF,
    ),
    Use(
        "gemma3",
        "torchao W8A8, generate() with a dynamic cache",
        partial(generated, "gemma3", "torchao", "dynamic"),
        _BOTH,
    ),
    Use("llama", "torchao W8A8, each layer compiled", partial(in_blocks, _LLAMA, _AO, _layers), _BOTH),
    Use("gemma3", "quantize_ W8A8, each layer compiled", partial(in_blocks, _MODELS["gemma3"], _OURS, _layers), _HF),
    Use(
        "flux",
        "torchao W8A8, compile_repeated_blocks()",
        partial(in_blocks, _MODELS["flux"], _AO, _repeated),
        ("diffusers", "torchao"),
    ),
    Use(
        "llama",
        "torchao W8A8, autocast to bfloat16",
        partial(changed, _LLAMA, _AO, _unchanged, context=_autocast, dtype="bfloat16"),
        _BOTH,
    ),
    Use(
        "llama",
        "quantize_ W8A8, autocast to bfloat16",
        partial(
            changed,
            _LLAMA,
            dataclasses.replace(_OURS, dtype=torch.float32),
            _unchanged,
            context=_autocast,
            dtype="bfloat16",
        ),
        _HF,
    ),
    Use("llama", "torchao W8A8, LoRA of PEFT", partial(changed, _LLAMA, _AO, with_adapters), (*_BOTH, "peft")),
    Use(
        "llama",
        "torchao int8 weights, LoRA of PEFT",
        partial(changed, _LLAMA, _WAYS["torchao int8 weights"], with_adapters, dtype="bfloat16"),
        (*_BOTH, "peft"),
    ),
    Use(
        "llama", "torchao W8A8, hooks of accelerate", partial(changed, _LLAMA, _AO, with_hooks), (*_BOTH, "accelerate")
    ),
    Use(
        "llama",
        "quantize_ W8A8, hooks of accelerate",
        partial(changed, _LLAMA, _OURS, with_hooks, dtype="bfloat16"),
        (*_HF, "accelerate"),
    ),
)
