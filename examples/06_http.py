"""A sentence encoder behind HTTP: requests of any number of sentences, none of which compiles anything.

``python examples/06_http.py`` asks the service in one process; ``uvicorn --app-dir examples --factory
06_http:service`` serves it. FastAPI is needed (``pip install fx-quant[examples]``). The encoder is compiled in
pieces, each by itself for some numbers of requests, and one warm-up call each is made before the first request. Exits
with 1 where an answer is not that of the eager model, or something was compiled for a request.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from tiny import CLOSE, Encoder, distance, int8_
from torch import Tensor
from torch._dynamo.utils import counters

import fx_quant

TOKENS = 16
SIZES = (1, 2, 4)
BURSTS = (3, 1, 4, 2, 7)


def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """``(input_ids, attention_mask)``, each ``[texts, TOKENS]``: the bytes of each; their number is dynamic."""
    rows = [list(text.encode()[:TOKENS]) or [0] for text in texts]
    ids = torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (TOKENS - len(row)) for row in rows])
    for tensor in (ids, mask):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return ids, mask


def options(sizes: Sequence[int]) -> dict[str, Any]:
    """Those of the backend: pieces for any number of sentences, and for each of ``sizes`` by itself."""
    return {"piecewise": True, "compile_sizes": list(sizes), "padding": "always"}


def service(model: Any = None, sizes: Sequence[int] = SIZES) -> Any:
    """The application: ``POST /embed {"texts": [...]}`` gives ``{"embeddings": [...]}``; warm when it returns."""
    from fastapi import Body, FastAPI  # pyrefly: ignore[missing-import]

    model = model or int8_(Encoder())
    run = torch.compile(model, backend="fx_quant", options=options(sizes))
    with torch.inference_mode():
        for size in (*sizes[::-1], 2 * sizes[-1]):
            run(*tokenize(["warm"] * size))
    app = FastAPI()

    # Not `async`: FastAPI then calls it in a thread, and the next request is read meanwhile.
    def embed(texts: list[str] = Body(embed=True)) -> dict[str, Any]:  # noqa: B008
        with torch.inference_mode():
            return {"embeddings": run(*tokenize(texts)).tolist()}

    # Annotations are strings here, which FastAPI cannot resolve in a function of a function.
    embed.__annotations__ = {"texts": list[str], "return": dict[str, Any]}
    app.post("/embed")(embed)
    return app


@torch.inference_mode()
def main(layers: int = 2, sizes: Sequence[int] = SIZES, bursts: Sequence[int] = BURSTS) -> int:
    """Serve some bursts to a client of the same process; returns the exit status."""
    from fastapi.testclient import TestClient  # pyrefly: ignore[missing-import]

    model = int8_(Encoder(layers=layers))
    print(fx_quant.explain(model, *tokenize(["one", "two", "three"]), options=options(sizes)).summary())
    client, worst = TestClient(service(model, sizes)), 0.0
    warm = counters["stats"]["unique_graphs"]
    for burst in bursts:
        texts = [f"sentence {i} of {burst}" for i in range(burst)]
        answer = client.post("/embed", json={"texts": texts})
        answer.raise_for_status()
        worst = max(worst, distance(torch.tensor(answer.json()["embeddings"]), model(*tokenize(texts))))
    more = counters["stats"]["unique_graphs"] - warm
    print(f"requests of {list(bursts)} sentences: at most {worst:.6f} from eager, {more} graphs compiled after warm-up")
    return int(more > 0 or worst > CLOSE)


if __name__ == "__main__":
    sys.exit(main())
