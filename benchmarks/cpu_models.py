"""Whole models on a CPU: tokens a second, compile time, memory and error of every way to quantize and run them.

``cpu.py models`` runs each variant in a process of its own, ``python benchmarks/cpu_models.py FILE``, which reads what
to measure from FILE, prepares it, says what became of that, and then times a turn whenever it is asked
(``cpu_turns.py``). Errors are relative, to the float32 model run eagerly. A decode is one token after a prompt of 128.
Torch compiles twice, since a length of 1 is always a graph of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_cases import KINDS, Source, operands_of, relative_error, source
from cpu_decoder import Size, decoder
from cpu_measure import failure, locked
from cpu_model_runtimes import Phases, Runs, onnxruntime_start, openvino_start
from cpu_peers import FROZEN, TUNED, inductor_quantizer
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from fx_quant.layers.quantize_model import quantize_

PROMPT = 128
WRONG = 0.5  # a result whose error is larger has nothing to do with the model's


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


def decoder_workload(layers: int) -> Workload:
    """The decoder of ``cpu_decoder``: a prompt, then a token."""
    model = decoder(Size(layers=layers))
    ids = torch.randint(0, model.size.vocab, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    phases = {"prefill": (ids, torch.arange(PROMPT)), "decode": (ids[:, :1].clone(), torch.tensor([PROMPT]))}
    return Workload(model, torch.bfloat16, phases, {"prefill": PROMPT, "decode": 1})


def minilm_workload(layers: int) -> Workload:
    """MiniLM-L6 with its weights: one sentence, and 32 of them; ``layers`` is not asked."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from encoder import float32, tokenize
    from sentences import SENTENCES

    phases = {f"batch {size}": tokenize(SENTENCES[:size]) for size in (1, 32)}
    return Workload(float32(), torch.float32, phases, {name: inputs[0].numel() for name, inputs in phases.items()})


WORKLOADS: Mapping[str, Callable[[int], Workload]] = {"decoder": decoder_workload, "minilm": minilm_workload}


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


def packed(model: nn.Module, dtype: torch.dtype, scheme: str) -> nn.Module:
    """Every linear a ``QuantizedLinear``."""
    quantize_(model, KINDS[scheme].scheme.format(str(dtype).removeprefix("torch.")))
    return model.to(dtype)


def as_float(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself."""
    return model.to(dtype)


def torchao(model: nn.Module, dtype: torch.dtype, config: str, *, passes: bool = False) -> nn.Module:
    """By torchao, with its Inductor passes where asked."""
    import torchao.quantization as ao

    if passes:
        inductor_quantizer()
    ao.quantize_(model.to(dtype), getattr(ao, config)())
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
    """

    prepare: Callable[..., nn.Module] | None = None
    backend: str | None = None
    config: Mapping[str, Any] | None = None
    dtype: torch.dtype | None = None
    start: Callable[[nn.Module, Phases, int], Runs] | None = None
    plain: str = ""


_AO = partial(torchao, config="Int8DynamicActivationInt8WeightConfig")
_AO_WEIGHT = partial(torchao, config="Int8WeightOnlyConfig")
_W8A8, _W8A16 = partial(by_hand, scheme="w8a8"), partial(by_hand, scheme="w8a16")
_W4A16 = partial(packed, scheme="w4a16-g128")
BF16 = torch.bfloat16
VARIANTS: Mapping[str, Variant] = {
    "float32": Variant(as_float, "inductor", dtype=torch.float32),
    "bfloat16": Variant(as_float, "inductor", dtype=BF16),
    "bfloat16 frozen": Variant(as_float, "inductor", FROZEN, BF16),
    "fx_quant w8a8": Variant(_W8A8, "fx_quant", plain="inductor w8a8"),
    "inductor w8a8": Variant(_W8A8, "inductor"),
    "fx_quant w8a8 float32": Variant(_W8A8, "fx_quant", dtype=torch.float32, plain="inductor w8a8 float32"),
    "fx_quant w8a8 float32 frozen": Variant(_W8A8, "fx_quant", FROZEN, torch.float32),
    "inductor w8a8 float32": Variant(_W8A8, "inductor", dtype=torch.float32),
    "fx_quant w8a16": Variant(_W8A16, "fx_quant", plain="inductor w8a16"),
    "inductor w8a16": Variant(_W8A16, "inductor"),
    "fx_quant w4a16": Variant(_W4A16, "fx_quant"),
    "torchao w8a8": Variant(_AO, "inductor"),
    "torchao w8a8 by fx_quant": Variant(_AO, "fx_quant", plain="torchao w8a8"),
    "torchao w8a8 max-autotune": Variant(partial(_AO, passes=True), "inductor", TUNED),
    "torchao w8a8 float32 max-autotune": Variant(partial(_AO, passes=True), "inductor", TUNED, torch.float32),
    "torchao w8a16 max-autotune": Variant(partial(_AO_WEIGHT, passes=True), "inductor", TUNED),
    "quantize_dynamic x86": Variant(partial(dynamic, engine="x86"), dtype=torch.float32),
    "quantize_dynamic onednn": Variant(partial(dynamic, engine="onednn"), dtype=torch.float32),
    "onnxruntime float32": Variant(start=partial(onnxruntime_start, int8=False)),
    "onnxruntime int8": Variant(start=partial(onnxruntime_start, int8=True)),
    "openvino float32": Variant(start=partial(openvino_start, int8=False)),
    "openvino bfloat16": Variant(start=partial(openvino_start, int8=False, precision="bf16")),
    "openvino int8": Variant(start=partial(openvino_start, int8=True)),
}


def _torch_runs(model: nn.Module, variant: Variant, phases: Phases) -> Runs:
    call: Callable[..., Tensor] = model
    if variant.backend is not None:
        # Frozen weights are packed for one number of rows, so nothing is dynamic there.
        fixed = False if variant.config else None
        call = torch.compile(model, backend=variant.backend, dynamic=fixed, options=dict(variant.config or {}) or None)
    return {phase: partial(call, *inputs) for phase, inputs in phases.items()}


# --- measuring --------------------------------------------------------------------------------------------------------


def memory(name: str) -> float:
    """MiB of this process: ``VmRSS`` now, or ``VmHWM``, the most since ``reset_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def reset_peak() -> None:
    """Give freed memory back, and count the peak from here."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def turns(
    model: str, name: str, *, threads: int, layers: int, seconds: float, lock: str = ""
) -> Iterator[dict[str, Any]]:
    """First what became of the variant ``name`` of ``model``, then for each turn the seconds of each phase's calls.

    One that cannot run has no turns.
    """
    torch.set_num_threads(threads)
    workload, variant = WORKLOADS[model](layers), VARIANTS[name]
    dtype = variant.dtype or workload.dtype
    expected = {phase: workload.model(*inputs).double() for phase, inputs in workload.phases.items()}
    float_model, tokens = workload.model, workload.tokens
    found: dict[str, Any] = {"model": model, "variant": name, "threads": threads, "layers": layers}
    runs: Runs = {}
    # Freezing is read while Dynamo traces, which is at the first call of each phase.
    config = inductor_config.patch(**variant.config) if variant.config else contextlib.nullcontext()
    try:
        with config:
            with locked(lock, alone=False):
                start = time.perf_counter()
                if variant.start is not None:
                    runs = variant.start(float_model, workload.phases, threads)
                else:
                    assert variant.prepare is not None
                    runs = _torch_runs(variant.prepare(float_model, dtype), variant, workload.phases)
                found["prepare_s"] = time.perf_counter() - start
            del workload, float_model
            reset_peak()
            got, found["compile_s"] = {}, 0.0
            for phase, run in runs.items():
                with locked(lock, alone=False):
                    start = time.perf_counter()
                    got[phase] = run().double().clone()
                    found["compile_s"] += time.perf_counter() - start
            errors = {phase: relative_error([got[phase]], [expected[phase]]) for phase in runs}
        found["error"] = max(errors.values())
        found["peak_mib"] = memory("VmHWM")
        reset_peak()
        found["steady_mib"] = memory("VmRSS")
        found["tokens"] = dict(tokens)
        with torch.compiler.set_stance("fail_on_recompile"):
            for run in runs.values():
                run()
    except ImportError as error:
        found["status"] = f"needs {error.name or error}"
    except Exception as error:  # noqa: BLE001  (a peer may fail in any way; the table says how)
        found["status"] = failure(error)
    else:
        found["status"] = "ok" if found["error"] <= WRONG else "wrong"
    yield found
    while found["status"] in ("ok", "wrong"):
        with locked(lock, alone=True), torch.compiler.set_stance("fail_on_recompile"):
            taken = {phase: _seconds(run, seconds) for phase, run in runs.items()}
        yield taken


