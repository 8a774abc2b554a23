"""What the report asks of the consolidation tables. DuckDB aggregates; only thinned rows come back.

A run may have no SAE series, no generations and no training of its own: their tables are then missing or
empty, and the rows are none.
"""

from __future__ import annotations

import math
from typing import Any

from tasks.pretraining.loss_intervals import BUCKETS
from tasks.pretraining.rows import (
    BucketLoss,
    CheckpointDegreeBin,
    Continuation,
    GraphRow,
    LearnedRow,
    SeriesRow,
    TrainingPoint,
    TrainingRow,
)
from tasks.report.queries import DEGREE_BINS, rank_bin, tables_of

LOSS_TABLES = {"checkpoints", "loss_buckets", "document_losses"}


def has_losses(connection: Any) -> bool:
    """Whether this run has checkpoints and their losses."""
    return tables_of(connection) >= LOSS_TABLES and bool(
        connection.execute("SELECT count(*) FROM loss_buckets").fetchall()[0][0]
    )


def series_of(connection: Any) -> list[SeriesRow]:
    """The series that have losses, from the smallest model to the largest.

    Where the size of any is not known, they stand as in the table `checkpoints`.
    """
    found: dict[str, list[tuple[int, str, int | None, int | None]]] = {}
    for model, *checkpoint in connection.execute(
        "SELECT model, step, source, tokens, parameters FROM checkpoints"
    ).fetchall():
        found.setdefault(model, []).append(tuple(checkpoint))
    scored = {
        tuple(row) for row in connection.execute("SELECT DISTINCT model, step FROM loss_buckets").fetchall()
    }
    rows = []
    for model, checkpoints in found.items():
        kept = sorted((c for c in checkpoints if (model, c[0]) in scored), key=lambda c: c[0])
        if kept:
            rows.append(
                SeriesRow(
                    name=model,
                    parameters=next((c[3] for c in kept if c[3] is not None), None),
                    source=kept[-1][1],
                    steps=tuple(c[0] for c in kept),
                    tokens=tuple(c[2] for c in kept),
                )
            )
    if all(row.parameters is not None for row in rows):
        rows.sort(key=lambda row: row.parameters or 0)
    return rows


def bucket_losses(connection: Any) -> list[BucketLoss]:
    """Every group's loss at every checkpoint; groups that have a prediction."""
    rows = connection.execute(
        """
        SELECT model, step, bucket, n, mean_loss, mean_low, mean_high, loss_share, share_low, share_high
        FROM loss_buckets WHERE n > 0
        """
    ).fetchall()
    order = _order(connection)
    return sorted(
        (
            BucketLoss(
                model=model,
                step=step,
                bucket=bucket,
                n=n,
                mean_loss=mean,
                low=_finite(low),
                high=_finite(high),
                loss_share=share,
                share_low=_finite(share_low),
                share_high=_finite(share_high),
            )
            for model, step, bucket, n, mean, low, high, share, share_low, share_high in rows
        ),
        key=lambda row: (order[row.model], row.step, BUCKETS.index(row.bucket)),
    )


def last_of_each(rows: list[BucketLoss]) -> list[BucketLoss]:
    """The rows of each series' last checkpoint."""
    last: dict[str, int] = {}
    for row in rows:
        last[row.model] = max(row.step, last.get(row.model, row.step))
    return [row for row in rows if row.step == last[row.model]]


def training_points(connection: Any) -> list[TrainingPoint]:
    """Training losses by log-spaced bins of steps; the first ones have a bin of their own."""
    if "training_losses" not in tables_of(connection):
        return []
    rows = connection.execute(
        f"""
        SELECT model, CAST(quantile_disc(step, 0.5) AS BIGINT) AS step,
               CAST(quantile_disc(tokens, 0.5) AS BIGINT), quantile_cont(loss, 0.5)
        FROM training_losses WHERE tokens > 0
        GROUP BY model, {rank_bin("greatest(step, 1)")} ORDER BY model, step
        """
    ).fetchall()
    return [
        TrainingPoint(model=model, step=step, tokens=tokens, loss=loss) for model, step, tokens, loss in rows
    ]


