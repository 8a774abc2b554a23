"""What must hold of checkpoints, their losses, SAEs and texts, and of the tables made of them (PAPER 1.4).

Views of the `checkpoints` suite: `checkpoints` (in order of `place`, with whether a folder of the storage is
`committed`) and `wanted` (the configured series). Of `losses`: `shards` (one row a checkpoint and part), `wanted`,
`predictions` (what the token shards' windows say is predicted in the held-out documents of each part), `expected`
(their number by document), and of each shard `token_losses` or, where these are not kept, `document_losses`. Of
`growth`: `learned` (one row an SAE, with what is configured), `shards` and of each feature shard the views of the
suite `features`. Of `generations`: `generations`, `checkpoints` and `wanted` (the configured prompts, by mode).
"""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows, differ
from schemas.graph.expectations import FEATURES


def _every_series(table: str, what: str) -> Query:
    """The configured series are those of a view."""
    return Query(
        name=f"every series has {what}",
        table=table,
        needs=("wanted",),
        meaning=f"The configured series are the series that have {what}.",
        offenders=f"""SELECT model, w.model IS NOT NULL AS is_configured, t.model IS NOT NULL AS has_{what.lower()}
            FROM wanted AS w FULL JOIN (SELECT DISTINCT model FROM {table}) AS t USING (model)
            WHERE w.model IS NULL OR t.model IS NULL""",
    )


def _every_prediction(name: str, table: str, count: str, meaning: str) -> Query:
    """Of each held-out document, a view counts as many losses as the document has predictions."""
    return Query(
        name=name,
        table=table,
        shard=True,
        needs=("expected",),
        meaning=meaning,
        offenders=differ(
            f"SELECT part, doc, {count} AS n FROM {table} GROUP BY ALL",
            f"SELECT part, doc, n FROM expected SEMI JOIN {table} USING (part)",
            "part, doc",
            "n",
        ),
    )


CHECKPOINTS: tuple[Expectation, ...] = (
    Keys(
        name="one checkpoint a step",
        table="checkpoints",
        meaning="No series has two checkpoints at one step.",
        columns=("model", "step"),
    ),
    Query(
        name="steps ascend",
        table="checkpoints",
        meaning="In each series, checkpoints follow each other by step.",
        offenders="""SELECT * FROM (SELECT model, step, lag(step) OVER (PARTITION BY model ORDER BY place)
            AS step_before FROM checkpoints) WHERE step <= step_before""",
    ),
    _every_series("checkpoints", "checkpoints"),
    Rows(
        name="checkpoints are whole",
        table="checkpoints",
        meaning="A checkpoint in the storage is committed, and each has weights that a key names.",
        must="committed AND length(key) > 0 AND step >= 0 AND coalesce(parameters > 0, true)",
        show="model, step, source, key, committed, parameters",
    ),
    Query(
        name="tokens shown rise",
        table="checkpoints",
        meaning="A later checkpoint was shown more tokens, where that is known.",
        offenders="""SELECT * FROM (SELECT model, step, tokens, lag(tokens) OVER (PARTITION BY model ORDER BY step)
            AS tokens_before FROM checkpoints) WHERE tokens < 0 OR tokens <= tokens_before""",
    ),
)

LOSSES: tuple[Expectation, ...] = (
    Keys(
        name="one shard a checkpoint and place",
        table="shards",
        meaning="No checkpoint has two shards of losses of one part of the corpus.",
        columns=("model", "step", "doc_offset"),
    ),
    _every_series("shards", "losses"),
    Query(
        name="checkpoints read the same documents",
        table="shards",
        meaning="Losses of every checkpoint of every series are of the same held-out text.",
        offenders="""SELECT * FROM (SELECT model, step, sum(n_documents) AS n_documents, sum(n_tokens) AS n_tokens,
                sum(n_predictions) AS n_predictions, max(sum(n_documents)) OVER () AS most_documents,
                max(sum(n_tokens)) OVER () AS most_tokens, max(sum(n_predictions)) OVER () AS most_predictions
            FROM shards GROUP BY model, step)
            WHERE n_documents <> most_documents OR n_tokens <> most_tokens OR n_predictions <> most_predictions""",
    ),
    Query(
        name="predictions are all there",
        table="shards",
        needs=("expected",),
        meaning="A shard has the predictions that its windows have, as many as its manifest says.",
        offenders="""SELECT folder, model, step, source, n_predictions, found_predictions,
                coalesce(e.n, 0) AS expected_predictions
            FROM shards LEFT JOIN (SELECT part, sum(n)::BIGINT AS n FROM expected GROUP BY part) AS e USING (part)
            WHERE found_predictions IS DISTINCT FROM n_predictions
                OR found_predictions IS DISTINCT FROM coalesce(e.n, 0)""",
    ),
    Keys(
        name="loss keys are unique",
        table="token_losses",
        shard=True,
        meaning="A position of a document is predicted once.",
        columns=("doc", "position"),
    ),
    Rows(
        name="losses are possible",
        table="token_losses",
        shard=True,
        meaning="A loss is finite and at least 0.",
        must="loss >= 0 AND isfinite(loss)",
        show="folder, doc, position, token_id, loss",
    ),
    Query(
        name="losses are of held-out predictions",
        table="token_losses",
        shard=True,
        needs=("predictions",),
        meaning="Positions and both tokens of a loss are those of a held-out document, inside one window.",
        offenders="""SELECT folder, doc, position, current_token_id, token_id FROM token_losses
            ANTI JOIN predictions USING (part, doc, position, current_token_id, token_id)""",
    ),
    _every_prediction(
        "every prediction has its loss",
        "token_losses",
        "count(*)",
        "Each held-out document has as many losses as predictions.",
    ),
    Keys(
        name="sums of losses have unique keys",
        table="document_losses",
        shard=True,
        meaning="A document and kind of prediction is one row.",
        columns=("doc", "current_is_function", "next_is_function"),
    ),
    Rows(
        name="sums of losses are possible",
        table="document_losses",
        shard=True,
        meaning="A sum is at least 0, of at least one prediction.",
        must="n >= 1 AND loss_units >= 0 AND current_is_function IS NOT NULL AND next_is_function IS NOT NULL",
        show="folder, doc, current_is_function, next_is_function, n, loss_units",
    ),
    _every_prediction(
        "every prediction is in a sum",
        "document_losses",
        "sum(n)",
        "The sums of each held-out document are of as many losses as it has predictions.",
    ),
)

