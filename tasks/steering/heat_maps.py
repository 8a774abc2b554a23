"""Heat maps of reactivation in single cases (PAPER 1.3), chosen by a rule, so that nobody picks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt

from tasks.models.token_texts import visible
from tasks.report import charts
from tasks.report.queries import tables_of, value
from tasks.report.text import listed, percent, visible_text
from tasks.report.vocabulary import Chart

RULE = (
    "The layer is the one at which prompts have most own features. Cases are not chosen by their looks: of each "
    "relation, those with most cases first, the one in the middle when its cases are ranked by the share of own "
    "features that are active again at later function tokens."
)
BEFORE = 3
"""Tokens shown before the place. Before it the prompts are the same, and so is what is active."""

MOST_FEATURES = 12
"""Own features shown of each prompt: the strongest at the place."""

FIRST_TOKENS, LAST_TOKENS = 16, 24
"""Of a longer prompt, the tokens between these are left out."""

CELL, GROUND = 24, "#e9ecef"
LONGEST_LABEL = 14
LEAST_ROWS = 5
"""Height of a heat map of fewer features."""


@dataclass(frozen=True, kw_only=True)
class HeatPanel:
    """One prompt of a heat map.

    Attributes:
        prompt: The prompt.
        tokens: Its tokens from a little before the place on, which is where the prompts differ; None stands for
            tokens that are left out.
        is_function: Whether each is a function token.
        in_place: Whether each is at the place.
        values: (features, tokens) activation over the feature's largest in the case; 0 where it is not active.
    """

    prompt: str
    tokens: tuple[str | None, ...]
    is_function: tuple[bool, ...]
    in_place: tuple[bool, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The own features of two prompts of a case, over the tokens of both.

    Attributes:
        case: The case.
        relation: Its relation.
        layer: Decoder block.
        share: Share of the case's own features that are active again, over its later function tokens; None without.
        prompts: Prompts that the case has.
        panels: Its first two prompts.
        features: Feature ids, the first prompt's own before the second's, each prompt's strongest first.
        owners: For each feature, the panel whose own it is.
        own: Own features that each panel's prompt has, shown or not.
    """

    case: str
    relation: str
    layer: int
    share: float | None
    prompts: int
    panels: tuple[HeatPanel, ...]
    features: tuple[int, ...]
    owners: tuple[int, ...]
    own: tuple[int, ...]


def heat_maps(connection: Any, limit: int = 4) -> list[HeatMap]:
    """Heat maps of one case a relation, `limit` at most (see `RULE`); empty without own features to look at again."""
    if not tables_of(connection) >= {"reactivations", "reactivation_positions", "prompt_tokens"}:
        return []
    layer = value(
        connection,
        """
        SELECT layer FROM (
            SELECT DISTINCT "case", prompt, layer, n_own FROM reactivation_positions WHERE is_function AND n_own > 0
        )
        GROUP BY layer ORDER BY sum(n_own) DESC, layer LIMIT 1
        """,
    )
    if layer is None:
        return []
    chosen = connection.execute(
        """
        WITH shares AS (
            SELECT relation, "case", sum(own)::DOUBLE / sum(n_own)::DOUBLE AS share
            FROM reactivation_positions
            WHERE layer = $layer AND is_function AND n_own > 0
            GROUP BY relation, "case"
        ),
        ranked AS (
            SELECT *, row_number() OVER (PARTITION BY relation ORDER BY share, "case") AS place,
                count(*) OVER (PARTITION BY relation) AS n
            FROM shares
        )
        SELECT "case" FROM ranked WHERE place = (n + 1) // 2
        ORDER BY n DESC, relation LIMIT $limit
        """,
        {"layer": layer, "limit": limit},
    ).fetchall()
    return [heat_map_of(connection, case, layer) for (case,) in chosen]


def heat_map_of(connection: Any, case: str, layer: int) -> HeatMap:
    """The heat map of a case that there is, at a layer; without features where no prompt has one of its own there."""
    relation, every, share = connection.execute(
        """
        SELECT any_value(relation), list(DISTINCT prompt ORDER BY prompt), (
            SELECT sum(own)::DOUBLE / sum(n_own)::DOUBLE FROM reactivation_positions
            WHERE "case" = $case AND layer = $layer AND is_function AND n_own > 0
        )
        FROM prompt_tokens WHERE "case" = $case
        """,
        {"case": case, "layer": layer},
    ).fetchone()
    prompts = every[:2]
    active = {
        (prompt, feature, position): activation
        for prompt, feature, position, activation in connection.execute(
            'SELECT prompt, feature_id, position, activation FROM reactivations WHERE "case" = ? AND layer = ?',
            [case, layer],
        ).fetchall()
    }
    largest: dict[int, float] = {}
    for (_, feature, _), activation in active.items():
        largest[feature] = max(largest.get(feature, 0.0), activation)
    own = [_own_features(connection, case, prompt, layer) for prompt in prompts]
    shown = [(feature, panel) for panel, mine in enumerate(own) for feature in mine[:MOST_FEATURES]]
    panels = []
    for prompt in prompts:
        positions, tokens, is_function, in_place = zip(*_shown_tokens(connection, case, prompt), strict=True)
        values = tuple(
            tuple(active.get((prompt, feature, position), 0.0) / largest[feature] for position in positions)
            for feature, _ in shown
        )
        panels.append(
            HeatPanel(prompt=prompt, tokens=tokens, is_function=is_function, in_place=in_place, values=values)
        )
    return HeatMap(
        case=case,
        relation=relation,
        layer=layer,
        share=share,
        prompts=len(every),
        panels=tuple(panels),
        features=tuple(feature for feature, _ in shown),
        owners=tuple(panel for _, panel in shown),
        own=tuple(len(mine) for mine in own),
    )


