"""Tables that show one feature at a time, and what must hold of them: the group `features`.

They are sorted by layer and feature, in small row groups, so that a reader of one feature reads some kilobytes of each
and never the activations.
"""

from __future__ import annotations

import pyarrow as pa

from schemas.arrow import schema_of
from schemas.expectation import Expectation, Keys, Query, Rows, differ
from schemas.graph.tables import TABLES as GRAPH_TABLES
from schemas.room import Room

TABLES: dict[str, pa.Schema] = {
    "feature_examples": schema_of(
        layer=pa.int32(),
        feature_id=pa.int32(),
        # top: its strongest activations, from place 1 down. decile 1 (the weakest tenth of its activations, by rank) to
        # decile 10 (the strongest): a few of each, drawn by lot from parts of equal size, from place 1 down.
        kind=pa.string(),
        place=pa.int64(),
        doc_id=pa.int64(),
        position=pa.int32(),
        token_id=pa.int32(),
        activation=pa.float32(),
    ),
    "feature_histogram": schema_of(
        layer=pa.int32(),
        feature_id=pa.int32(),
        # from 1, of equal width between 0 and the feature's largest activation; those without activations are left out
        bin=pa.int32(),
        low=pa.float64(),
        high=pa.float64(),
        n=pa.int64(),
    ),
    "feature_tokens": schema_of(
        **{field.name: field.type for field in GRAPH_TABLES["edges"]},
        # the token's share of the feature's activations over its share of the graph's tokens
        lift=pa.float64(),
        # the feature's: Shannon entropy of the tokens of its activations, in bits
        token_entropy=pa.float64(),
    ),
    "feature_summary": schema_of(
        # of every feature that is active at all
        layer=pa.int32(),
        feature_id=pa.int32(),
        n=pa.int64(),
        max_activation=pa.float32(),
        # the token that opens it most often, and how often that does
        token_id=pa.int32(),
        top_n=pa.int64(),
        token_entropy=pa.float64(),
    ),
    # only with features.logits: of every feature of the dictionary
    "feature_logits": schema_of(
        layer=pa.int32(),
        feature_id=pa.int32(),
        # promoted, place 1 the largest logit, or suppressed, place 1 the smallest
        sign=pa.string(),
        place=pa.int64(),
        token_id=pa.int32(),
        token=pa.string(),
        # of the decoder direction as it is stored, through the weight of the final norm and the head: without the scale
        # of the norm, biases, and what caps or scales logits
        logit=pa.float32(),
    ),
}

SHARDED: dict[str, str] = {
    # files of a layer each, made by the table stage
    table: ", ".join(f"f.{column}" for column in schema.names)
    for table, schema in TABLES.items()
}

_EDGES_OF = (
    "SELECT layer, count(*) AS edges, sum(hash(token_id, feature_id, n, max_activation, sum_activation)::HUGEINT) "
    "AS hashes FROM {} GROUP BY layer"
)

