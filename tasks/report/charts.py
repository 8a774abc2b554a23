"""Charts as declarative specs (Altair, which is Vega-Lite), and how the report draws them.

A chart is layers of marks over axes (`Axis`) and a key (`Key`), made of rows as DuckDB gives them. The spec is what
there is of it: `svg` and `png` draw it here with vl-convert, which has Vega inside and needs neither browser nor
network, and a live page can show the same one. Data never becomes part of an expression, so a token can be any text.

Colours are Okabe and Ito's, which colour-blind readers can tell apart and which stand out on white and on black; they
never stand alone, for markers and lines differ as well. The same spec gives the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import altair as alt

if TYPE_CHECKING:
    from tasks.report.vocabulary import Row

Spec: TypeAlias = alt.Chart | alt.LayerChart | alt.ConcatChart | alt.HConcatChart | alt.VConcatChart
Layers: TypeAlias = alt.Chart | alt.LayerChart
Steps: TypeAlias = Sequence[int | float]

BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY = "#cc79a7", "#e69f00", "#56b4e9"
FUNCTION, CONTENT = VERMILLION, BLUE
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "wedge")
SOLID, DASHED, DASHDOT, DOTTED = (1, 0), (6, 3), (8, 3, 2, 3), (2, 2)
DASHES = (SOLID, DASHED, DASHDOT, DOTTED)
LINE = "stroke"
"""The shape of a series that has no markers, in the key."""

PLASMA = ("#6a00a8", "#8606a6", "#a01a9c", "#b52f8c", "#c9447a", "#da5a6a", "#e76f5a", "#f3874a", "#fb9f3a")
"""A part of matplotlib’s colour map of this name that stands out on white and on black, dark to light."""

# No data is drawn in INK: the report's images swap it for the reader's text colour.
INK, DARK_INK = "#1b1f24", "#dfe3e8"
FAINT = 0.14
WIDTH, HEIGHT = 620, 320
PANELS_IN_A_ROW = 3
PANEL_SIZES = {1: (WIDTH, HEIGHT), 2: (380, 270), 3: (262, 240)}
LEGEND_WIDTH, PIXELS_PER_CHARACTER = 760, 6

_DECADE = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-9"
_SHORT = (
    "datum.label === '' ? '' : datum.value >= 1e9 ? datum.value / 1e9 + 'G' : datum.value >= 1e6 ? "
    "datum.value / 1e6 + 'M' : datum.value >= 1e3 ? datum.value / 1e3 + 'k' : datum.value"
)
"""Labels such as 1, 10, 100, 1k, on the ticks that Vega labels."""

_NINE = "abs(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)) - 9) < 1e-6"
"""Ticks at 9, 90, 900, whose label would leave no room for that of the decade after it."""

CONFIG: dict[str, Any] = {
    # The page has a text for every image; labels of every mark would double it.
    "aria": False,
    "font": "sans-serif",
    "background": None,
    # A reader's sans-serif may be wider than the one that Vega measures with.
    "padding": {"left": 5, "right": 32, "top": 5, "bottom": 5},
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": INK for part in ("label", "title", "domain", "tick", "grid")},
        "gridWidth": 0.8,
        "labelFontSize": 11,
        "labelSeparation": 6,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "legend": {
        "orient": "top",
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelLimit": 0,
        "columnPadding": 30,
        "symbolOpacity": 1,
        "symbolSize": 70,
    },
    "title": {
        "color": INK,
        "fontSize": 12,
        "fontWeight": "normal",
        "anchor": "start",
        "frame": "group",
        "limit": 0,
    },
    "text": {"color": INK, "fontSize": 11},
    "rule": {"color": INK},
    "concat": {"spacing": 24},
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One of a chart's axes.

    Attributes:
        field: Of the rows.
        title: Beside it; None: no title.
        type: Of the field; what is ordinal stands at equal distances.
        scale: What Vega-Lite's scale is given.
        axis: What Vega-Lite's axis is given.
    """

    field: str
    title: str | None
    type: Literal["quantitative", "ordinal"] = "quantitative"
    scale: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axis: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def x(self) -> alt.X:
        """As the axis across."""
        return alt.X(**self._encoded(self.field))

    def y(self, of: str = "") -> alt.Y:
        """As the axis upwards, of its own or of another field."""
        return alt.Y(**self._encoded(of or self.field))

    def untitled(self) -> Axis:
        """The same without its title, where a panel beside it has one."""
        return dataclasses.replace(self, title=None)

    def _encoded(self, of: str) -> dict[str, Any]:
        return {
            "field": of,
            "type": self.type,
            "title": self.title,
            "scale": alt.Scale(**self.scale),
            "axis": alt.Axis(**self.axis),
        }