_OF_CORPUS = ("one shard a layer and place", "layers see the same documents", "layers have dictionaries")
"""Expectations of the suite `features` that span the layers of one model."""

GROWTH: tuple[Expectation, ...] = (
    Keys(
        name="one SAE a checkpoint",
        table="learned",
        meaning="No checkpoint has two SAEs.",
        columns=("model", "step"),
    ),
    _every_series("learned", "SAEs"),
    Rows(
        name="SAEs are whole",
        table="learned",
        meaning="An SAE is committed, and its one row is of its layer and of the configured size and bounds.",
        must="""committed AND n_rows = 1 AND layer = dictionary_layer AND dictionary_size = configured_size
            AND d_sae = dictionary_size AND min_density = configured_min AND max_density = configured_max""",
        show="""model, step, folder, committed, n_rows, layer, dictionary_layer, dictionary_size, d_sae,
            configured_size, min_density, configured_min, max_density, configured_max""",
    ),
    Rows(
        name="learned ≤ alive ≤ dictionary",
        table="learned",
        meaning="Learned and too dense features are alive ones, and alive ones are in the dictionary.",
        must="""learned_features >= 0 AND dense_features >= 0
            AND learned_features + dense_features <= alive_features AND alive_features <= dictionary_size""",
        show="model, step, learned_features, dense_features, alive_features, dictionary_size",
    ),
    Rows(
        name="figures are possible",
        table="learned",
        meaning="0 ≤ L0 ≤ alive features, explained variance ≤ 1, losses are at least 0, on some held-out tokens.",
        must="""l0 >= 0 AND l0 <= alive_features AND explained_variance <= 1 AND isfinite(explained_variance)
            AND ce >= 0 AND ce_sae >= 0 AND ce_zero >= 0 AND isfinite(ce + ce_sae + ce_zero) AND heldout_tokens > 0""",
        show="model, step, l0, alive_features, explained_variance, ce, ce_sae, ce_zero, heldout_tokens",
    ),
    Rows(
        name="recovered loss follows from the losses",
        table="learned",
        meaning="ce_recovered is (ce_zero - ce_sae) / (ce_zero - ce); null where zeros do no harm.",
        must="""coalesce(abs(ce_recovered * (ce_zero - ce) - (ce_zero - ce_sae)) <= 1e-6 * (1 + ce_zero + ce_sae),
            true)""",
        show="model, step, ce_recovered, ce, ce_sae, ce_zero",
    ),
    Query(
        name="SAEs are judged on the same tokens",
        table="learned",
        meaning="Every checkpoint's SAE is judged on as many held-out tokens.",
        offenders="""SELECT * FROM (SELECT model, step, heldout_tokens, max(heldout_tokens) OVER () AS most_tokens
            FROM learned) WHERE heldout_tokens IS DISTINCT FROM most_tokens""",
    ),
    Keys(
        name="one shard a checkpoint and place",
        table="shards",
        meaning="No part of the corpus has two shards of features of a checkpoint.",
        columns=("model", "step", "doc_offset"),
    ),
    Query(
        name="checkpoints see the same documents",
        table="learned",
        needs=("shards",),
        meaning="Every checkpoint's graph is of the same documents and tokens.",
        offenders="""SELECT * FROM (SELECT model, step, coalesce(sum(n_documents), 0) AS n_documents,
                coalesce(sum(n_tokens), 0) AS n_tokens, max(sum(n_documents)) OVER () AS most_documents,
                max(sum(n_tokens)) OVER () AS most_tokens
            FROM (SELECT DISTINCT model, step FROM learned) LEFT JOIN shards USING (model, step)
            GROUP BY model, step) WHERE n_documents <> most_documents OR n_tokens <> most_tokens""",
    ),
    *(entry for entry in FEATURES if entry.name not in _OF_CORPUS),
)

GENERATIONS: tuple[Expectation, ...] = (
    Keys(
        name="one continuation a prompt and mode",
        table="generations",
        meaning="A checkpoint continues a prompt once in each mode.",
        columns=("model", "step", "prompt", "mode"),
    ),
    Query(
        name="every prompt is continued",
        table="generations",
        needs=("checkpoints", "wanted"),
        meaning="Every checkpoint continues the configured prompts, greedily and sampled, and no others.",
        offenders="""SELECT model, step, prompt, mode, w.seed AS configured_seed, g.seed,
                w.prompt IS NOT NULL AS is_wanted, g.prompt IS NOT NULL AS is_there
            FROM (SELECT * FROM checkpoints, wanted) AS w
            FULL JOIN generations AS g USING (model, step, prompt, mode)
            WHERE w.prompt IS NULL OR g.prompt IS NULL OR w.seed IS DISTINCT FROM g.seed""",
    ),
    Rows(
        name="continuations are text",
        table="generations",
        meaning="A continuation is there, if empty.",
        must="continuation IS NOT NULL",
        show="model, step, prompt, mode",
    ),
)
