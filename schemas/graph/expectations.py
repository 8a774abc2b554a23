"""What must hold of feature shards, the graph's and those of checkpoints.

Views of the suite `features`: `shards`, `dictionaries`, and of each shard `activations`, `edges`, `counts` and its
token shard's `token_counts`.
"""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows, differ

# Grouping by edge once more would cost as much as making them: each feature weighs 31 bits of a hash instead.
_WEIGHT = "(hash(feature_id) >> 33)::BIGINT"
_UNITS = "TRY_CAST({} * pow(2::DOUBLE, (SELECT any_value(scale) FROM edges)) AS BIGINT)"
_ADDED_UP = f"""SELECT folder, layer, token_id, {{n}} AS n, sum({{one}} * {_WEIGHT}) AS features,
    max({{largest}}) AS maximum, sum({{units}}::HUGEINT * {_WEIGHT}) AS sums FROM {{table}}
    GROUP BY folder, layer, token_id"""

FEATURES: tuple[Expectation, ...] = (
    Keys(
        name="one shard a layer and place",
        table="shards",
        meaning="No part of the corpus has two shards of features of a layer.",
        columns=("layer", "doc_offset"),
    ),
    Query(
        name="layers see the same documents",
        table="shards",
        meaning="Every layer has the same documents and tokens in the graph.",
        offenders="""SELECT * FROM (SELECT layer, sum(n_documents) AS n_documents, sum(n_tokens) AS n_tokens,
            max(sum(n_documents)) OVER () AS most_documents, max(sum(n_tokens)) OVER () AS most_tokens
            FROM shards GROUP BY layer) WHERE n_documents <> most_documents OR n_tokens <> most_tokens""",
    ),
    Query(
        name="layers have dictionaries",
        table="shards",
        needs=("dictionaries",),
        meaning="The layers of the features are the layers of the dictionaries.",
        offenders="""SELECT layer, s.folder, d.key AS dictionary FROM shards AS s FULL JOIN dictionaries AS d
            USING (layer) WHERE s.folder IS NULL OR d.key IS NULL""",
    ),
    Query(
        name="activations are all there",
        table="shards",
        meaning="A shard has the activations that its manifest says.",
        offenders="""SELECT folder, layer, source, n_activations, found_activations FROM shards
            WHERE found_activations <> n_activations""",
    ),
    Query(
        name="sum(counts) = tokens in the graph",
        table="shards",
        meaning="The occurrences counted are those of the documents in the graph.",
        offenders="SELECT folder, layer, source, n_tokens, found_tokens FROM shards WHERE found_tokens <> n_tokens",
    ),
    Keys(
        name="activation keys are unique",
        table="activations",
        shard=True,
        meaning="A position activates a feature once.",
        columns=("doc", "position", "feature_id"),
    ),
    Rows(
        name="activation documents are in range",
        table="activations",
        shard=True,
        meaning="0 ≤ doc < documents of the part in the graph, and position ≥ 0.",
        must="doc BETWEEN 0 AND n_documents - 1 AND position >= 0",
        show="folder, layer, doc, position, token_id, feature_id",
    ),
    Rows(
        name="feature ids are in the dictionary",
        table="activations",
        shard=True,
        meaning="0 ≤ feature_id < d_sae of the layer's dictionary.",
        must="feature_id BETWEEN 0 AND d_sae - 1",
        show="folder, layer, doc, position, token_id, feature_id, d_sae",
    ),
    Rows(
        name="activations are positive",
        table="activations",
        shard=True,
        meaning="An activation is finite and above 0.",
        must="activation > 0 AND isfinite(activation)",
        show="folder, layer, doc, position, token_id, feature_id, activation",
    ),
    Keys(
        name="edge keys are unique",
        table="edges",
        shard=True,
        meaning="An edge is one row.",
        columns=("token_id", "feature_id"),
    ),
    Rows(
        name="edges are possible",
        table="edges",
        shard=True,
        meaning="n ≥ 1, and a sum is told where n > 1.",
        must="n >= 1 AND (n = 1) = (sum_units IS NULL)",
        show="folder, layer, token_id, feature_id, n, sum_units",
    ),
    Query(
        name="edges.n = activations grouped",
        table="edges",
        shard=True,
        needs=("activations",),
        meaning="By token, edges and activations agree in number, features, maximum, and sums of the features.",
        offenders=differ(
            _ADDED_UP.format(
                n="count(*)",
                one="1",
                largest="activation",
                units=_UNITS.format("activation"),
                table="activations",
            ),
            _ADDED_UP.format(
                n="sum(n)",
                one="n",
                largest="max_activation",
                units=f"coalesce(sum_units, {_UNITS.format('max_activation')})",
                table="edges",
            ),
            "folder, layer, token_id",
            "n",
            "features",
            "maximum",
            "sums",
        ),
    ),
    Keys(
        name="counted tokens are unique",
        table="counts",
        shard=True,
        meaning="A shard counts a token in one row.",
        columns=("token_id",),
    ),
    Query(
        name="edges are of counted tokens",
        table="edges",
        shard=True,
        needs=("counts",),
        meaning="A token activates a feature at most as often as it occurs, at least once.",
        offenders="""SELECT folder, layer, token_id, feature_id, n, c.count FROM edges AS e
            LEFT JOIN (SELECT token_id, count FROM counts) AS c USING (token_id)
            WHERE (n BETWEEN 1 AND c.count) IS NOT TRUE""",
    ),
    Query(
        name="token ids are the corpus' own",
        table="counts",
        shard=True,
        needs=("token_counts",),
        meaning="A token occurs in the graph at most as often as in its shard of the corpus, at least once.",
        offenders="""SELECT folder, layer, token_id, c.count, t.count AS corpus_count FROM counts AS c
            LEFT JOIN (SELECT token_id, count FROM token_counts) AS t USING (token_id)
            WHERE (c.count BETWEEN 1 AND t.count) IS NOT TRUE""",
    ),
)
