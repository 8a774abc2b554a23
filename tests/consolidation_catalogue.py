"""Published consolidation tables with known answers, for the report's tests.

Mean losses are given by model, token group and step; documents differ from them by an effect of their own,
which all checkpoints share, and by noise, which they do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import report_catalogue

from infra.catalog import Catalog, read_catalog, write_catalog
from infra.storage import Storage
from schemas.tables import TABLES

BUCKETS = ("function→function", "function→content", "content→function", "content→content")
STEPS = (1, 4, 16, 64, 256)
DOCUMENTS = 40
HOSTILE_PROMPT = "<img src=x onerror=alert(1)> The capital of"
HOSTILE_TEXT = (
    "</code><script>document.title='pwned'</script>\n\n  of\u202e the\ttown {{ 7*7 }}" + " and so on" * 60
)

Curves = Mapping[str, Sequence[float]]

# by group: at STEPS; the paper's order at the end, →function half-way before step 4, →content after it
SMALL: Curves = {
    "function→function": (8.0, 5.0, 3.5, 3.2, 3.0),
    "content→function": (8.0, 4.5, 3.0, 2.7, 2.5),
    "function→content": (8.0, 7.8, 7.0, 5.8, 5.0),
    "content→content": (8.1, 7.7, 6.6, 5.2, 4.4),
}
LARGE: Curves = {
    "function→function": (8.0, 5.0, 3.4, 3.1, 2.9),
    "content→function": (8.0, 4.5, 2.9, 2.6, 2.4),
    "function→content": (8.0, 7.8, 6.9, 5.4, 4.4),
    "content→content": (8.1, 7.7, 6.5, 4.9, 4.0),
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """What to publish.

    Attributes:
        curves: Mean losses by model and group, one a step.
        steps: Steps by model; `STEPS` for one that is not named.
        parameters: By model.
        tokens_a_step: By model; 0 where tokens are not known.
        noise: Standard deviation of a document's mean loss that checkpoints and groups do not share.
        documents: Held-out documents.
        learned: Rows (model, step, learned features, explained variance, cross-entropy recovered, loss with
            zeros); None: no such table.
        coverage: Rows (model, step, by function tokens).
        trained: Models with training losses.
        texts: Whether there are generations.
    """

    curves: Mapping[str, Curves] = field(default_factory=lambda: {"small": SMALL, "large": LARGE})
    steps: Mapping[str, Sequence[int]] = field(default_factory=dict)
    parameters: Mapping[str, int | None] = field(default_factory=lambda: {"small": 1000, "large": 9000})
    tokens_a_step: Mapping[str, int] = field(default_factory=dict)
    noise: float = 0.0
    documents: int = DOCUMENTS
    learned: Sequence[tuple[str, int, int, float, float, float]] | None = (
        ("small", 1, 20, 0.80, 3.0, 8.01),
        ("small", 256, 700, 0.75, 0.95, 9.0),
        ("large", 1, 30, 0.85, -2.0, 8.02),
        ("large", 256, 900, 0.70, 0.90, 9.5),
    )
    coverage: Sequence[tuple[str, int, float]] = (
        ("small", 1, 0.60),
        ("small", 256, 0.80),
        ("large", 1, 0.55),
        ("large", 256, 0.90),
    )
    trained: Sequence[str] = ("small", "large")
    texts: bool = True


def publish(storage: Storage, made: Made | None = None, *, graph: bool = False) -> Storage:
    """Publish a corpus and consolidation tables beside it; equal arguments give equal tables."""
    made = made or Made()
    report_catalogue.publish(storage, graph=graph)
    catalog, tables = read_catalog(storage), _tables(made)
    files = {name: f"tables/{name}.parquet" for name in tables}
    for name, rows in tables.items():
        storage.write_parquet(files[name], pa.Table.from_pylist(rows, schema=TABLES[name]))
    published = Catalog(
        tables=catalog.tables | files,
        sharded=catalog.sharded,
        lineage=catalog.lineage | {"consolidation": "x"},
    )
    write_catalog(storage, published)
    return storage


def document_losses(made: Made) -> list[dict[str, object]]:
    """Rows of `document_losses`; the documents' effects sum to zero in every group."""
    rng = np.random.default_rng(3)
    n = {bucket: 5 + rng.integers(0, 20, made.documents) for bucket in BUCKETS}
    shared = rng.normal(0, 0.5, made.documents)
    rows: list[dict[str, object]] = []
    for model, curves in made.curves.items():
        for index, step in enumerate(made.steps.get(model, STEPS)):
            for bucket in curves:
                effect = shared + rng.normal(0, made.noise, made.documents)
                effect -= (effect * n[bucket]).sum() / n[bucket].sum()
                for doc in range(made.documents):
                    mean, count = curves[bucket][index] + effect[doc], int(n[bucket][doc])
                    rows.append(
                        {
                            "model": model,
                            "step": step,
                            "doc_id": 3 * doc,
                            "bucket": bucket,
                            "n": count,
                            "loss": count * mean,
                        }
                    )
    return rows


