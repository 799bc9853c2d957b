"""Tokens and recompiles of decoders of ``transformers`` that generate: whole, in pieces, and by plain Inductor.

``python benchmarks/decoders.py`` builds small decoders with random weights (Llama, Qwen3, Gemma 3, GPT-2), quantizes
them by torchao and by fx_quant, and calls ``generate()`` with a static and a dynamic cache for batches of 1 to 8. Of
each way it prints for how many batches the tokens are those of the eager quantized model, how many graphs were
compiled for the first batches and how many after these, and what pieces there were. ``--eager`` runs what the passes
leave op by op instead of compiling it, which takes seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fx_quant
from fx_quant import backend
from fx_quant.diagnose.capture import run_eagerly
from fx_quant.report import Report

MODELS = ("llama", "qwen3", "gemma3", "gpt2")
QUANTIZED = ("torchao", "fx_quant")
CACHES = ("static", "dynamic")
WAYS = ("inductor", "whole", "piecewise")
WARM = (2, 3, 1)  # Dynamo makes a size dynamic when it sees a second one, and keeps 1 apart
BATCHES = (1, 2, 3, 5, 8)
VOCABULARY, LENGTH = 128, 18


def decoder(name: str, layers: int = 2) -> nn.Module:
    """A small decoder of ``transformers``, always the same random weights."""
    import transformers as hf

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    if name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **ends))
    elif name == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, **ends))
    elif name == "gemma3":
        model = hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                **sizes, **ends, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * (layers // 2)
            )
        )
    else:
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=layers, n_head=4, n_positions=64, **ends)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def quantized(model: nn.Module, by: str) -> nn.Module:
    """``model`` with int8 weights and activations per token, in place."""
    if by == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    else:
        fx_quant.quantize_(model, "int8 per_token (dynamic) x int8 per_channel")
    return model


Compiler = Callable[[torch.fx.GraphModule, Sequence[Any]], Any]


@dataclass
class Seen:
    """What was compiled: graphs of Dynamo's, and the reports of ours."""

    graphs: int = 0
    reports: list[Report] = field(default_factory=list)

    def counting(self, compiler: Compiler) -> Compiler:
        """``compiler``, counted."""

        def counted(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            self.graphs += 1
            return compiler(gm, example_inputs)

        return counted


@contextlib.contextmanager
def watched(*, eager: bool) -> Iterator[Seen]:
    """Notes what is compiled; where ``eager``, what the passes leave is run op by op instead."""
    seen, record, compile_fx = Seen(), backend._record, backend.compile_fx

    def recorded(report: Report, **how: Any) -> None:
        seen.reports.append(report)
        record(report, **how)

    def quick(*args: Any, **kwargs: Any) -> Any:
        return compile_fx(*args, **{**({"inner_compile": run_eagerly} if eager else {}), **kwargs})

    with mock.patch.object(backend, "_record", recorded), mock.patch.object(backend, "compile_fx", quick):
        yield seen


def ours(**options: Any) -> Compiler:
    """Our backend with ``options``."""
    return functools.partial(backend.fx_quant, options=options)


def inductor(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Plain Inductor."""
    return backend.compile_fx(gm, example_inputs)


COMPILERS = {"inductor": inductor, "whole": ours(), "piecewise": ours(piecewise=True)}


def prompts(model: nn.Module, batch: int) -> Tensor:
    """``ids[batch, 4 + batch]`` after which ``model`` is sure of each token: no rounding decides between two."""
    rows = torch.Generator().manual_seed(batch)
    ids = torch.randint(2, VOCABULARY, (48, 4 + batch), generator=rows)
    said = _generate(model, ids, "dynamic", output_logits=True, return_dict_in_generate=True)
    best = torch.stack(said.logits).topk(2).values
    sure = (best[..., 0] - best[..., 1]).amin(0)
    return ids[sure.topk(batch).indices]


def generate(model: nn.Module, ids: Tensor, cache: str) -> Tensor:
    """The tokens after ``ids``, with a cache that is static or dynamic."""
    return _generate(model, ids, cache)[:, ids.shape[1] :]


def _generate(model: Any, ids: Tensor, cache: str, **options: Any) -> Any:
    if cache == "static":
        options["cache_implementation"] = "static"
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        disable_compile=True,
        max_length=LENGTH,
        **options,
    )


@dataclass
class Row:
    """What came of one way."""

    model: str
    by: str
    cache: str
    way: str
    same: int = 0
    warm: int = 0
    after: int = 0
    pieces: str = ""
    seconds: float = 0.0


def measure(name: str, by: str, cache: str, ways: Sequence[str], *, eager: bool) -> list[Row]:
    """A row for each way."""
    rows = []
    model = quantized(decoder(name), by)
    given = {batch: prompts(model, batch) for batch in BATCHES}
    expected = {batch: generate(model, ids, cache) for batch, ids in given.items()}
    forward = model.forward
    for way in ways:
        torch._dynamo.reset()
        row, start = Row(name, by, cache, way), time.perf_counter()
        with watched(eager=eager) as seen, torch._inductor.config.patch(force_disable_caches=True):
            model.forward = torch.compile(forward, backend=seen.counting(COMPILERS[way]))
            for batch in WARM:
                generate(model, given[batch], cache)
            row.warm = seen.graphs
            for batch in BATCHES:
                row.same += torch.equal(generate(model, given[batch], cache), expected[batch])
            row.after = seen.graphs - row.warm
        model.forward = forward
        row.seconds = time.perf_counter() - start
        row.pieces = "; ".join(dict.fromkeys(report.how_cut() for report in seen.reports))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--by", nargs="+", choices=QUANTIZED, default=QUANTIZED)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--eager", action="store_true", help="run op by op what the passes leave")
    options = parser.parse_args()
    logging.getLogger("fx_quant").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name in options.models:
        for by in options.by:
            for cache in options.caches:
                rows += measure(name, by, cache, options.ways, eager=options.eager)
    print(tabulate([vars(row) for row in rows], headers="keys"))


if __name__ == "__main__":
    main()
