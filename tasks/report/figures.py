"""The paper's figures, each a function from the rows of `tasks.report.rows` to a matplotlib Figure.

`figure.savefig("x.png")` gives a file for a page or a paper; `tasks.report.style.svg_uri(figure)` gives
the report's image. Colours never stand alone: markers and line styles differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.report.rows import (
    CoveragePoint,
    DegreeBin,
    DegreeFit,
    DocumentShareBin,
    FrequencyPoint,
    RarefiedPoint,
    Spread,
)
from tasks.report.style import (
    CONTENT,
    FUNCTION,
    INK,
    LAYER_LINES,
    LAYER_MARKERS,
    banded,
    colour_of,
    cut_at,
    log_axes,
    new_figure,
    panels_of,
    single,
    styled,
)
from tasks.report.text import quoted, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def zipf(points: Sequence[FrequencyPoint]) -> Figure:
    """Count against frequency rank, both logarithmic, with the cut between function and content tokens."""
    figure, axes = single()
    log_axes(axes, x=True, y=True)
    function = [point for point in points if point.is_function]
    content = [point for point in points if not point.is_function]
    axes.plot([p.rank for p in content], [p.count for p in content], color=CONTENT, label="content tokens")
    axes.plot(
        [p.rank for p in function],
        [p.count for p in function],
        color=FUNCTION,
        marker="o",
        markersize=4,
        linestyle="none",
        label="function tokens",
    )
    cut_at(axes, max((p.rank for p in function), default=None))
    axes.set(xlabel="frequency rank", ylabel="count")
    axes.legend(loc="lower left")
    return figure


@styled
def document_coverage(bins: Sequence[DocumentShareBin], cut: int | None = None) -> Figure:
    """Share of the documents that a token is in against its rank: medians, and 5th to 95th percentile.

    Args:
        bins: Tokens of neighbouring ranks together.
        cut: Rank of the last function token, drawn as an upright line.
    """
    from matplotlib.ticker import PercentFormatter

    figure, axes = single()
    log_axes(axes, x=True)
    for is_function, colour, marker, name in (
        (True, FUNCTION, "o", "function tokens"),
        (False, CONTENT, "^", "content tokens"),
    ):
        rows = [row for row in bins if row.is_function == is_function]
        ranks = [row.rank for row in rows]
        banded(
            axes,
            ranks,
            [row.low for row in rows],
            [row.median for row in rows],
            [row.high for row in rows],
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1,
            label=name,
        )
    cut_at(axes, cut)
    axes.set(xlabel="frequency rank", ylabel="documents that hold the token", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="upper right")
    return figure


@styled
def token_spread(spreads: Sequence[Spread]) -> Figure:
    """Occurrences per document along `doc_id`, one panel a token."""
    figure = new_figure(7.6, 1.9 * len(spreads) + 0.4)
    panels = figure.subplots(len(spreads), 1, sharex=True, squeeze=False)[:, 0]
    for axes, spread in zip(panels, spreads, strict=True):
        colour = FUNCTION if spread.is_function else CONTENT
        edges = [min(index * spread.width, spread.n_documents) for index in range(len(spread.means) + 1)]
        axes.stairs(spread.means, edges, fill=True, color=colour, linewidth=0.6)
        kind = "function token" if spread.is_function else "content token"
        axes.set_title(f"{quoted(spread.token)} ({kind}, rank {spread.rank:,})", loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
    panels[-1].set_xlabel("doc_id")
    figure.supylabel("occurrences per document", fontsize=10)
    return figure


@styled
def degree_rank(bins: Sequence[DegreeBin], fits: Sequence[DegreeFit]) -> Figure:
    """Degree against frequency rank per layer, both logarithmic, with the least-squares line.

    Markers are medians of neighbouring ranks; the band is their 5th to 95th percentile.
    """
    layers = sorted({row.layer for row in bins})
    figure, panels = panels_of(len(layers))
    lines = {fit.layer: fit for fit in fits}
    for index, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
        rows = [row for row in bins if row.layer == layer]
        colour, ranks = colour_of(index), [row.rank for row in rows]
        log_axes(axes, x=True, y=True)
        banded(
            axes,
            ranks,
            [row.low for row in rows],
            [row.median for row in rows],
            [row.high for row in rows],
            color=colour,
            marker=LAYER_MARKERS[index % len(LAYER_MARKERS)],
            linestyle="none",
            label="median",
        )
        fit = lines.get(layer)
        if fit is not None and fit.line is not None:
            ends = [ranks[0], ranks[-1]]
            line = fit.line
            axes.plot(
                ends,
                [math.exp(line.intercept + line.slope * math.log(rank)) for rank in ends],
                color=INK,
                linestyle="--",
                linewidth=1.2,
                label=f"slope {signed(line.slope)}, R² {line.r2:.3f}",
            )
        axes.set_title(f"layer {layer}", loc="left")
        axes.legend(loc="upper right")
    figure.supxlabel("frequency rank", fontsize=10)
    figure.supylabel("degree (distinct features)", fontsize=10)
    return figure


@styled
def coverage_curves(points: Sequence[CoveragePoint], cut: int | None = None) -> Figure:
    """Share of the activated features reached by the most frequent tokens, one curve a layer.

    Args:
        points: The curves.
        cut: Rank of the last function token, drawn as an upright line.
    """
    from matplotlib.ticker import PercentFormatter

    figure, axes = single()
    log_axes(axes, x=True)
    layers = sorted({point.layer for point in points})
    for index, layer in enumerate(layers):
        rows = [point for point in points if point.layer == layer]
        axes.plot(
            [row.rank for row in rows],
            [row.coverage for row in rows],
            color=colour_of(index),
            linestyle=LAYER_LINES[index % len(LAYER_LINES)],
            marker=LAYER_MARKERS[index % len(LAYER_MARKERS)],
            markevery=max(1, len(rows) // 14),
            label=f"layer {layer}",
        )
    axes.axhline(0.5, color=INK, linewidth=0.8, alpha=0.5)
    cut_at(axes, cut)
    axes.set(xlabel="frequency rank", ylabel="activated features reached", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower right", ncols=1 + len(layers) // 9)
    return figure


@styled
def rarefied_degree(points: Sequence[RarefiedPoint]) -> Figure:
    """Rarefied against raw degree per layer, both logarithmic; tokens of nearly equal degree together."""
    layers = sorted({point.layer for point in points})
    figure, panels = panels_of(len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        log_axes(axes, x=True, y=True)
        for is_function, colour, marker, name in (
            (False, CONTENT, "^", "content tokens"),
            (True, FUNCTION, "o", "function tokens"),
        ):
            rows = [p for p in points if p.layer == layer and p.is_function == is_function]
            axes.plot(
                [row.degree for row in rows],
                [row.rarefied_degree for row in rows],
                color=colour,
                marker=marker,
                markerfacecolor="none" if not is_function else colour,
                linestyle="none",
                label=name,
            )
        axes.set_title(f"layer {layer}", loc="left")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.supxlabel("degree (distinct features)", fontsize=10)
    figure.supylabel("rarefied degree", fontsize=10)
    return figure
