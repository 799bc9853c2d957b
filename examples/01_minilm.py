"""A real sentence encoder in int8 and fp8, compiled by fx_quant: what was rewritten, how true, how fast.

``python examples/01_minilm.py`` (or ``make demo``). Exits with 1 when a quantized matmul was missed, when a rewritten
linear differs from its source, or when the embeddings moved further than float rounding moves them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from encoder import QUANTIZED, Encoder, Fp8Linear, Inputs, batches, float32, onednn_spoils_float8, tokenize, use_onednn
from sentences import QUERIES, SENTENCES
from stopwatch import interleaved_medians, verify
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fx_quant

BATCH = 8
# One linear on the same input: only the rounding of a sum may differ.
MIN_LINEAR_COSINE = 0.9999
# Embeddings: at most this many times what one float32 rounding of the input does to the eager model.
MAX_DRIFT = 2.0

_started = time.perf_counter()


def say(text: str = "") -> None:
    """One progress line with the seconds since the start."""
    print(f"[{time.perf_counter() - _started:5.1f} s] {text}" if text else "", flush=True)


def embed(model: Callable[..., Tensor], inputs: Sequence[Inputs]) -> Tensor:
    """The embeddings of all batches, ``[sentences, 384]``."""
    return torch.cat([model(*batch) for batch in inputs])


def cosines(x: Tensor, reference: Tensor) -> Tensor:
    """Cosine of each row of ``x`` with the same row of ``reference``, in float64."""
    return F.cosine_similarity(x.double(), reference.double(), dim=-1)


def compile_and_embed(model: Encoder, backend: str, inputs: Sequence[Inputs]) -> tuple[Callable[..., Tensor], Tensor]:
    """``model`` compiled once for all lengths, and its embeddings."""
    compiled = torch.compile(model, backend=backend)
    graphs = counters["stats"]["unique_graphs"]
    start = time.perf_counter()
    first = compiled(*inputs[0])
    took = time.perf_counter() - start
    embeddings = torch.cat([first, embed(compiled, inputs[1:])])
    recompiles = counters["stats"]["unique_graphs"] - graphs - 1
    lengths = sorted({ids.shape[1] for ids, _ in inputs})
    say(f"  {backend}: compiled in {took:.1f} s; {recompiles} recompiles over the padded lengths {lengths}")
    return compiled, embeddings


class EachLinear(nn.Module):
    """The quantized linears of a model, each on an input of its own: errors of one cannot reach the next."""

    def __init__(self, linears: Sequence[nn.Module]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The output of each linear on its input."""
        return [linear(x) for linear, x in zip(self.linears, inputs, strict=True)]


def linear_cosine(model: Encoder, batch: Inputs) -> float:
    """The least cosine of fx_quant's output with eager's on eager's own inputs, over every token.

    Of the linears of the first and the last layer; those between differ in their weights only.
    """
    layers = model.bert.encoder.layer
    linears = [m for layer in (layers[0], layers[-1]) for m in layer.modules() if isinstance(m, nn.Linear | Fp8Linear)]
    inputs: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for m in linears]
    model(*batch)
    for hook in hooks:
        hook.remove()
    each = EachLinear(linears)
    compiled = torch.compile(each, backend="fx_quant")
    return min(cosines(x, r).min().item() for x, r in zip(compiled(inputs), each(inputs), strict=True))


def nudged(model: Encoder, inputs: Sequence[Inputs]) -> Tensor:
    """Eager embeddings after every entry of the word embeddings moved to a neighbouring float32.

    A dynamically quantized model amplifies this: a value that stood at the boundary between two codes takes the other,
    and the next layer starts from there. It is how far two correct ways to compute the model may be apart.
    """
    weight = model.bert.get_input_embeddings().weight
    kept = weight.clone()
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.copy_(torch.nextafter(weight, towards.sign() * torch.inf))
    moved = embed(model, inputs)
    weight.copy_(kept)
    return moved


def nearest(model: Callable[..., Tensor], sentences: Sequence[str], queries: Sequence[str]) -> list[str]:
    """For each query the sentence whose embedding is nearest."""
    corpus = model(*tokenize(sentences))
    return [sentences[i] for i in (model(*tokenize(queries)) @ corpus.T).argmax(dim=1).tolist()]


