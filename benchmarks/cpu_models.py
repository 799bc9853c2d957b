"""Whole models on a CPU: tokens a second, compile time, memory and error of every way to quantize and run them.

``cpu.py models`` runs each variant in a process of its own, ``python benchmarks/cpu_models.py FILE``, which reads what
to measure from FILE, prepares it, says what became of that, and then times a turn whenever it is asked
(``cpu_turns.py``). Errors are relative, to the float32 model run eagerly. A decode is one token after a prompt.
Torch compiles twice, since a length of 1 is always a graph of its own.

What is counted, of every variant alike: *prepare* is to quantize, convert, write and load; *compile* the first call of
each phase; *resident* the process after its first calls, *empty* the same before it had a model; *weights* what the
prepared model keeps of them, embedding included, where that can be told. The *peak* is that of compiling and of the
first calls, when the float model is gone; of llama.cpp, which loads a file, that of its whole process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cpu_llama_cpp
import torch
from cpu_cases import KINDS, Source, operands_of, relative_error, source
from cpu_decoder import Decoder, Size, decoder
from cpu_gguf import write_decoder
from cpu_measure import failure
from cpu_model_runtimes import Phases, Runs, onnxruntime_start, openvino_start
from cpu_peers import FROZEN, QUANTIZED, TUNED, inductor_quantizer
from cpu_process import answer, locked, memory, reset_peak, seconds_of_calls
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from fx_quant.layers.quantize_model import quantize_

WIDTH = 120  # of a table
PROMPT = 128  # tokens, where no other number is asked for
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
_W8A8, _W8A16 = partial(by_hand, scheme="w8a8"), partial(by_hand, scheme="w8a16")
_W4A16, _W4A8 = partial(packed, scheme="w4a16-g128"), partial(packed, scheme="w4a8-g32")
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
        and (model == "decoder" or not variant.gguf)
    ]


def _torch_runs(model: nn.Module, variant: Variant, phases: Phases) -> Runs:
    call: Callable[..., Tensor] = model
    if variant.backend is not None:
        # Frozen weights are packed for one number of rows, so nothing is dynamic there.
        fixed = False if variant.config else None
        call = torch.compile(model, backend=variant.backend, dynamic=fixed, options=dict(variant.config or {}) or None)
    return {phase: partial(call, *inputs) for phase, inputs in phases.items()}


# --- measuring --------------------------------------------------------------------------------------------------------


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, what is inside of a tensor subclass too, each storage once; a cache is no weight."""
    inside: list[Any] = [
        tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not name.startswith(("keys_", "values_"))
    ]
    storages: dict[int, int] = {}
    while inside:
        tensor = inside.pop()
        if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            inside += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _found(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its variant whatever becomes of it."""
    return {
        "variant": asked["name"],
        **{key: asked[key] for key in ("model", "threads", "layers", "prompt", "huge_pages")},
    }


@torch.no_grad()
def turns(asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """First what became of the variant that is asked for, then for each turn the seconds of each phase's calls.

    One that cannot run has no turns.

    Args:
        asked: ``model`` and the variant's ``name``; ``threads``, ``layers``, tokens of the ``prompt``; ``seconds`` of
            a phase in a turn; a file to ``lock``; whether the process was started for ``huge_pages``.
    """
    threads, lock = asked["threads"], asked["lock"]
    torch.set_num_threads(threads)
    found: dict[str, Any] = {**_found(asked), "empty_mib": memory("VmRSS")}
    workload, variant = WORKLOADS[asked["model"]](asked["layers"], asked["prompt"]), VARIANTS[asked["name"]]
    dtype = variant.dtype or workload.dtype
    expected = {phase: workload.model(*inputs).double() for phase, inputs in workload.phases.items()}
    float_model, tokens = workload.model, workload.tokens
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
                    prepared = variant.prepare(float_model, dtype)
                    found["weights_mib"] = weight_bytes(prepared) / 2**20
                    runs = _torch_runs(prepared, variant, workload.phases)
                    del prepared
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
            taken = {phase: seconds_of_calls(run, asked["seconds"]) for phase, run in runs.items()}
        yield taken


@torch.no_grad()
def hand_over(asked: Mapping[str, Any], path: Path) -> None:
    """Write the decoder for llama.cpp, and become the process that runs it, which has no torch.

    Its logits must be those of the decoder with the weights that were written, up to its quantization of activations.
    Returns where that process cannot be.

    Args:
        asked: as for ``turns``.
        path: the file that ``asked`` is from; others are written beside it.

    Raises:
        ImportError: llama.cpp is not there.
    """
    library, kind = cpu_llama_cpp.library(), VARIANTS[asked["name"]].gguf
    torch.set_num_threads(asked["threads"])
    workload = decoder_workload(asked["layers"], asked["prompt"])
    model, gguf, phases = workload.model, path.with_name("model.gguf"), {}
    assert isinstance(model, Decoder)

    def say(weights: str) -> None:
        """Write what ``model`` gives with its present weights."""
        for phase, (ids, positions) in workload.phases.items():
            logits = path.with_name(f"{phase}.{weights}")
            logits.write_bytes(model(ids, positions).float().numpy().tobytes())
            given = phases.setdefault(phase, {"ids": ids[0].tolist(), "after": int(positions[0])})
            given[weights] = str(logits)

    say("float")
    start = time.perf_counter()
    write_decoder(model, kind, gguf)
    found = {**_found(asked), "tokens": dict(workload.tokens), "prepare_s": time.perf_counter() - start}
    say("decoded")
    files = {"library": str(library), "gguf": str(gguf), "phases": phases, "found": found}
    given = {"context": model.size.context, "tolerance": QUANTIZED, **files}
    path.write_text(json.dumps({**asked, **given}))
    os.execv(sys.executable, [sys.executable, cpu_llama_cpp.__file__, str(path)])


# --- the table --------------------------------------------------------------------------------------------------------


def compile_ratio(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Compile seconds over those of plain Inductor on the same source; None where it was not run."""
    plain = VARIANTS[row["variant"]].plain
    for other in rows:
        same = all(other.get(key) == row.get(key) for key in ("model", "threads", "layers", "prompt", "huge_pages"))
        if same and other["variant"] == plain and "compile_s" in other and "compile_s" in row:
            return row["compile_s"] / other["compile_s"]
    return None


# What a table says of a variant beside its rates and its error.
_COLUMNS = {
    "prepare s": "prepare_s",
    "compile s": "compile_s",
    "/ plain": "",
    "peak MiB": "peak_mib",
    "resident MiB": "steady_mib",
    "weights MiB": "weights_mib",
}
_GROUP = ("model", "threads", "prompt", "huge_pages")  # what a table is of


def _cell(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], key: str) -> str:
    if not key:
        ratio = compile_ratio(row, rows)
        return "" if ratio is None else f"{ratio:.2f}"
    value = row.get(key)
    return "" if value is None else f"{value:.1f}" if key.endswith("_s") else f"{value:.0f}"