def training_rows(connection: Any) -> list[TrainingRow]:
    """Each training in numbers.

    Epochs are tokens shown over the tokens of the documents that are not among those that losses are of, so
    that they come out too low where losses were limited to some of the held-out documents.
    """
    if "training_losses" not in tables_of(connection):
        return []
    ((seen,),) = connection.execute(
        """
        SELECT CAST(sum(n_tokens) AS BIGINT) FROM documents
        WHERE doc_id NOT IN (SELECT DISTINCT doc_id FROM document_losses)
        """
    ).fetchall()
    order = _order(connection)
    rows = connection.execute(
        """
        SELECT model, max(step), max(tokens), arg_min(loss, step),
               quantile_cont(loss, 0.5) FILTER (step > 0.99 * final)
        FROM training_losses JOIN (SELECT model, max(step) AS final FROM training_losses GROUP BY model)
        USING (model) GROUP BY model
        """
    ).fetchall()
    return [
        TrainingRow(
            model=model,
            steps=steps,
            tokens=tokens,
            epochs=tokens / seen if seen else None,
            first_loss=first,
            last_loss=last,
        )
        for model, steps, tokens, first, last in sorted(rows, key=lambda row: order[row[0]])
    ]


def learned_rows(connection: Any) -> list[LearnedRow]:
    """Every SAE, by series and step."""
    if "learned_features" not in tables_of(connection):
        return []
    names = (
        "explained_variance",
        "l0",
        "ce_recovered",
        "ce",
        "ce_zero",
        "min_density",
        "max_density",
    )
    rows = connection.execute(
        f"""
        SELECT model, step, layer, dictionary_size, learned_features, alive_features, dense_features,
               {", ".join(names)}
        FROM learned_features ORDER BY step
        """
    ).fetchall()
    return [
        LearnedRow(
            model=model,
            step=step,
            layer=layer,
            dictionary_size=size,
            learned=learned,
            alive=alive,
            dense=dense,
            **dict(zip(names, map(_finite, figures), strict=True)),
        )
        for model, step, layer, size, learned, alive, dense, *figures in _by_series(connection, rows)
    ]


def graph_rows(connection: Any) -> list[GraphRow]:
    """Every checkpoint's graph that has an activated feature, by series and step."""
    if "checkpoint_graph" not in tables_of(connection):
        return []
    rows = connection.execute(
        """
        SELECT model, step, layer, activated_features, mean_l0, function_coverage, content_coverage,
               top10_coverage
        FROM checkpoint_graph WHERE activated_features > 0 ORDER BY step
        """
    ).fetchall()
    return [
        GraphRow(
            model=model,
            step=step,
            layer=layer,
            activated=activated,
            mean_l0=_finite(l0),
            function=function,
            content=content,
            top10=top10,
        )
        for model, step, layer, activated, l0, function, content, top10 in _by_series(connection, rows)
    ]


def checkpoint_degree_bins(connection: Any) -> list[CheckpointDegreeBin]:
    """Degrees by log-spaced bins of rank, over the tokens that have an edge, of each checkpoint."""
    if "checkpoint_degree" not in tables_of(connection):
        return []
    rows = connection.execute(
        f"""
        SELECT model, step, CAST(quantile_disc(rank, 0.5) AS BIGINT) AS rank, count(*),
               quantile_cont(degree, 0.05), quantile_cont(degree, 0.5), quantile_cont(degree, 0.95)
        FROM checkpoint_degree WHERE degree > 0
        GROUP BY model, step, {rank_bin(per_e_fold=DEGREE_BINS)} ORDER BY model, step, rank
        """
    ).fetchall()
    return [
        CheckpointDegreeBin(model=model, step=step, rank=rank, n=n, low=low, median=median, high=high)
        for model, step, rank, n, low, median, high in rows
    ]


def continuations(connection: Any) -> list[Continuation]:
    """Every checkpoint's continuations, prompts as first met, then series, then steps."""
    if "generations" not in tables_of(connection):
        return []
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    for model, step, prompt, text, mode in connection.execute(
        "SELECT model, step, prompt, continuation, mode FROM generations"
    ).fetchall():
        found.setdefault((prompt, model, step), {})[mode] = text
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in found))
    order = _order(connection)
    return [
        Continuation(model=model, step=step, prompt=prompt, by_mode=by_mode)
        for (prompt, model, step), by_mode in sorted(
            found.items(),
            key=lambda item: (
                prompts.index(item[0][0]),
                order[item[0][1]],
                item[0][2],
            ),
        )
    ]


def _order(connection: Any) -> dict[str, int]:
    return {series.name: index for index, series in enumerate(series_of(connection))}


def _by_series(connection: Any, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows whose first column is the model, in the order of the series and otherwise as they were."""
    order = _order(connection)
    return sorted(rows, key=lambda row: order[row[0]])


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
