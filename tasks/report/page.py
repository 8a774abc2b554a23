"""The report's page: sections set by one template that escapes everything; no script, nothing outside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.report import charts
from tasks.report.vocabulary import Chart, Section

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A drawn chart: its SVG as a data URI, its size in CSS pixels, and its texts."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str


def image(chart: Chart) -> Image:
    """The chart as the page shows it, the same bytes for the same spec."""
    svg = charts.svg(chart.spec)
    size = re.search(r'<svg[^>]* width="([\d.]+)" height="([\d.]+)"', svg)
    assert size is not None, "Vega writes the size of every image"
    return Image(
        uri="data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii"),
        width=round(float(size[1])),
        height=round(float(size[2])),
        alt=chart.alt,
        caption=chart.caption,
    )


def render(
    title: str, facts: Sequence[tuple[str, str]], sections: Sequence[tuple[Section, Sequence[Image]]]
) -> str:
    """The page as HTML, of sections and their images: no script, no reference to anything outside it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(title=title, facts=facts, sections=sections)
