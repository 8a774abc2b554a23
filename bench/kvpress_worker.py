"""The other side of `bench.retention_peer`: kvpress in its own environment, asked by a line of JSON, answering by one.

It imports nothing of functok. Arguments: a folder with a model, and how many threads.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging


def answer(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Read a prompt, compress, and read the rest on top.

    Args:
        model: The model.
        asked: `press` (class), `options` of it, ids of the `prompt` and the `rest`, and whether `kept` is told.

    Returns:
        `seconds` of prompt and compression, `rest_seconds`, `losses` of rest[1:], `bytes` after compression, and
        `kept`: of each layer and head the positions.
    """
    press = getattr(kvpress, asked["press"])(**asked["options"])
    kept: list[list[list[int]]] = []
    if asked["kept"]:
        score = press.score

        def recorded(module: Any, hidden: Any, keys: Any, *others: Any) -> torch.Tensor:
            # As `ScorerPress.compress` chooses, from the same numbers.
            scores: torch.Tensor = score(module, hidden, keys, *others)
            n = kvpress.utils.compute_n_kept(keys.shape[2], press.compression_ratio)
            kept.append(scores.topk(n, dim=-1).indices[0].sort(dim=-1).values.tolist())
            return scores

        press.score = recorded
    prompt, rest = (torch.tensor([asked[name]]) for name in ("prompt", "rest"))
    cache, n = DynamicCache(), prompt.shape[1]
    with torch.inference_mode():
        started = time.perf_counter()
        with press(model):
            model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        compressed = time.perf_counter()
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        positions = torch.arange(n, n + rest.shape[1])[None]
        resumed = time.perf_counter()
        logits = model(input_ids=rest, past_key_values=cache, position_ids=positions).logits.float()
        ended = time.perf_counter()
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], rest[0, 1:], reduction="none")
    return {
        "seconds": compressed - started,
        "rest_seconds": ended - resumed,
        "losses": losses.tolist(),
        "bytes": size,
        "kept": kept,
    }


def main() -> None:
    """Load the model, say so, and answer until the other side closes."""
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(json.dumps({name: version(name) for name in ("kvpress", "transformers", "torch")}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