def heat_map_chart(found: HeatMap) -> Chart:
    """The heat map, the text that stands for it, and what it is of."""
    prompts = " and ".join(f"“{visible_text(panel.prompt, 80)}”" for panel in found.panels)
    case = f"{visible_text(found.case)} ({visible_text(found.relation)})"
    again = f"{percent(found.share, 1)} of own features are active again"
    shown = [found.owners.count(panel) for panel in range(len(found.panels))]
    features = listed([f"{n} of {own}" for n, own in zip(shown, found.own, strict=True)])
    more = "" if found.prompts == len(found.panels) else f" Two of its {found.prompts} prompts are shown."
    return Chart(
        spec=heat_map(found),
        alt=f"Heat map of case {case} at layer {found.layer}: {len(found.features)} own features down, the tokens of "
        f"{prompts} across; over the case’s later function tokens, {again}.",
        caption=f"{case}, layer {found.layer}: {again} at the case’s later function tokens. Shown are {features} own "
        f"features of the prompts.{more}",
    )


def heat_map(found: HeatMap) -> charts.Spec:
    """Own features (down) over tokens (across) of a case's prompts, side by side on one colour scale.

    A colour is an activation over the feature's largest in the case, from 0 to 1; a cell where the feature is not
    active is grey. The place where the prompts differ is framed; function tokens' labels are bold.
    """
    return alt.hconcat(*(_panel(found, place) for place in range(len(found.panels))), spacing=12)


def _panel(found: HeatMap, place: int) -> alt.LayerChart:
    panel, n_rows = found.panels[place], len(found.features)
    x = alt.X("column:Q", scale=alt.Scale(domain=[0, len(panel.tokens)], nice=False), axis=None)
    bare = alt.Axis(
        labels=False,
        ticks=False,
        domain=False,
        grid=False,
        title=None if place else "own feature (prompt)",
        titlePadding=64,
    )
    y = alt.Y("row:Q", scale=alt.Scale(domain=[0, n_rows], reverse=True, nice=False), axis=bare)
    cells = charts.data(
        [
            {"column": column, "row": row, "right": column + 1, "below": row + 1, "activation": activation}
            for row, line in enumerate(panel.values)
            for column, activation in enumerate(line)
        ]
    )
    colour = alt.Color(
        "activation:Q",
        scale=alt.Scale(domain=[0, 1], scheme="viridis", reverse=True),
        legend=alt.Legend(title="activation / largest", orient="right", format=".1f"),
    )
    ends = {"x2": "right", "y2": "below"}
    layers = [
        alt.Chart(cells)
        .mark_rect(stroke="white", strokeWidth=0.4)
        .encode(x=x, y=y, color=alt.condition("datum.activation > 0", colour, alt.value(GROUND)), **ends)
    ]
    inside = [column for column, in_place in enumerate(panel.in_place) if in_place]
    if inside:
        frame = {"column": inside[0], "right": inside[-1] + 1, "row": 0, "below": n_rows}
        layers.append(
            alt.Chart(charts.data([frame]))
            .mark_rect(fillOpacity=0, stroke=charts.VERMILLION, strokeWidth=2)
            .encode(x=x, y=y, **ends)
        )
    height = CELL * max(LEAST_ROWS, n_rows)
    for weight in ("bold", "normal"):
        labels = [
            {"column": column + 0.5, "token": "…" if token is None else visible(token, LONGEST_LABEL)}
            for column, (token, is_function) in enumerate(zip(panel.tokens, panel.is_function, strict=True))
            if is_function == (weight == "bold")
        ]
        layers.append(
            alt.Chart(charts.data(labels))
            .mark_text(angle=270, align="right", fontWeight=weight)
            .encode(x=x, y=alt.value(height + 6), text="token:N")
        )
    if not place:
        named = [
            {"row": row + 0.5, "feature": f"{feature} ({owner + 1})"}
            for row, (feature, owner) in enumerate(zip(found.features, found.owners, strict=True))
        ]
        layers.append(
            alt.Chart(charts.data(named))
            .mark_text(align="right")
            .encode(x=alt.value(-6), y=y, text="feature:N")
        )
    told = visible_text(panel.prompt, max(24, 4 * len(panel.tokens)))
    title = f"{place + 1}. {told}"
    return alt.layer(*layers).properties(width=CELL * len(panel.tokens), height=height, title=title)


def _own_features(connection: Any, case: str, prompt: str, layer: int) -> list[int]:
    """The prompt's own features, the most active at the place first."""
    rows = connection.execute(
        """
        SELECT feature_id FROM reactivations
        WHERE "case" = ? AND prompt = ? AND layer = ? AND is_own AND in_place
        GROUP BY feature_id ORDER BY max(activation) DESC, feature_id
        """,
        [case, prompt, layer],
    ).fetchall()
    return [feature for (feature,) in rows]


def _shown_tokens(connection: Any, case: str, prompt: str) -> list[tuple[int, str | None, bool, bool]]:
    """Position, text, whether a function token, whether at the place; from a little before the place on."""
    rows: list[tuple[int, str | None, bool, bool]] = connection.execute(
        """
        SELECT position, token, is_function, in_place FROM prompt_tokens
        WHERE "case" = ? AND prompt = ? ORDER BY position
        """,
        [case, prompt],
    ).fetchall()
    first = next((index for index, (*_, in_place) in enumerate(rows) if in_place), 0)
    rows = rows[max(0, first - BEFORE) :]
    if len(rows) > FIRST_TOKENS + LAST_TOKENS:
        rows = [*rows[:FIRST_TOKENS], (-1, None, False, False), *rows[-LAST_TOKENS:]]
    return rows