def log(field: str, title: str) -> Axis:
    """A logarithmic axis, labelled 1, 10, 100, 1k, with grid lines at whole decades."""
    grid = {"condition": {"test": _DECADE, "value": FAINT}, "value": 0}
    return Axis(
        field=field,
        title=title,
        scale={"type": "log", "nice": False, "padding": 6},
        axis={"labelExpr": f"{_NINE} ? '' : {_SHORT}", "gridOpacity": grid, "tickSize": 4},
    )


def linear(
    field: str, title: str, *, zero: bool = False, emphasised: float | None = None, **scale: Any
) -> Axis:
    """A linear axis; `zero`: it begins there; the grid line of an emphasised value is darker."""
    return Axis(
        field=field,
        title=title,
        scale={"zero": zero, **scale},
        axis={"gridOpacity": _grid(emphasised), "tickCount": 6},
    )


def share(field: str, title: str, *, top: float | None = 1.03, emphasised: float | None = None) -> Axis:
    """An axis of shares in per cent, from 0 to all, or to what there is if `top` is None."""
    scale = {"zero": True} if top is None else {"domain": [0, top], "nice": False}
    return Axis(
        field=field,
        title=title,
        scale=scale,
        axis={
            "format": "~%",
            "gridOpacity": _grid(emphasised),
            **({"tickCount": 6} if top is None else {"values": [0, 0.25, 0.5, 0.75, 1]}),
        },
    )


def ordinal(field: str, title: str) -> Axis:
    """An axis of values at equal distances."""
    return Axis(
        field=field,
        title=title,
        type="ordinal",
        scale={"type": "point", "padding": 0.3},
        axis={"labelAngle": 0, "grid": True, "gridOpacity": FAINT},
    )


def steps_axis(field: str, title: str, steps: Steps) -> Axis:
    """A logarithmic axis of optimizer steps, with room for a step 0."""
    positive = [step for step in steps if step > 0]
    if not positive or min(steps) > 0:
        return log(field, title)
    decades = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
    ticks = [0, *(10**decade for decade in decades if min(positive) <= 10**decade <= max(positive))]
    return Axis(
        field=field,
        title=title,
        scale={"type": "symlog", "constant": min(positive), "nice": False, "padding": 6},
        axis={"values": ticks, "labelExpr": _SHORT, "gridOpacity": FAINT},
    )


def _grid(emphasised: float | None) -> Any:
    if emphasised is None:
        return FAINT
    return {"condition": {"test": f"datum.value === {emphasised:g}", "value": 0.6}, "value": FAINT}


MARK = 26
"""Area of a marker, in square pixels."""


class Look(NamedTuple):
    """How a series looks: its colour, its marker, its line, and the marker's area."""

    colour: str
    shape: str
    dash: Sequence[int] = SOLID
    size: int = MARK


@dataclass(frozen=True, kw_only=True)
class Key:
    """A chart's series, and how each one looks.

    Attributes:
        field: Of the rows: the series' name.
        looks: Series' name to its look, in order.
        is_shown: Whether the chart has a legend; not where its titles say it already.
    """

    field: str
    looks: Mapping[str, Look]
    is_shown: bool = True

    @classmethod
    def cycled(cls, field: str, names: Sequence[str], *, is_shown: bool = True) -> Key:
        """A key of series that have no look of their own."""
        looks = map(Look, cycle(COLOURS), cycle(SHAPES), cycle(DASHES))
        return cls(field=field, looks=dict(zip(names, looks, strict=False)), is_shown=is_shown)

    @classmethod
    def graded(cls, field: str, names: Sequence[str]) -> Key:
        """A key of series that follow each other: later ones are lighter."""
        last = max(1, len(names) - 1)
        colours = (PLASMA[round(place / last * (len(PLASMA) - 1))] for place in range(len(names)))
        return cls(field=field, looks=dict(zip(names, map(Look, colours, cycle(SHAPES)), strict=True)))

    def only(self, names: Collection[str]) -> Key:
        """The key of those series that a chart has."""
        kept = {name: look for name, look in self.looks.items() if name in names}
        return dataclasses.replace(self, looks=kept)

    def color(self) -> alt.Color:
        """Colours by series."""
        return alt.Color(**self._encoded([look.colour for look in self.looks.values()]))

    def shape(self) -> alt.Shape:
        """Markers by series."""
        return alt.Shape(**self._encoded([look.shape for look in self.looks.values()]))

    def size(self) -> alt.SizeValue:
        """Areas of markers by series."""
        others = [
            {"test": f"datum[{json.dumps(self.field)}] === {json.dumps(name)}", "value": look.size}
            for name, look in self.looks.items()
            if look.size != MARK
        ]
        return alt.SizeValue(MARK, condition=others)

    def dash(self, *, is_told: bool) -> alt.StrokeDash:
        """Lines by series; told by the legend where no markers tell the series apart."""
        encoded = self._encoded([list(look.dash) for look in self.looks.values()])
        return alt.StrokeDash(**(encoded if is_told else encoded | {"legend": None}))

    def _encoded(self, range_: Sequence[Any]) -> dict[str, Any]:
        longest = max((len(name) for name in self.looks), default=0)
        columns = max(1, int(LEGEND_WIDTH / (PIXELS_PER_CHARACTER * longest + 28)))
        return {
            "field": self.field,
            "type": "nominal",
            "title": None,
            "scale": alt.Scale(domain=list(self.looks), range=range_),
            "legend": alt.Legend(columns=columns) if self.is_shown else None,
        }