EXPECTATIONS: tuple[Expectation, ...] = (
    Keys(
        name="examples' places are unique",
        table="feature_examples",
        meaning="A place of a kind is one row.",
        # In the order of the file: top, decile 1, …, decile 10.
        columns=("layer", "feature_id", "len(kind)", "kind", "place"),
    ),
    Rows(
        name="examples are possible",
        table="feature_examples",
        meaning="top or decile 1 to decile 10, places from 1, of positive activations.",
        must="""regexp_full_match(kind, 'top|decile ([1-9]|10)') AND place >= 1 AND doc_id >= 0 AND position >= 0
            AND activation > 0 AND isfinite(activation)""",
        show="layer, feature_id, kind, place, doc_id, position, token_id, activation",
    ),
    Query(
        name="examples' places have no gaps",
        table="feature_examples",
        meaning="As many examples of a kind as the last one's place says.",
        offenders="""SELECT layer, feature_id, kind, count(*) AS examples, max(place) AS last_place
            FROM feature_examples GROUP BY ALL HAVING count(*) <> max(place)""",
    ),
    Query(
        name="examples are activations of edges",
        table="feature_examples",
        needs=("edges",),
        meaning="An example's token has an edge to its feature, and activates it at most as strongly as that says.",
        offenders="""SELECT layer, feature_id, kind, place, token_id, activation, max_activation
            FROM feature_examples LEFT JOIN edges USING (layer, token_id, feature_id)
            WHERE (activation <= max_activation) IS NOT TRUE""",
    ),
    Query(
        name="the first example is the strongest",
        table="feature_examples",
        needs=("activations_by_feature",),
        meaning="Every feature that was activated has examples, and the first is its largest activation.",
        offenders=differ(
            "SELECT layer, feature_id, maximum AS activation FROM activations_by_feature",
            "SELECT layer, feature_id, activation FROM feature_examples WHERE kind = 'top' AND place = 1",
            "layer, feature_id",
            "activation",
        ),
    ),
    Keys(
        name="histogram bins are unique",
        table="feature_histogram",
        meaning="A bin of a feature is one row.",
        columns=("layer", "feature_id", "bin"),
    ),
    Rows(
        name="histogram bins are possible",
        table="feature_histogram",
        meaning="n ≥ 1, bins from 1, 0 ≤ low < high.",
        must="n >= 1 AND bin >= 1 AND low >= 0 AND low < high AND isfinite(high)",
        show="layer, feature_id, bin, low, high, n",
    ),
    Query(
        name="histograms count every activation",
        table="feature_histogram",
        needs=("feature_degree",),
        meaning="A feature's bins add up to its activations.",
        offenders=differ(
            "SELECT layer, feature_id, sum(n) AS n FROM feature_histogram GROUP BY ALL",
            "SELECT layer, feature_id, n FROM feature_degree",
            "layer, feature_id",
            "n",
        ),
    ),
    Query(
        name="feature_tokens = edges",
        table="feature_tokens",
        needs=("edges",),
        meaning="The edges by feature are the edges.",
        offenders=differ(
            _EDGES_OF.format("edges"), _EDGES_OF.format("feature_tokens"), "layer", "edges", "hashes"
        ),
    ),
    Rows(
        name="lifts are positive",
        table="feature_tokens",
        meaning="lift > 0.",
        must="lift > 0 AND isfinite(lift)",
        show="layer, feature_id, token_id, n, lift",
    ),
    Query(
        name="token entropies are possible",
        table="feature_tokens",
        meaning="A feature has one token_entropy, between 0 and log2 of the number of its tokens.",
        offenders="""SELECT layer, feature_id, count(*) AS degree, min(token_entropy) AS lowest,
                max(token_entropy) AS highest
            FROM feature_tokens GROUP BY layer, feature_id
            HAVING (lowest = highest AND lowest BETWEEN 0 AND log2(degree) + 1e-6) IS NOT TRUE""",
    ),
    Query(
        name="feature_summary = feature_tokens grouped",
        table="feature_summary",
        needs=("feature_tokens",),
        meaning="A feature's summary counts the activations of its tokens, and has their largest.",
        offenders=differ(
            """SELECT layer, feature_id, sum(n) AS n, max(max_activation) AS max_activation, max(n) AS top_n
            FROM feature_tokens GROUP BY layer, feature_id""",
            "SELECT layer, feature_id, n, max_activation, top_n FROM feature_summary",
            "layer, feature_id",
            "n",
            "max_activation",
            "top_n",
        ),
    ),
    Query(
        name="the first token opens its feature most often",
        table="feature_summary",
        needs=("feature_tokens",),
        meaning="A feature's token has the edge to it with top_n activations, and the feature's token_entropy.",
        offenders="""SELECT layer, feature_id, s.token_id, top_n, e.n, s.token_entropy
            FROM feature_summary AS s LEFT JOIN feature_tokens AS e USING (layer, feature_id, token_id)
            WHERE (e.n = top_n AND e.token_entropy = s.token_entropy) IS NOT TRUE""",
    ),
    Keys(
        name="logits' places are unique",
        table="feature_logits",
        meaning="A place of a sign is one row.",
        columns=("layer", "feature_id", "sign", "place"),
    ),
    Rows(
        name="logits are possible",
        table="feature_logits",
        meaning="promoted or suppressed, places from 1, of a token with its text.",
        must="sign IN ('promoted', 'suppressed') AND place >= 1 AND isfinite(logit) AND token IS NOT NULL",
        show="layer, feature_id, sign, place, token_id, token, logit",
    ),
    Query(
        name="every feature has its logits",
        table="feature_logits",
        needs=("dictionaries",),
        meaning="Each feature of the dictionary promotes and suppresses as many tokens as the others.",
        offenders="""SELECT layer, sign, count(*) AS rows, max(place) AS last_place, max(feature_id) AS last_feature,
                any_value(dictionary_size) AS dictionary_size
            FROM feature_logits LEFT JOIN dictionaries USING (layer) GROUP BY layer, sign
            HAVING (rows = last_place * any_value(dictionary_size)
                AND last_feature = any_value(dictionary_size) - 1) IS NOT TRUE""",
    ),
)

ROOM = Room(
    name="graph",
    group="features",
    tables=TABLES,
    required=("feature_examples", "feature_histogram", "feature_summary", "feature_tokens"),
    left_in_place=tuple(TABLES),
    sharded=SHARDED,
    table_expectations=EXPECTATIONS,
)
