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
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cpu_llama_cpp
import torch
from cpu_cases import relative_error
from cpu_decoder import Decoder
from cpu_gguf import write_decoder
from cpu_measure import failure
from cpu_model_runtimes import Phases, Runs
from cpu_peers import QUANTIZED
from cpu_process import answer, huge_pages, locked, memory, reset_peak, seconds_of_calls
from cpu_variants import VARIANTS, WORKLOADS, Variant, decoder_workload
from torch import Tensor, nn
from torch._inductor import config as inductor_config

WRONG = 0.5  # a result whose error is larger has nothing to do with the model's


def _torch_runs(model: nn.Module, variant: Variant, phases: Phases) -> Runs:
    call: Callable[..., Tensor] = model
    if variant.backend is not None:
        # Frozen weights are packed for one number of rows, so nothing is dynamic there.
        fixed = False if variant.config else None
        call = torch.compile(model, backend=variant.backend, dynamic=fixed, options=dict(variant.config or {}) or None)
    return {phase: partial(call, *inputs) for phase, inputs in phases.items()}


def weight_bytes(model: nn.Module) -> int | None:
    """Of parameters and buffers, what is inside of a tensor subclass too, each storage once; a cache is no weight.

    None where ``quantize_dynamic`` packed weights into what is no tensor.
    """
    if any(hasattr(module, "_packed_params") for module in model.modules()):
        return None
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
            reset_peak()
            with locked(lock, alone=False):
                start = time.perf_counter()
                if variant.start is not None:
                    runs = variant.start(float_model, workload.phases, threads)
                else:
                    assert variant.prepare is not None
                    prepared = variant.prepare(float_model, dtype)
                    nbytes = weight_bytes(prepared)
                    if nbytes is not None:
                        found["weights_mib"] = nbytes / 2**20
                    runs = _torch_runs(prepared, variant, workload.phases)
                    del prepared
                found["prepare_s"] = time.perf_counter() - start
            found["prepare_peak_mib"] = memory("VmHWM")  # the float model, and what is made of it
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
        found["steady_mib"], found["huge_mib"] = memory("VmRSS"), huge_pages()
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