KINDS = Key(
    field="kind",
    looks={"function tokens": Look(FUNCTION, "circle"), "content tokens": Look(CONTENT, "triangle-up")},
)
"""Function and content tokens."""


def data(rows: Sequence[Row]) -> alt.InlineData:
    """Rows as a spec's data; a number that is not defined is null."""
    return alt.InlineData(
        values=[
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            }
            for row in rows
        ]
    )


def series(
    rows: Sequence[Row],
    x: Axis,
    y: Axis,
    key: Key,
    *,
    band: tuple[str, str] | None = None,
    lines: bool = True,
    marks: int | None = 1,
    filled: bool = True,
    opacity: float = 0.2,
) -> alt.LayerChart:
    """A line a series, with markers, and a band around it.

    Args:
        rows: One a point.
        x: Axis across.
        y: Axis upwards, of the values.
        key: The series.
        band: Fields of the band's lower and upper end; None: no band.
        lines: Whether values are joined.
        marks: Every so manieth value of a series has a marker; None: none has.
        filled: Whether markers are.
        opacity: Of the bands.
    """
    base = alt.Chart().encode(x=x.x(), color=key.color())
    layers: list[alt.Chart] = []
    if band is not None:
        low, high = band
        layers.append(base.mark_area(opacity=opacity).encode(y=y.y(low), y2=alt.Y2(field=high)))
    if lines:
        layers.append(
            base.mark_line(strokeWidth=1.6).encode(y=y.y(), strokeDash=key.dash(is_told=marks is None))
        )
    if marks is not None:
        points = base.mark_point(filled=filled, size=MARK, opacity=1).encode(y=y.y(), shape=key.shape())
        if any(look.size != MARK for look in key.looks.values()):
            points = points.encode(size=key.size())
        layers.append(points.properties(data=data(_every(rows, key.field, marks))) if marks > 1 else points)
    return alt.layer(*layers, data=data(rows))


def line(rows: Sequence[Row], x: Axis, y: Axis) -> alt.Chart:
    """A dashed line in ink, such as a fit, to lay over a chart."""
    mark = alt.Chart(data(rows)).mark_line(color=INK, strokeDash=[6, 3], strokeWidth=1.2)
    return mark.encode(x=x.x(), y=y.y())


def _every(rows: Sequence[Row], series: str, n: int) -> list[Row]:
    """Every n-th row of each series."""
    seen: dict[Any, int] = {}
    kept = []
    for row in rows:
        seen[row[series]] = place = seen.get(row[series], -1) + 1
        if place % n == 0:
            kept.append(row)
    return kept


def intervals(rows: Sequence[Row], x: Axis, y: Axis, key: Key, band: tuple[str, str]) -> alt.LayerChart:
    """A marker a series beside each other at each place across, with the interval around it.

    Args:
        rows: One a point.
        x: Axis across, ordinal.
        y: Axis upwards, of the values.
        key: The series.
        band: Fields of the interval's lower and upper end.
    """
    across = dataclasses.replace(x, scale={"type": "band", "padding": 0.35})
    offset = alt.XOffset(field=key.field, type="nominal", sort=list(key.looks))
    base = alt.Chart().encode(x=across.x(), xOffset=offset, color=key.color())
    low, high = band
    return alt.layer(
        base.mark_rule(strokeWidth=1.6).encode(y=y.y(low), y2=alt.Y2(field=high)),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=y.y(), shape=key.shape()),
        data=data(rows),
    )


