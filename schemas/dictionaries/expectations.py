"""What must hold of the dictionaries, one a layer.

Views of the suite `dictionaries`: `dictionaries` (with the gate's figures) and `wanted` (the configured layers).
"""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows

DICTIONARIES: tuple[Expectation, ...] = (
    Keys(
        name="one dictionary a layer",
        table="dictionaries",
        meaning="No layer has two dictionaries.",
        columns=("layer",),
    ),
    Query(
        name="every layer has its dictionary",
        table="dictionaries",
        needs=("wanted",),
        meaning="The configured layers are the layers that have dictionaries.",
        offenders="""SELECT layer, d.key AS dictionary FROM wanted FULL JOIN dictionaries AS d USING (layer)
            WHERE wanted.source IS NULL OR d.layer IS NULL""",
    ),
    Rows(
        name="dictionaries are whole",
        table="dictionaries",
        meaning="A dictionary has latents, and its folder is committed.",
        must="d_sae > 0 AND committed",
        show="layer, folder, d_sae, committed",
    ),
    Rows(
        name="figures are possible",
        table="dictionaries",
        meaning="Explained variance ≤ 1, 0 < L0 ≤ latents, 0 ≤ alive share ≤ 1, held-out tokens > 0.",
        must="""NOT trained OR (explained_variance <= 1 AND isfinite(explained_variance_all) AND l0 > 0
            AND l0 <= d_sae AND alive_share BETWEEN 0 AND 1 AND heldout_tokens > 0)""",
        show="layer, folder, d_sae, explained_variance, explained_variance_all, l0, alive_share, heldout_tokens",
    ),
    Rows(
        name="trained dictionaries pass their gate",
        table="dictionaries",
        meaning="A dictionary trained here reaches what its gate asks, on held-out tokens.",
        must="""NOT trained OR (explained_variance >= min_explained_variance
            AND abs(l0 / k - 1) <= max_l0_deviation AND alive_share >= min_alive_share)""",
        show="""layer, folder, explained_variance, min_explained_variance, l0, k, max_l0_deviation,
            alive_share, min_alive_share""",
    ),
)
