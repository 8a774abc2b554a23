"""The figures of consolidation (PAPER 1.4), each a function from rows to a matplotlib Figure.

As in `tasks.report.figures`, colours never stand alone: markers and line styles differ as well. Panels of one figure
share their scale, so that models compare by eye.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tasks.pretraining.loss_intervals import BUCKETS
from tasks.pretraining.rows import (
    TO_FUNCTION,
    BucketLoss,
    CheckpointDegreeBin,
    GraphRow,
    LearnedRow,
    TrainingPoint,
)
from tasks.report.style import (
    CONTENT,
    FUNCTION,
    GREEN,
    INK,
    LAYER_LINES,
    LAYER_MARKERS,
    banded,
    colour_of,
    log_axes,
    new_figure,
    panels_of,
    shade_of,
    single,
    step_axis,
    styled,
)
from tasks.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def training_loss(points: Sequence[TrainingPoint], models: Sequence[str]) -> Figure:
    """Training loss against tokens shown, one line a series."""
    figure, axes = single()
    log_axes(axes, x=True)
    for index, model in enumerate(models):
        rows = [point for point in points if point.model == model]
        axes.plot(
            [row.tokens for row in rows],
            [row.loss for row in rows],
            color=colour_of(index),
            linestyle=LAYER_LINES[index % len(LAYER_LINES)],
            label=visible(model),
        )
    axes.set(xlabel="tokens shown", ylabel="training loss (nats)")
    axes.legend(loc="upper right")
    return figure


@styled
def bucket_losses(rows: Sequence[BucketLoss], models: Sequence[str]) -> Figure:
    """Mean loss of the four token groups against step, a panel a series, with 95 % bands.

    Colour tells the next token's kind; line and marker the current one's.
    """
    figure, panels = panels_of(len(models))
    for axes, model in zip(panels, models, strict=True):
        step_axis(axes, [row.step for row in rows])
        for bucket in BUCKETS:
            mine = [row for row in rows if row.model == model and row.bucket == bucket]
            colour = FUNCTION if bucket in TO_FUNCTION else CONTENT
            from_function = bucket.startswith("function")
            banded(
                axes,
                [row.step for row in mine],
                [_drawn(row.low) for row in mine],
                [row.mean_loss for row in mine],
                [_drawn(row.high) for row in mine],
                color=colour,
                linestyle="-" if from_function else "--",
                marker="o" if from_function else "^",
                markerfacecolor=colour if from_function else "none",
                label=bucket,
            )
        axes.set_title(visible(model), loc="left")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("mean loss (nats a prediction)", fontsize=10)
    return figure


@styled
def learned_features(rows: Sequence[LearnedRow], models: Sequence[str]) -> Figure:
    """Learned features against step, and the SAEs' quality in small panels beside them; one line a series."""
    figure = new_figure(10.4, 4.8)
    panels: dict[str, Axes] = figure.subplot_mosaic(
        [["learned", "variance"], ["learned", "l0"], ["learned", "recovered"]],
        width_ratios=[1.7, 1],
        sharex=True,
    )
    drawn: tuple[tuple[str, str, Callable[[LearnedRow], float | None]], ...] = (
        ("learned", "learned features", lambda row: row.learned),
        ("variance", "explained variance", lambda row: row.explained_variance),
        ("l0", "L0", lambda row: row.l0),
        ("recovered", "CE recovered", lambda row: row.recovered),
    )
    for key, title, value in drawn:
        axes = panels[key]
        step_axis(axes, [row.step for row in rows])
        for index, model in enumerate(models):
            known = [(row.step, y) for row in rows if row.model == model and (y := value(row)) is not None]
            _series_line(axes, known, index, model)
        # Whole scales: a tenth of explained variance must not look like a collapse.
        low, high = axes.dataLim.intervaly
        axes.set_ylim(1.1 * min(0.0, low), 1.1 * max(1.0, high))
        axes.set_title(title, loc="left")
    panels["learned"].legend(loc="lower right")
    figure.supxlabel("optimizer step", fontsize=10)
    return figure


@styled
def degree_by_checkpoint(bins: Sequence[CheckpointDegreeBin], models: Sequence[str]) -> Figure:
    """Degree against frequency rank, both logarithmic: a panel a series, a line a checkpoint.

    Lines are medians of neighbouring ranks; bands their 5th to 95th percentile.
    """
    figure, panels = panels_of(len(models))
    for axes, model in zip(panels, models, strict=True):
        log_axes(axes, x=True, y=True)
        steps = sorted({row.step for row in bins if row.model == model})
        for index, step in enumerate(steps):
            rows = [row for row in bins if row.model == model and row.step == step]
            banded(
                axes,
                [row.rank for row in rows],
                [row.low for row in rows],
                [row.median for row in rows],
                [row.high for row in rows],
                color=shade_of(index, len(steps)),
                alpha=0.12,
                marker=LAYER_MARKERS[index % len(LAYER_MARKERS)],
                markersize=3.5,
                linewidth=1,
                label=f"step {step:,}",
            )
        axes.set_title(visible(model), loc="left")
        axes.legend(loc="upper right", ncols=1 + len(steps) // 9)
    figure.supxlabel("frequency rank", fontsize=10)
    figure.supylabel("degree (distinct features)", fontsize=10)
    return figure


@styled
def coverage_by_checkpoint(rows: Sequence[GraphRow], models: Sequence[str]) -> Figure:
    """Activated features that function tokens, content tokens and the ten top tokens reach, a panel a series."""
    from matplotlib.ticker import PercentFormatter

    figure, panels = panels_of(len(models))
    drawn: tuple[tuple[str, str, str, str, Callable[[GraphRow], float]], ...] = (
        ("function tokens", FUNCTION, "o", "-", lambda row: row.function),
        ("content tokens", CONTENT, "^", "--", lambda row: row.content),
        ("ten most frequent tokens", GREEN, "s", "-.", lambda row: row.top10),
    )
    for axes, model in zip(panels, models, strict=True):
        step_axis(axes, [row.step for row in rows])
        mine = [row for row in rows if row.model == model]
        for name, colour, marker, line, value in drawn:
            axes.plot(
                [row.step for row in mine],
                [value(row) for row in mine],
                color=colour,
                marker=marker,
                linestyle=line,
                label=name,
            )
        axes.axhline(0.5, color=INK, linewidth=0.8, alpha=0.5)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(visible(model), loc="left")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("activated features reached", fontsize=10)
    return figure


def _series_line(axes: Axes, known: Sequence[tuple[int, float]], index: int, model: str) -> None:
    axes.plot(
        [step for step, _ in known],
        [value for _, value in known],
        color=colour_of(index),
        marker=LAYER_MARKERS[index % len(LAYER_MARKERS)],
        linestyle=LAYER_LINES[index % len(LAYER_LINES)],
        label=visible(model),
    )


def _drawn(end: float | None) -> float:
    return math.nan if end is None else end
