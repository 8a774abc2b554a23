"""What the report asks of the tables of reactivation and steering (PAPER 1.3): their rows, and heat maps.

Which cases are drawn follows a rule, so that nobody picks: the layer at which the prompts have most own features; of
its relations, those with most cases first; of each, the case in the middle of the cases ranked by the share of own
features that are active again at later function tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tasks.report.queries import tables_of
from tasks.report.vocabulary import Estimate
from tasks.steering.intervals import EFFECTS, SCORES
from tasks.steering.values import (
    EffectRow,
    HeatMap,
    HeatPanel,
    ScoreRow,
    SteeredText,
    TraitFeature,
    TraitLayer,
)

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


def heat_maps(connection: Any, limit: int = 4) -> list[HeatMap]:
    """Heat maps of one case a relation; see `RULE`.

    Args:
        connection: Of `infra.duck.connect`.
        limit: How many at most.

    Returns:
        None, where no case has own features and a later function token.
    """
    if not tables_of(connection) >= {"reactivations", "reactivation_positions", "prompt_tokens"}:
        return []
    layer = _layer(connection)
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
        SELECT "case", relation, share FROM ranked WHERE place = (n + 1) // 2
        ORDER BY n DESC, relation LIMIT $limit
        """,
        {"layer": layer, "limit": limit},
    ).fetchall()
    return [_heat_map(connection, case, relation, share, layer) for case, relation, share in chosen]


def score_rows(connection: Any) -> list[ScoreRow]:
    """The table `reactivation_scores`, as it is sorted: by layer, `function` first, all of a kind before tokens."""
    rows = _rows(connection, "SELECT * FROM reactivation_scores ORDER BY layer, kind DESC, token NULLS FIRST")
    return [
        ScoreRow(
            layer=row["layer"],
            kind=row["kind"],
            token=row["token"],
            n_cases=row["n_cases"],
            n_positions=row["n_positions"],
            scores=_estimates(row, SCORES),
        )
        for row in rows
    ]


def trait_layers(connection: Any) -> list[TraitLayer]:
    """The table `trait_layers`."""
    return [
        TraitLayer(**row) for row in _rows(connection, "SELECT * FROM trait_layers ORDER BY trait, layer")
    ]


def trait_features(connection: Any, most: int) -> list[TraitFeature]:
    """Each trait's strongest features, `most` of them at most, at its most informative layer."""
    return [
        TraitFeature(**row)
        for row in _rows(
            connection,
            """
            SELECT f.* FROM trait_features AS f JOIN trait_layers AS l USING (trait, layer)
            WHERE l.is_most_informative AND f.place <= ? ORDER BY f.trait, f.layer, f.place
            """,
            [most],
        )
    ]


def effect_rows(connection: Any) -> list[EffectRow]:
    """The table `steering_effects`."""
    rows = _rows(
        connection,
        """
        SELECT * FROM steering_effects
        ORDER BY mode, place <> 'last function token', place, control DESC, strength
        """,
    )
    return [
        EffectRow(
            mode=row["mode"],
            place=row["place"],
            control=row["control"],
            strength=row["strength"],
            n=row["n"],
            effects=_estimates(row, EFFECTS),
            changed=row["changed"],
            relative_norm=row["relative_norm"],
        )
        for row in rows
    ]


def steered_texts(connection: Any, strength: float | None = None) -> list[SteeredText]:
    """Texts before and after: the trait's, and of random features the first draw's.

    Args:
        connection: Of `infra.duck.connect`.
        strength: At this strength; None: the trait's alone, at all strengths but 0.
    """
    rows = _rows(
        connection,
        """
        SELECT "case", prompt, target, mode, place, control, strength, baseline_text AS before,
            steered_text AS after, target_logprob_delta, kl
        FROM steering
        WHERE CASE WHEN $strength::DOUBLE IS NULL THEN control = 'trait' AND strength <> 0
            ELSE strength = $strength AND draw <= 1 END
        ORDER BY "case", prompt, target, mode, place <> 'last function token', place, control DESC, strength
        """,
        {"strength": strength},
    )
    return [SteeredText(**row) for row in rows]


def counted(connection: Any) -> dict[str, int]:
    """How many cases, traits and experiments there are; what there is no table of is 0."""
    there, found = tables_of(connection), {}
    for name, table, what in (
        ("cases", "prompt_tokens", '"case"'),
        ("traits", "trait_layers", "trait"),
        ("experiments", "steering", '("case", prompt, target)'),
    ):
        query = f"SELECT count(DISTINCT {what}) FROM {table}"
        found[name] = int(connection.execute(query).fetchone()[0]) if table in there else 0
    return found


def _rows(connection: Any, query: str, parameters: Any = None) -> list[dict[str, Any]]:
    found = connection.execute(query, parameters)
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _estimates(row: dict[str, Any], names: Sequence[str]) -> dict[str, Estimate]:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return {
        name: Estimate(
            value=number(row[name]), low=number(row[f"{name}_low"]), high=number(row[f"{name}_high"])
        )
        for name in names
    }


def _layer(connection: Any) -> int | None:
    found = connection.execute(
        """
        SELECT layer FROM (
            SELECT DISTINCT "case", prompt, layer, n_own FROM reactivation_positions WHERE is_function AND n_own > 0
        )
        GROUP BY layer ORDER BY sum(n_own) DESC, layer LIMIT 1
        """
    ).fetchone()
    return None if found is None else int(found[0])


def _heat_map(connection: Any, case: str, relation: str, share: float, layer: int) -> HeatMap:
    (every, *_) = connection.execute(
        'SELECT list(DISTINCT prompt ORDER BY prompt) FROM prompt_tokens WHERE "case" = ?', [case]
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
        tokens = _shown_tokens(connection, case, prompt)
        panels.append(
            HeatPanel(
                prompt=prompt,
                tokens=tuple(token for _, token, _, _ in tokens),
                is_function=tuple(is_function for *_, is_function, _ in tokens),
                in_place=tuple(in_place for *_, in_place in tokens),
                values=tuple(
                    tuple(
                        active.get((prompt, feature, position), 0.0) / largest[feature]
                        for position, *_ in tokens
                    )
                    for feature, _ in shown
                ),
            )
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