def area(rows: Sequence[Row], x: Axis, y: Axis, colour: str) -> alt.Chart:
    """Steps of one series, filled down to zero; a row holds from its place on to the next one's."""
    mark = alt.Chart(data(rows)).mark_area(interpolate="step-after", color=colour, opacity=1)
    return mark.encode(x=x.x(), y=y.y())


def bins(rows: Sequence[Row], low: Axis, high: str, y: Axis, colour: str) -> alt.Chart:
    """A histogram: a bar a row, from `low` to the field `high`."""
    mark = alt.Chart(data(rows)).mark_bar(color=colour, opacity=1, stroke=None)
    return mark.encode(x=low.x(), x2=alt.X2(field=high), y=y.y(), y2=alt.datum(0))


def cut_at(rank: int | None) -> list[alt.Chart]:
    """The cut between function and content tokens, to lay over a chart against rank; none without a rank."""
    if rank is None:
        return []
    at = alt.Chart(data([{"rank": rank, "label": f"last function token: rank {rank:,}"}])).encode(x="rank:Q")
    is_left = rank < 10_000
    return [
        at.mark_rule(strokeDash=[2, 2], strokeWidth=1.2),
        at.mark_text(align="left" if is_left else "right", dx=4 if is_left else -4, dy=-7).encode(
            y=alt.value(0), text="label:N"
        ),
    ]


def single(*layers: Layers) -> alt.LayerChart:
    """A chart of one panel."""
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)


def panels(
    names: Sequence[str],
    draw: Callable[[int, Axis, Axis], Layers],
    x: Axis,
    y: Axis,
) -> Spec:
    """Small multiples on one scale.

    Args:
        names: A title a panel.
        draw: A panel from its place, its x and its y axis.
        x: Axis across.
        y: Axis upwards; only the leftmost panels have its title.
    """
    columns = max(1, min(len(names), PANELS_IN_A_ROW))
    width, height = PANEL_SIZES[columns]
    drawn = [
        draw(place, x, y.untitled() if place % columns else y).properties(
            title=name, width=width, height=height
        )
        for place, name in enumerate(names)
    ]
    return alt.concat(*drawn, columns=columns).resolve_scale(x="shared", y="shared")


def stacked(drawn: Sequence[Layers], height: int = 150) -> Spec:
    """Charts below each other, on one axis across."""
    return below(*(chart.properties(width=WIDTH, height=height) for chart in drawn))


def beside(first: Layers, small: Sequence[Layers]) -> Spec:
    """A chart, and smaller ones below each other at its right, on one axis across."""
    column = below(*(chart.properties(width=300, height=85) for chart in small))
    return alt.hconcat(first.properties(width=460, height=360), column).resolve_scale(x="shared")


def below(*drawn: Spec) -> Spec:
    """Charts or panels below each other, on one axis across; sizes are theirs."""
    return alt.vconcat(*drawn).resolve_scale(x="shared")


def vega_lite(spec: Spec) -> dict[str, Any]:
    """The spec with the report's look, as Vega-Lite has it.

    It is not held against Vega-Lite's schema: that takes as long as all the rest, and the tests do it.
    """
    return {**spec.to_dict(validate=False), "config": CONFIG}


def svg(spec: Spec) -> str:
    """The chart as SVG: text is text, the ground transparent, and ink follows the reader's light or dark scheme."""
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(vega_lite(spec), allowed_base_urls=[])
    scheme = f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}</style>"
    drawn = drawn.replace(f'="{INK}"', '="currentColor"')
    # Vega numbers gradients and clips through all that it draws in a process.
    for number, name in enumerate(dict.fromkeys(re.findall(r' id="([^"]+)"', drawn))):
        drawn = drawn.replace(f' id="{name}"', f' id="own{number}"').replace(
            f'="url(#{name})"', f'="url(#own{number})"'
        )
    return re.sub(r"^<svg[^>]*>", lambda root: root.group() + scheme, drawn)


def png(spec: Spec) -> bytes:
    """The chart as PNG on white."""
    import vl_convert

    # DejaVu has the open box that stands for a space; a font that lacks it would be left for another one's serifs.
    whole = vega_lite(spec) | {"background": "white"}
    whole["config"] = whole["config"] | {"font": "DejaVu Sans, sans-serif"}
    drawn: bytes = vl_convert.vegalite_to_png(whole, scale=1.5, allowed_base_urls=[])
    return drawn


def png_uri(spec: Spec) -> str:
    """The chart as a PNG data URI."""
    return "data:image/png;base64," + base64.b64encode(png(spec)).decode("ascii")