def fidelity(
    name: str, model: Encoder, embeddings: dict[str, Tensor], original: Tensor, inputs: Sequence[Inputs]
) -> list[str]:
    """Print how far each way to run the model is from eager and from float32; returns what is wrong."""
    eager = embeddings["eager"]
    ways = {**embeddings, "eager, input one rounding away": nudged(model, inputs)}
    rows = []
    for way, x in ways.items():
        to_eager, to_original = cosines(x, eager), cosines(x, original)
        rows.append((way, *(f"{v:.6f}" for c in (to_eager, to_original) for v in (c.min(), c.mean()))))
    headers = (f"{name} {len(eager)} embeddings", "vs eager: min", "mean", "vs float32: min", "mean")
    print(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))

    drift, noise = (1 - cosines(ways[way], eager).mean().item() for way in ("fx_quant", list(ways)[-1]))
    linear = linear_cosine(model, inputs[-1])
    say(f"  each linear of the first and last layer on eager's own input: least cosine of any token {linear:.7f}")
    wrong = []
    if not linear >= MIN_LINEAR_COSINE:
        wrong.append(f"{name}: each linear must have cosine >= {MIN_LINEAR_COSINE} with eager, got {linear:.6f}")
    if not drift <= MAX_DRIFT * noise:
        wrong.append(
            f"{name}: embeddings must stay within {MAX_DRIFT:g}x of what a float32 rounding does to the eager model "
            f"(mean 1 - cosine {noise:.1e}), got {drift:.1e}"
        )
    return wrong


def timings(name: str, ways: dict[str, Callable[..., Tensor]]) -> list[tuple[str, ...]]:
    """Rows of median milliseconds at batch 1 and 32."""
    rows: list[tuple[str, ...]] = []
    for size in (1, 32):
        batch = tokenize(SENTENCES[:size])
        say(f"  batch {size}, {batch[0].shape[1]} tokens")
        verify(ways, batch)
        ms = interleaved_medians(ways, batch)
        cells = [f"{ms[way]:.1f}" for way in ways]
        rows.append((name, f"{size} x {batch[0].shape[1]}", *cells, f"{ms['fx_quant'] / ms['inductor']:.2f}"))
    return rows


@torch.no_grad()
def main() -> int:
    """Run the whole example; returns the exit status."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run eagerly and be timed
    say(f"loading MiniLM-L6 (22.7 M weights); torch {torch.__version__}, {torch.get_num_threads()} threads")
    inputs = batches(SENTENCES, BATCH)
    source = float32()
    original = embed(source, inputs)
    answers = {"float32": nearest(source, SENTENCES, QUERIES)}
    wrong: list[str] = []
    times: list[tuple[str, ...]] = []

    for name, build in QUANTIZED.items():
        torch._dynamo.reset()  # what was compiled for the other model counts towards Dynamo's limit
        say()
        spoiled = name == "fp8" and onednn_spoils_float8()
        use_onednn(not spoiled)
        if spoiled:
            say("fp8: oneDNN is off; eager PyTorch and plain Inductor are hundreds of times slower with it on this CPU")
        say(f"{name}: quantizing the 36 linears of the encoder")
        model = build()
        say(f"{name}: what fx_quant makes of it")
        report = fx_quant.explain(model, *inputs[0])
        print(f"\n{report}\n")
        if report.misses or len(report.sites) != 36:
            wrong.append(f"{name}: 36 matmuls must be rewritten, got {report.summary()}")

        say(f"{name}: embedding {len(SENTENCES)} sentences in batches of {BATCH}")
        ways: dict[str, Callable[..., Tensor]] = {"eager": model}
        embeddings = {"eager": embed(model, inputs)}
        for backend in ("inductor", "fx_quant"):
            ways[backend], embeddings[backend] = compile_and_embed(model, backend, inputs)
        wrong += fidelity(name, model, embeddings, original, inputs)
        answers[name] = nearest(ways["fx_quant"], SENTENCES, QUERIES)
        say(f"{name}: timing (another graph is compiled for batch 1)")
        times += timings(name, ways)

    print("\nNearest sentence to each query, and whether it stays the same once quantized and compiled:")
    for i, query in enumerate(QUERIES):
        same = ", ".join(
            f"{name} {'same' if answers[name][i] == answers['float32'][i] else answers[name][i]}" for name in QUANTIZED
        )
        print(f"  {query!r}: {answers['float32'][i]!r} ({same})")

    headers = ("model", "batch x tokens", "eager ms", "inductor ms", "fx_quant ms", "fx_quant / inductor")
    print(f"\n{tabulate(times, headers=headers, tablefmt='simple', disable_numparse=True)}\n")
    for line in wrong:
        print(f"WRONG: {line}")
    say("done" if not wrong else "failed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
