"""The slow, obvious way to every table: one window at a time, plain hooks, `sae.encode`, Python sets and dicts."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import comb
from pathlib import Path
from typing import Any

import torch


def tokenize(folder: Path, documents: list[str]) -> tuple[list[list[int]], set[int]]:
    """Ids of every document, whole and without special tokens added; the special ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    return ids, set(tokenizer.all_special_ids)


def tokens_table(ids: list[list[int]], special: set[int], share: float) -> dict[int, dict[str, Any]]:
    """token_id to count, doc_count, rank and is_function."""
    count: Counter[int] = Counter()
    doc_count: Counter[int] = Counter()
    for document in ids:
        kept = [token for token in document if token not in special]
        count.update(kept)
        doc_count.update(set(kept))
    total, cumulative, reached = sum(count.values()), 0, False
    rows = {}
    for rank, (token, n) in enumerate(sorted(count.items(), key=lambda item: (-item[1], item[0])), start=1):
        rows[token] = {"count": n, "doc_count": doc_count[token], "rank": rank, "is_function": not reached}
        cumulative += n
        reached = reached or cumulative / total >= share
    return rows


def activations(
    model_folder: Path,
    saes: dict[int, Any],
    ids: list[list[int]],
    special: set[int],
    context_size: int,
    prepend_bos: bool,
) -> dict[tuple[int, int, int, int, int], float]:
    """(layer, doc_id, position, token_id, feature_id) to activation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    bos = AutoTokenizer.from_pretrained(model_folder).bos_token_id
    blocks = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer in saes:
        blocks[layer].register_forward_hook(keep(layer))
    found = {}
    step = context_size - int(prepend_bos)
    for doc_id, document in enumerate(ids):
        for start in range(0, len(document), step):
            window = document[start : start + step]
            fed = [bos, *window] if prepend_bos else window
            with torch.no_grad():
                model(torch.tensor([fed]))
                for layer, sae in saes.items():
                    encoded = sae.encode(seen[layer])[0][int(prepend_bos) :]
                    for offset, token in enumerate(window):
                        if token in special:
                            continue
                        for feature in encoded[offset].nonzero().flatten().tolist():
                            found[layer, doc_id, start + offset, token, feature] = float(
                                encoded[offset, feature]
                            )
    return found


def edges(
    activated: dict[tuple[int, int, int, int, int], float],
) -> dict[tuple[int, int, int], tuple[int, float, float]]:
    """(layer, token_id, feature_id) to (n, max, sum)."""
    values = defaultdict(list)
    for (layer, _, _, token, feature), value in activated.items():
        values[layer, token, feature].append(value)
    return {edge: (len(group), max(group), sum(group)) for edge, group in values.items()}


def coverage(
    edge_keys: set[tuple[int, int, int]], ranked_tokens: list[int], layer: int
) -> list[tuple[int, int, int]]:
    """(token_id, new_features, cumulative_features) by rank."""
    reached: set[int] = set()
    rows = []
    for token in ranked_tokens:
        mine = {feature for at, of, feature in edge_keys if at == layer and of == token}
        rows.append((token, len(mine - reached), len(mine | reached)))
        reached |= mine
    return rows


def rarefied_degree(counts: list[int], total: int, m: int) -> float | None:
    """Expected number of features among m of `total` occurrences (hypergeometric)."""
    if total < m:
        return None
    return float(sum(1 - comb(total - n, m) / comb(total, m) for n in counts))
