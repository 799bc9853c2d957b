"""Decoders of ``transformers`` that generate: in pieces the tokens of the eager quantized model, and nothing compiled twice."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decoders import decoder, generate, inductor, ours, prompts, quantized, watched


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def graphs_and_tokens(model, compiler, cache, given):
    """How many graphs there are after each prompt, the tokens, and the reports."""
    forward, counts, tokens = model.forward, [], []
    try:
        with watched(eager=True) as seen:
            model.forward = torch.compile(forward, backend=seen.counting(compiler), dynamic=True)
            for ids in given:
                tokens.append(generate(model, ids, cache))
                counts.append(seen.graphs)
    finally:
        model.forward = forward
    return counts, tokens, seen.reports


@pytest.mark.parametrize(
    ("name", "layers", "by", "batches"),
    [
        ("qwen3", 1, "fx_quant", (2, 4, 3)),  # a Llama is in test_piecewise, all and Gemma's in benchmarks/decoders.py
        ("gpt2", 2, "torchao", (2, 4, 3)),
    ],
)
def test_a_decoder_in_pieces_with_a_static_cache(name, layers, by, batches):
    """What two prompts compiled serves a third."""
    model = quantized(decoder(name, layers), by)
    given = [prompts(model, batch) for batch in batches]
    expected = [generate(model, ids, "static") for ids in given]
    counts, tokens, reports = graphs_and_tokens(model, ours(piecewise=True), "static", given)
    for found, wanted in zip(tokens, expected, strict=True):
        assert torch.equal(found, wanted)
    assert counts[1:] == counts[1:2] * len(counts[1:])
    assert {report.whole for report in reports} == {""}
    assert all(sum(row.count for row in report.pieces) == layers + 1 for report in reports)


def test_a_dynamic_cache_compiles_no_more_than_plain_inductor():
    model = quantized(decoder("gpt2", layers=1), "fx_quant")
    given = [prompts(model, batch) for batch in (2, 3)]
    counts, tokens, _ = graphs_and_tokens(model, ours(piecewise=True), "dynamic", given)
    torch._dynamo.reset()
    plain, expected, _ = graphs_and_tokens(model, inductor, "dynamic", given)
    for found, wanted in zip(tokens, expected, strict=True):
        assert torch.equal(found, wanted)
    assert all(mine <= theirs for mine, theirs in zip(counts, plain, strict=True))