def _seconds(run: Callable[[], object], seconds: float) -> list[float]:
    """Of each call but the first, which finds the caches full of others' data, for about ``seconds``."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


# --- the table --------------------------------------------------------------------------------------------------------


def compile_ratio(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Compile seconds over those of plain Inductor on the same source; None where it was not run."""
    plain = VARIANTS[row["variant"]].plain
    for other in rows:
        same = all(other[key] == row[key] for key in ("model", "threads", "layers"))
        if same and other["variant"] == plain and "compile_s" in other and "compile_s" in row:
            return row["compile_s"] / other["compile_s"]
    return None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each model and number of threads."""
    tables = []
    for model, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        some = [row for row in rows if (row["model"], row["threads"]) == (model, threads)]
        phases = next((list(row["tokens_per_s"]) for row in some if "tokens_per_s" in row), [])
        lines: list[tuple[str, ...]] = []
        for row in some:
            if row["status"] not in ("ok", "wrong"):
                lines.append((row["variant"], row["status"][:60]))
                continue
            ratio = compile_ratio(row, rows)
            lines.append(
                (
                    row["variant"],
                    *(f"{row['tokens_per_s'][phase]:.1f}" for phase in phases),
                    f"{row['prepare_s']:.1f}",
                    f"{row['compile_s']:.1f}",
                    "" if ratio is None else f"{ratio:.2f}",
                    f"{row['peak_mib']:.0f}",
                    f"{row['steady_mib']:.0f}",
                    f"{row['error']:.3f}" + " wrong" * (row["status"] == "wrong"),
                )
            )
        what = f"{model}, threads {threads}"
        rates = [f"{phase} tokens/s" for phase in phases]
        headers = (what, *rates, "prepare s", "compile s", "/ inductor", "peak MiB", "steady MiB", "error")
        tables.append(tabulate(lines, headers=headers, tablefmt="simple", disable_numparse=True))
    return "\n\n".join(tables)


def main() -> None:
    """Prepare what the file says, then take a turn for each line that comes in; results are lines too."""
    results, ours = os.fdopen(os.dup(1), "w"), turns(**json.loads(Path(sys.argv[1]).read_text()))
    os.dup2(2, 1)  # what libraries print is no result
    print(json.dumps(next(ours)), file=results, flush=True)
    for _ in sys.stdin:
        print(json.dumps(next(ours)), file=results, flush=True)


if __name__ == "__main__":
    main()
