"""Pages as HTML: every panel by one template that escapes all that comes from a run.

A page is drawn in one of two ways: to be read in the explorer, where charts are alive and panels lead to their SQL, or
to be kept (`is_saved`), as one file with its styles and images inside, without script and without a link that leads
nowhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from functok.explorer import grids
from functok.explorer.grids import Address
from tasks.explore.vocabulary import Columns, Figure, Grid, Page, Panel, Query, Shade, address

HERE = Path(__file__).parent
STATIC = HERE / "static"

STEPS = 10
"""Shades and bars have classes, as no style of a page's own is allowed: so many steps of a shade."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around every page.

    Attributes:
        root: The run's root, as people write it.
        menu: (title, address, whether it is this one) of the pages in the menu.
        generation: Name of the tables that are shown.
        theme: `light`, `dark`, or empty: as the system has it.
        is_saved: Whether the page is to be kept.
    """

    root: str
    menu: Sequence[tuple[str, str, bool]] = ()
    generation: str = ""
    theme: str = ""
    is_saved: bool = False


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A panel as the template takes it.

    Attributes:
        kind: Name of its class.
        panel: Itself.
        number: Of figures: its place among them, from 0.
        grid: Of grids: its rows.
        panels: Of columns: those in it.
        sql: The query behind it, where there is one.
        image: Of figures of a page that is kept: the picture.
        spec: Of other figures: what Vega draws.
    """

    kind: str
    panel: Any
    number: int = 0
    grid: grids.ShownGrid | None = None
    panels: Sequence[Drawn] = field(default_factory=list)
    sql: Query | None = None
    image: Any = None
    spec: Mapping[str, Any] | None = None


def drawn(connection: Any, panels: Sequence[Panel], at: Address, *, is_saved: bool) -> list[Drawn]:
    """Panels with what has to be asked or drawn for them."""
    from tasks.report import charts, page

    numbers = iter(range(1_000))

    def one(panel: Any) -> Drawn:
        kind, sql = type(panel).__name__, getattr(panel, "query", None)
        if isinstance(panel, Columns):
            return Drawn(kind=kind, panel=panel, panels=[one(inner) for inner in panel.panels])
        if isinstance(panel, Grid):
            grid = grids.shown(connection, panel, at)
            return Drawn(kind=kind, panel=panel, grid=grid, sql=grid.sql)
        if isinstance(panel, Figure):
            number = next(numbers)
            if is_saved:
                return Drawn(kind=kind, panel=panel, number=number, sql=sql, image=page.image(panel.chart))
            spec = charts.vega_lite(panel.chart.spec)
            return Drawn(kind=kind, panel=panel, number=number, sql=sql, spec=spec)
        return Drawn(kind=kind, panel=panel, sql=sql)

    return [one(panel) for panel in panels]


def figures(panels: Sequence[Any]) -> Iterator[Figure]:
    """The figures of a page in order, those in columns too."""
    for panel in panels:
        if isinstance(panel, Figure):
            yield panel
        elif isinstance(panel, Columns):
            yield from figures(panel.panels)


def all_grids(panels: Sequence[Any]) -> Iterator[Grid]:
    """The grids of a page in order, those in columns too."""
    for panel in panels:
        if isinstance(panel, Grid):
            yield panel
        elif isinstance(panel, Columns):
            yield from all_grids(panel.panels)


def html(template: str, frame: Frame, at: Address, **values: Any) -> str:
    """A page by a template's name."""
    return _templates().get_template(template).render(frame=frame, at=at, **values)


def page_html(connection: Any, page: Page, frame: Frame, at: Address) -> str:
    """A page."""
    panels = drawn(connection, page.panels, at, is_saved=frame.is_saved)
    has_charts = next(figures(page.panels), None) is not None
    return html("page.html.j2", frame, at, page=page, panels=panels, has_charts=has_charts)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"as_json": _as_json, "shade": _shade, "sql_address": sql_address}
    environment.globals |= {"styles": styles, "static": static, "differing": _differing}
    return environment


def styles() -> str:
    """The one stylesheet."""
    return (STATIC / "explorer.css").read_text(encoding="utf-8")


@cache
def static(name: str) -> str:
    """The address of a file of ours, another one when the file is another one: browsers keep it."""
    if name == "vega.js":
        return f"/static/{name}?v={version('vl-convert-python')}"
    return f"/static/{name}?v={hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:8]}"


def sql_address(query: Query) -> str:
    """Where the console opens a query."""
    return address("sql", q=query.text)


def _as_json(value: Any) -> Any:
    """JSON that stays inside a script element, whatever texts are in it."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704


def _step(strength: float) -> int:
    """A strength of 0 … 1 in steps; what is above 0 is at least one."""
    if not strength > 0:
        return 0
    return max(1, min(STEPS, round(STEPS * strength)))


def _shade(token: Shade) -> str:
    """The classes of a token."""
    step = _step(token.strength)
    names = [f"{token.kind} s{step}"] if step else []
    return " ".join([*names, *(["marked"] if token.mark else [])])


def _differing(text: str, other: str) -> list[tuple[str, bool]]:
    """A text's runs of words, and whether the other text has them too, in the same order."""
    words, others = (re.findall(r"\s*\S+|\s+", one) for one in (text, other))
    runs: list[tuple[str, bool]] = []
    for kind, start, end, _, _ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        if end > start:
            runs.append(("".join(words[start:end]), kind == "equal"))
    return runs
