"""The figures of reactivation and steering (PAPER 1.3), each a function from rows to a matplotlib Figure.

As in `tasks.report.figures`, colours never stand alone: markers, line styles or words differ as well. Panels of one
figure share their scale.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.report.style import (
    BLUE,
    GREEN,
    INK,
    LAYER_MARKERS,
    ORANGE,
    PURPLE,
    STYLE,
    VERMILLION,
    banded,
    new_figure,
    styled,
)
from tasks.report.text import percent, visible, visible_text
from tasks.steering.values import EffectRow, HeatMap, HeatPanel, ScoreRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

CELL, GROUND = 0.25, "#e9ecef"
LONGEST_LABEL = 14
LEAST_ROWS = 5
"""Height of a heat map of fewer features."""

SCORE_NAMES = (
    ("own", "the prompt itself", VERMILLION),
    ("counterfactual", "counterfactual prompt, same position", BLUE),
    ("unrelated", "unrelated prompts, same token", GREEN),
)
SETTINGS = (
    ("trait", "last function token", "trait, last function token", VERMILLION, "o", "-"),
    ("trait", "all positions", "trait, all positions", ORANGE, "s", "--"),
    ("trait", "content token", "trait, content token", BLUE, "^", "-."),
    ("random", "last function token", "random, last function token", GREEN, "D", ":"),
    ("random", "all positions", "random, all positions", PURPLE, "v", ":"),
)
"""Control, place, name, colour, marker and line of each setting."""

PANELS = (
    ("target_logprob_delta", "target log-probability"),
    ("kl", "KL divergence"),
    ("log_perplexity_delta", "log perplexity"),
)


@styled
def heat_map(found: HeatMap) -> Figure:
    """Own features (down) over tokens (across) of a case's prompts, side by side on one colour scale.

    A colour is an activation over the feature's largest in the case, from 0 to 1; a cell where the feature is not
    active is grey. The place where the prompts differ is framed; function tokens' labels are bold.
    """
    import matplotlib

    widths = [len(panel.tokens) for panel in found.panels]
    figure = new_figure(
        max(6.0, 2.6 + CELL * sum(widths) + 0.3 * len(widths)),
        1.9 + CELL * max(LEAST_ROWS, len(found.features)),
    )
    grid = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad=GROUND)
    mesh: QuadMesh | None = None
    for place, (axes, panel) in enumerate(zip(grid.flat, found.panels, strict=True)):
        mesh = _cells(axes, found, panel, colours)
        told = visible_text(panel.prompt, max(24, 4 * len(panel.tokens)))
        axes.set_title(f"{place + 1}. {told}", loc="left", fontsize=9)
    first = grid.flat[0]
    first.set_yticks([row + 0.5 for row in range(len(found.features))])
    first.set_yticklabels(
        [f"{feature} ({owner + 1})" for feature, owner in zip(found.features, found.owners, strict=True)],
        fontsize=8,
    )
    first.set_ylim(len(found.features), 0)
    first.set_ylabel("own feature (prompt)")
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=list(grid.flat), pad=0.01, aspect=30)
        bar.set_label("activation / largest", fontsize=9)
        bar.outline.set_visible(False)
    return figure


@styled
def scores(rows: Sequence[ScoreRow]) -> Figure:
    """Shares of own features that are active again, by layer: a panel a kind of token, 95 % intervals by case."""
    from matplotlib.ticker import PercentFormatter

    layers = sorted({row.layer for row in rows})
    figure = new_figure(9.0, 3.9)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, kind in zip(panels, ("function", "content"), strict=True):
        mine = {row.layer: row for row in rows if row.kind == kind and row.token is None}
        for index, (score, name, colour) in enumerate(SCORE_NAMES):
            known = [(layers.index(layer), row.scores[score]) for layer, row in sorted(mine.items())]
            known = [(x, value) for x, value in known if not math.isnan(value.value)]
            axes.errorbar(
                [x + 0.18 * (index - 1) for x, _ in known],
                [value.value for _, value in known],
                yerr=[
                    [_length(value.value - value.low) for _, value in known],
                    [_length(value.high - value.value) for _, value in known],
                ],
                color=colour,
                marker=LAYER_MARKERS[index],
                linestyle="none",
                capsize=3,
                label=name,
            )
        axes.set_title(f"at later {kind} tokens", loc="left")
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.supxlabel("layer", fontsize=10)
    figure.supylabel("own features active again", fontsize=10)
    return figure


@styled
def effects(rows: Sequence[EffectRow]) -> Figure:
    """What steering does against its strength: a column a mode, a row a measure, bands of 95 % by experiment.

    Strengths stand at equal distances.
    """
    modes = sorted({row.mode for row in rows})
    strengths = sorted({row.strength for row in rows})
    figure = new_figure(5.2 * max(2, len(modes)), 8.4)
    grid = figure.subplots(len(PANELS), len(modes), sharex=True, sharey="row", squeeze=False)
    for line, (effect, label) in zip(grid, PANELS, strict=True):
        line[0].set_ylabel(label)
        for axes, mode in zip(line, modes, strict=True):
            axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
            for control, place, name, colour, marker, style in SETTINGS:
                known = [
                    (strengths.index(row.strength), row.effects[effect])
                    for row in sorted(rows, key=lambda row: row.strength)
                    if (row.mode, row.control, row.place) == (mode, control, place)
                    and not math.isnan(row.effects[effect].value)
                ]
                if known:
                    banded(
                        axes,
                        [x for x, _ in known],
                        [value.low for _, value in known],
                        [value.value for _, value in known],
                        [value.high for _, value in known],
                        color=colour,
                        alpha=0.15,
                        marker=marker,
                        linestyle=style,
                        label=name,
                    )
    for axes, mode in zip(grid[0], modes, strict=True):
        axes.set_title(f"mode: {mode}", loc="left")
    grid[0, 0].set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    drawn = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    named = [name for _, _, name, *_ in SETTINGS if name in drawn]
    figure.legend([drawn[name] for name in named], named, loc="outside upper right", ncols=3)
    figure.supxlabel("strength", fontsize=10)
    figure.supylabel("change from the unsteered model (nats)", fontsize=10)
    return figure


def heat_map_alt(found: HeatMap) -> str:
    """The text that stands for a heat map."""
    prompts = " and ".join(f"“{visible_text(panel.prompt, 80)}”" for panel in found.panels)
    return (
        f"Heat map of case {visible_text(found.case)} ({visible_text(found.relation)}) at layer {found.layer}: "
        f"{len(found.features)} own features down, the tokens of {prompts} across; over the case’s later function "
        f"tokens, {percent(found.share, 1)} of own features are active again."
    )


def png_uri(figure: Figure) -> str:
    """The figure as a PNG data URI on white, the same bytes for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _cells(axes: Axes, found: HeatMap, panel: HeatPanel, colours: Colormap) -> QuadMesh:
    import numpy as np
    from matplotlib.patches import Rectangle

    values = np.ma.masked_equal(np.array(panel.values, dtype=float).reshape(len(found.features), -1), 0.0)
    mesh = axes.pcolormesh(values, cmap=colours, vmin=0.0, vmax=1.0, edgecolors="white", linewidth=0.4)
    axes.grid(visible=False)
    axes.set_xticks([column + 0.5 for column in range(len(panel.tokens))])
    labels = axes.set_xticklabels(
        ["…" if token is None else visible(token, LONGEST_LABEL) for token in panel.tokens],
        rotation=90,
        fontsize=8,
    )
    for label, is_function in zip(labels, panel.is_function, strict=True):
        label.set_fontweight("bold" if is_function else "normal")
    inside = [column for column, in_place in enumerate(panel.in_place) if in_place]
    if inside:
        corner, size = (inside[0], 0), (inside[-1] + 1 - inside[0], len(found.features))
        frame = Rectangle(
            corner, *size, fill=False, edgecolor=VERMILLION, linewidth=2, clip_on=False, zorder=5
        )
        axes.add_patch(frame)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _length(value: float) -> float:
    """Of an error bar: NaN, which draws none, where there is no interval; 0 where rounding makes it negative."""
    return value if math.isnan(value) else max(0.0, value)
