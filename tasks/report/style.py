"""How every figure looks, and how it becomes an image of the report.

Colours are Okabe and Ito's, which colour-blind readers can tell apart and which stand out on white and on
black. An image has no date and no random id in it, so the same figure gives the same bytes, and its ink
follows the reader's light or dark scheme.
"""

from __future__ import annotations

import base64
import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

P = ParamSpec("P")

BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY = "#cc79a7", "#e69f00", "#56b4e9"
FUNCTION, CONTENT = VERMILLION, BLUE
LAYER_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
LAYER_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LAYER_LINES = ("-", "--", "-.", ":")
# No data is drawn in INK: the report's images swap it for the reader's text colour.
INK, DARK_INK = "#1b1f24", "#dfe3e8"
PANELS_IN_A_ROW = 3

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "savefig.dpi": 200,
    # Tokens such as `$x$` are text, never mathematics.
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "functok",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw a figure under `STYLE`, whatever matplotlib is set to outside."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def svg_uri(figure: Figure) -> str:
    """The figure as an SVG data URI: self-contained, and the same bytes for the same figure."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode("ascii")


def svg(figure: Figure) -> bytes:
    """The figure as SVG with a transparent ground, without metadata and document type."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser has fonts for the scripts that DejaVu lacks; only the layout is approximate.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue().decode()
    text = re.sub(r"<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    scheme = f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}</style>"
    text = text.replace(INK, "currentColor").replace("<defs>", scheme + "<defs>", 1)
    return text.encode()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def single() -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure = new_figure(7.6, 4.2)
    return figure, figure.subplots()


def panels_of(n: int) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels that share their axes."""
    columns = max(1, min(n, PANELS_IN_A_ROW))
    lines = -(-n // columns)
    width = 7.6 if columns < PANELS_IN_A_ROW else 10.4
    figure = new_figure(width, 3.5 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    every: list[Axes] = list(grid.flat)
    for unused in every[n:]:
        unused.set_visible(False)
    for lowest in every[max(0, n - columns) : n]:
        lowest.tick_params(labelbottom=True)
    return figure, every[:n]


def colour_of(index: int) -> str:
    """The colour of the layer that stands at `index`."""
    return LAYER_COLOURS[index % len(LAYER_COLOURS)]


def shade_of(index: int, n: int) -> Any:
    """The colour of the `index`-th of `n` checkpoints: later ones are lighter, all stand out on white and black."""
    import matplotlib

    return matplotlib.colormaps["plasma"](0.2 + 0.58 * index / max(1, n - 1))


def banded(
    axes: Axes,
    x: Sequence[float],
    low: Sequence[float],
    middle: Sequence[float],
    high: Sequence[float],
    *,
    color: Any,
    alpha: float = 0.22,
    **line: Any,
) -> None:
    """Draw middle values, and a band from low to high around them."""
    axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)
    axes.plot(x, middle, color=color, **line)


def step_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Make the x axis one of optimizer steps: logarithmic, with room for a step 0."""
    positive = [step for step in steps if step > 0]
    log_axes(axes, x=True)
    if positive and min(steps) == 0:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.3)
        log_labels(axes.xaxis)


def log_axes(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Make axes logarithmic, with labels such as 1, 10, 100, 1k."""
    for wanted, axis, scale in ((x, axes.xaxis, axes.set_xscale), (y, axes.yaxis, axes.set_yscale)):
        if wanted:
            scale("log")
            log_labels(axis)


def log_labels(axis: Axis) -> None:
    """Label a logarithmic axis 1, 10, 100, 1k."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(FuncFormatter(functools.partial(_minor, axis)))


def _short(value: float, _position: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _minor(axis: Axis, value: float, position: int) -> str:
    """Labels at 2 and 5 where an axis has hardly a decade to label."""
    low, high = sorted(axis.get_view_interval())
    few = high < 30 * low
    return _short(value, position) if few and f"{value:e}"[0] in "25" else ""


def cut_at(axes: Axes, rank: int | None) -> None:
    """Draw the cut between function and content tokens."""
    if rank is None:
        return
    axes.axvline(rank, color=INK, linestyle=":", linewidth=1.2)
    axes.annotate(
        f" last function token: rank {rank:,}",
        (rank, 1.0),
        xycoords=("data", "axes fraction"),
        va="bottom",
        ha="left" if rank < 10_000 else "right",
        fontsize=9,
        color=INK,
        annotation_clip=False,
    )
