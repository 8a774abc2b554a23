"""The report's tables of consolidation, each made from rows. A cell is text; what is not there is a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tasks.pretraining.loss_intervals import BUCKETS
from tasks.pretraining.rows import (
    BucketLoss,
    Continuation,
    Gains,
    GraphRow,
    Halfway,
    LearnedRow,
    SeriesRow,
    TrainingRow,
)
from tasks.report.old_page import Column, Table, number_column, number_columns
from tasks.report.text import integer, number, percent, plural, signed, visible, visible_text
from tasks.report.vocabulary import estimate

MOST_PROMPTS = 20
LONGEST_CAPTION = 80


def series_table(series: Sequence[SeriesRow]) -> Table:
    """The series that are compared."""
    return Table(
        caption="Checkpoint series",
        columns=[
            Column(name="series"),
            Column(name="source"),
            *number_columns("parameters", "checkpoints", "first step", "last step", "tokens at the last"),
        ],
        rows=[
            [
                visible(row.name),
                visible_text(row.source),
                integer(row.parameters),
                integer(len(row.steps)),
                integer(row.steps[0]),
                integer(row.steps[-1]),
                integer(row.tokens[-1]),
            ]
            for row in series
        ],
    )


def halfway_table(rows: Sequence[Halfway]) -> Table:
    """When each group has made half of its fall."""
    return Table(
        caption="Step by which half of the fall from the first to the last checkpoint is made",
        columns=[
            Column(name="series"),
            *number_columns(
                *(bucket.replace("→", " → ") for bucket in BUCKETS),
                "→function ahead of →content",
                "later ahead of earlier group",
            ),
        ],
        rows=[
            [
                visible(row.model),
                *(number(at) if math.isfinite(at := row.steps[bucket]) else "no fall" for bucket in BUCKETS),
                estimate(row.lead, 2),
                estimate(row.order, 2),
            ]
            for row in rows
        ],
        note="Interpolated linearly in log step between checkpoints; a step 0 stands one doubling before the next, "
        "and a group that does not fall counts as the last step. "
        "The last two columns count doublings of the step: groups pooled, and the later →function group against "
        "the earlier →content group.",
    )


def gains_table(compared: Gains) -> Table:
    """How much lower the larger model's losses are."""
    return Table(
        caption=f"Loss of {visible(compared.small.name)} minus loss of {visible(compared.large.name)}",
        columns=[Column(name="group"), *number_columns("gain in nats (95 %)", "of the loss")],
        rows=[
            [bucket, estimate(compared.by_bucket[bucket]), percent(compared.relative[bucket], 1)]
            for bucket in BUCKETS
        ],
    )


def training_table(rows: Sequence[TrainingRow], parameters: dict[str, int | None]) -> Table:
    """Each training in numbers."""
    return Table(
        caption="Trainings",
        columns=[
            Column(name="series"),
            *number_columns("parameters", "steps", "tokens shown", "epochs", "first loss", "last loss"),
        ],
        rows=[
            [
                visible(row.model),
                integer(parameters.get(row.model)),
                integer(row.steps),
                integer(row.tokens),
                "–" if row.epochs is None else f"{row.epochs:,.2f}",
                signed(row.first_loss),
                signed(row.last_loss),
            ]
            for row in rows
        ],
        note="Losses in nats; the last is the median of the last hundredth of the steps. Epochs: tokens shown over "
        "the corpus’ tokens without those of the documents that losses are of; too low where losses.max_tokens left "
        "some held-out documents out.",
    )


def last_losses_table(rows: Sequence[BucketLoss]) -> Table:
    """The four groups at each series' last checkpoint."""
    return Table(
        caption="Losses at the last checkpoint",
        columns=[
            Column(name="series"),
            number_column("step"),
            Column(name="group"),
            *number_columns("predictions", "mean loss", "95 %", "share of the loss", "95 %"),
        ],
        rows=[
            [
                visible(row.model),
                integer(row.step),
                row.bucket,
                integer(row.n),
                signed(row.mean_loss, 3),
                _interval(signed(row.low, 3), signed(row.high, 3)),
                percent(row.loss_share, 1),
                _interval(percent(row.share_low, 1), percent(row.share_high, 1)),
            ]
            for row in rows
        ],
        note="Current → next token. Intervals by bootstrap over documents.",
    )


def learned_table(rows: Sequence[LearnedRow]) -> Table:
    """Learned features and, beside them, how good each SAE is."""
    bounds = {(row.min_density, row.max_density) for row in rows}
    between = " or ".join(f"{number(low)} and {number(high)}" for low, high in sorted(bounds, key=str))
    return Table(
        caption="Learned features, and the quality of the SAEs",
        columns=[
            Column(name="series"),
            *number_columns(
                "step",
                "layer",
                "features",
                "learned",
                "alive",
                "too dense",
                "explained variance",
                "L0",
                "CE recovered",
                "CE",
                "CE with zeros",
            ),
        ],
        rows=[
            [
                visible(row.model),
                integer(row.step),
                str(row.layer),
                integer(row.dictionary_size),
                integer(row.learned),
                integer(row.alive),
                integer(row.dense),
                signed(row.explained_variance, 3),
                number(row.l0),
                signed(row.ce_recovered, 3),
                signed(row.ce, 3),
                signed(row.ce_zero, 3),
            ]
            for row in rows
        ],
        note=f"Learned: active on a share of held-out tokens between {between}. CE recovered is a ratio of two numbers "
        "near zero, and says nothing, where CE with zeros is hardly above CE.",
    )


def graphs_table(rows: Sequence[GraphRow]) -> Table:
    """What tokens reach at each checkpoint."""
    return Table(
        caption="The checkpoints’ graphs",
        columns=[
            Column(name="series"),
            *number_columns(
                "step",
                "layer",
                "activated features",
                "mean L0",
                "by function tokens",
                "by content tokens",
                "by the ten most frequent",
            ),
        ],
        rows=[
            [
                visible(row.model),
                integer(row.step),
                str(row.layer),
                integer(row.activated),
                number(row.mean_l0),
                *(percent(share, 1) for share in (row.function, row.content, row.top10)),
            ]
            for row in rows
        ],
        note="Shares of the activated features. A feature that both kinds activate counts for both.",
    )


def generation_tables(rows: Sequence[Continuation]) -> list[Table]:
    """A table a prompt: one row a checkpoint, one column a mode."""
    modes = sorted({mode for row in rows for mode in row.by_mode})
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    tables = [
        Table(
            caption=f"{index}. “{visible_text(prompt, LONGEST_CAPTION)}”",
            columns=[
                Column(name="series"),
                number_column("step"),
                *(Column(name=mode, kind="token") for mode in modes),
            ],
            rows=[
                [
                    visible(row.model),
                    integer(row.step),
                    *(_continued(row.by_mode.get(mode)) for mode in modes),
                ]
                for row in rows
                if row.prompt == prompt
            ],
            note=f"The whole prompt: {visible_text(prompt)}" if len(prompt) > LONGEST_CAPTION else "",
        )
        for index, prompt in enumerate(prompts[:MOST_PROMPTS], start=1)
    ]
    if len(prompts) > MOST_PROMPTS:
        left = plural(len(prompts) - MOST_PROMPTS, "more prompt")
        last = tables[-1]
        note = f"{last.note} {left}: in the table generations.".strip()
        tables[-1] = Table(caption=last.caption, columns=last.columns, rows=last.rows, note=note)
    return tables


def _interval(low: str, high: str) -> str:
    return low if low == high == "–" else f"{low} to {high}"


def _continued(text: str | None) -> str:
    return "(ended at once)" if text == "" else visible_text(text)