def _tables(made: Made) -> dict[str, list[dict[str, object]]]:
    steps = {model: made.steps.get(model, STEPS) for model in made.curves}
    losses = document_losses(made)
    tables: dict[str, list[dict[str, object]]] = {
        "checkpoints": [
            {
                "model": model,
                "step": step,
                "source": "trained <here>",
                "tokens": step * made.tokens_a_step.get(model, 512) or None,
                "parameters": made.parameters.get(model),
            }
            for model in made.curves
            for step in steps[model]
        ],
        "document_losses": losses,
        "loss_buckets": [
            row
            for model in sorted(made.curves)
            for step in steps[model]
            for row in _buckets(model, step, [r for r in losses if (r["model"], r["step"]) == (model, step)])
        ],
    }
    if made.trained:
        tables["training_losses"] = [
            {
                "model": model,
                "step": step,
                "tokens": step * 512,
                "loss": 3 + 5 / step**0.3 - 0.2 * (model == "large"),
                "learning_rate": 1e-3,
                "gradient_norm": 1.0,
            }
            for model in made.curves
            if model in made.trained
            for step in range(1, 257)
        ]
    if made.learned is not None:
        tables |= _growth(made)
    if made.texts:
        tables["generations"] = [
            {
                "model": model,
                "step": step,
                "prompt": prompt,
                "continuation": text + (" again" * (mode == "sampled")),
                "mode": mode,
                "seed": 0,
            }
            for model in made.curves
            for step in steps[model]
            for prompt, text in ((HOSTILE_PROMPT, HOSTILE_TEXT), ("Once upon", " a  time\n"))
            for mode in ("greedy", "sampled")
        ]
    return tables


def _buckets(model: str, step: int, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    total = sum(float(str(row["loss"])) for row in rows)
    found: list[dict[str, object]] = []
    for bucket in BUCKETS:
        mine = [row for row in rows if row["bucket"] == bucket]
        n = sum(int(str(row["n"])) for row in mine)
        loss = sum(float(str(row["loss"])) for row in mine)
        mean, share = loss / n if n else None, loss / total
        row = {"model": model, "step": step, "bucket": bucket, "n": n, "mean_loss": mean, "loss_share": share}
        if mean is not None and len({row["doc_id"] for row in mine}) > 1:
            row |= {"mean_low": mean - 0.12, "mean_high": mean + 0.12}
            row |= {"share_low": share - 0.01, "share_high": share + 0.01}
        found.append(row)
    return found


def _growth(made: Made) -> dict[str, list[dict[str, object]]]:
    assert made.learned is not None
    rng = np.random.default_rng(4)
    return {
        "learned_features": [
            {
                "model": model,
                "step": step,
                "layer": 2,
                "dictionary_size": 1024,
                "learned_features": learned,
                "l0": 16.5,
                "explained_variance": variance,
                "ce_recovered": recovered,
                "alive_features": learned + 40,
                "dense_features": 12,
                "ce": 8.0,
                "ce_sae": 8.1,
                "ce_zero": zero,
                "heldout_tokens": 5000,
                "min_density": 1e-4,
                "max_density": 0.1,
            }
            for model, step, learned, variance, recovered, zero in made.learned
        ],
        "checkpoint_graph": [
            {
                "model": model,
                "step": step,
                "layer": 2,
                "dictionary_size": 1024,
                "n_tokens": 5000,
                "n_edges": 9000,
                "mean_l0": 16.0,
                "activated_features": 1000,
                "function_features": round(1000 * function),
                "content_features": 700,
                "function_coverage": function,
                "content_coverage": 0.7,
                "top10_coverage": function / 2,
            }
            for model, step, function in made.coverage
        ],
        "checkpoint_degree": [
            {
                "model": model,
                "step": step,
                "layer": 2,
                "token_id": rank,
                "token": f" w{rank}",
                "rank": rank,
                "count": 10_000 // rank,
                "is_function": rank <= 10,
                "degree": int((200 + step) / rank**0.5 * (1 + rng.random())) if rank % 7 else 0,
                "rarefied_degree": None,
                "m": 100,
            }
            for model, step, *_ in made.learned
            for rank in range(1, 400)
        ],
    }