def table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """A table for each model, prompt and number of threads, and how ours stand to llama.cpp; 120 columns at most."""
    tables, form = [], _markdown if markdown else _text
    for group in dict.fromkeys(tuple(row.get(key) for key in _GROUP) for row in rows):
        some = [row for row in rows if tuple(row.get(key) for key in _GROUP) == group]
        phases = next((list(row["tokens_per_s"]) for row in some if "tokens_per_s" in row), [])
        lines: list[tuple[str, ...]] = []
        for row in some:
            if "tokens_per_s" not in row:
                lines.append((row["variant"], row["status"]))
                continue
            rates = [f"{row['tokens_per_s'][phase]:.1f}" for phase in phases]
            error = f"{row['error']:.3f}" + " wrong" * (row["status"] == "wrong")
            lines.append((row["variant"], *rates, *(_cell(row, rows, key) for key in _COLUMNS.values()), error))
        model, threads, prompt, huge = group
        below = [f"prompt {prompt}"] * (model == "decoder" and prompt is not None) + ["huge pages"] * bool(huge)
        titles = [*(f"{phase} tokens/s" for phase in phases), *_COLUMNS]
        headers = [(f"{model}, threads {threads}", ", ".join(below)), *(tuple(each.rsplit(" ", 1)) for each in titles)]
        tables.append(form([*headers, ("error", "")], lines))
        if to := to_llama_cpp(some):
            tables.append(form(*to))
    if any(row["status"] == "needs llama.cpp" for row in rows):
        tables.append(cpu_llama_cpp.ABSENT)
    return "\n\n".join(tables)


Headers = Sequence[tuple[str, str]]  # two lines of each column's title
Lines = Sequence[tuple[str, ...]]


def _text(headers: Headers, lines: Lines) -> str:
    """Columns as wide as they must be; what stands where the rest of a line is missing widens none."""
    whole = [*zip(*headers, strict=True), *(line for line in lines if len(line) == len(headers))]
    names = max(len(line[0]) for line in [*whole, *lines])
    widths = [names, *(max(map(len, column)) for column in list(zip(*whole, strict=True))[1:])]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip()[:WIDTH]
        for line in (*whole[:2], rule, *lines)
    )


def _markdown(headers: Headers, lines: Lines) -> str:
    """As the README has tables."""
    titles = [" ".join(filter(None, header)) for header in headers]
    padded = [(*line, *[""] * (len(headers) - len(line))) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *padded))


def _own_mib(row: Mapping[str, Any]) -> float | None:
    """What the process holds beyond an empty one and its weights."""
    keys = ("steady_mib", "empty_mib", "weights_mib")
    return row[keys[0]] - row[keys[1]] - row[keys[2]] if all(key in row for key in keys) else None


def to_llama_cpp(rows: Sequence[Mapping[str, Any]]) -> tuple[Headers, Lines] | None:
    """Of each variant of ours, the tokens a second over those of llama.cpp with as many bits; None without it.

    The last columns are what each process holds beyond its weights and an empty process.
    """
    ran = [row for row in rows if "tokens_per_s" in row and row["status"] == "ok"]
    peers = [row for row in ran if VARIANTS[row["variant"]].gguf]
    lines = []
    for row in (row for row in ran if family(row["variant"]) == OURS):
        for peer in peers:
            if set(VARIANTS[row["variant"]].schemes) & set(VARIANTS[peer["variant"]].schemes):
                rates = [f"{rate / peer['tokens_per_s'][phase]:.2f}" for phase, rate in row["tokens_per_s"].items()]
                own = ["" if mib is None else f"{mib:.0f}" for mib in (_own_mib(row), _own_mib(peer))]
                lines.append((row["variant"], peer["variant"], *rates, *own))
    if not lines:
        return None
    phases = [(phase, "ratio") for phase in peers[0]["tokens_per_s"]]
    return [("ours", ""), ("to", ""), *phases, ("own", "MiB"), ("its own", "MiB")], lines


def main() -> None:
    """Prepare what the file says, then take a turn for each line that comes in; results are lines too."""
    path = Path(sys.argv[1])
    asked = json.loads(path.read_text())
    if VARIANTS[asked["name"]].gguf:
        try:
            hand_over(asked, path)
        except ImportError as error:
            print(json.dumps({**_found(asked), "status": f"needs {error.name or error}"}), flush=True)
            return
    answer(turns(asked))


if __name__ == "__main__":
    main()
