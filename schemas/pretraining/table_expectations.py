"""What must hold of the published tables of a consolidation (see `schemas.expectations`)."""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows, differ

CONSOLIDATION: tuple[Expectation, ...] = (
    Keys(
        name="checkpoint keys are unique",
        table="checkpoints",
        meaning="A step of a series is one row.",
        columns=("model", "step"),
    ),
    Keys(
        name="training loss keys are unique",
        table="training_losses",
        meaning="An optimizer step of a series is one row.",
        columns=("model", "step"),
    ),
    Rows(
        name="training losses are possible",
        table="training_losses",
        meaning="Losses are finite and at least 0, of some tokens.",
        must="loss >= 0 AND isfinite(loss) AND step >= 0 AND tokens > 0",
        show="model, step, tokens, loss",
    ),
    Keys(
        name="document loss keys are unique",
        table="document_losses",
        meaning="A document and bucket of a checkpoint is one row.",
        columns=("model", "step", "doc_id", "bucket"),
    ),
    Rows(
        name="document losses are possible",
        table="document_losses",
        meaning="A sum is finite and at least 0, of at least one prediction.",
        must="n >= 1 AND loss >= 0 AND isfinite(loss)",
        show="model, step, doc_id, bucket, n, loss",
    ),
    Query(
        name="document_losses = predictions of the documents",
        table="document_losses",
        needs=("occurrences", "tokens", "made_with"),
        meaning="The documents' own tokens and windows have as many predictions of each kind, at every checkpoint.",
        offenders="""WITH here AS (
                SELECT doc_id, position, token_id, is_function FROM occurrences
                SEMI JOIN (SELECT doc_id FROM document_losses) USING (doc_id) JOIN tokens USING (token_id)),
            counted AS (SELECT a.doc_id, if(b.is_function, 'function', 'content') || '→'
                || if(a.is_function, 'function', 'content') AS bucket, count(*) AS n
                FROM here AS a JOIN here AS b ON b.doc_id = a.doc_id AND b.position = a.position - 1, made_with
                WHERE a.position % made_with."window" <> 0 GROUP BY ALL),
            told AS (SELECT model, step, doc_id, bucket, n FROM document_losses),
            wanted AS (SELECT model, step, doc_id, bucket, n FROM (SELECT DISTINCT model, step FROM told), counted)
            SELECT model, step, doc_id, bucket, told.n, wanted.n AS counted_n
            FROM told FULL JOIN wanted USING (model, step, doc_id, bucket) WHERE told.n IS DISTINCT FROM wanted.n""",
    ),
    Query(
        name="document_losses = token_losses grouped",
        table="document_losses",
        needs=("token_losses", "tokens"),
        meaning="Each sum is of the single losses, as multiples of 2^-32.",
        offenders="""SELECT model, step, doc_id, bucket, a.n, a.loss, b.n AS tokens_n, b.loss AS tokens_loss
            FROM document_losses AS a FULL JOIN (
                SELECT model, step, doc_id, if(c.is_function, 'function', 'content') || '→'
                    || if(p.is_function, 'function', 'content') AS bucket, count(*) AS n,
                    sum((loss::DOUBLE * 4294967296)::BIGINT)::DOUBLE / 4294967296 AS loss
                FROM token_losses AS l JOIN tokens AS c ON c.token_id = l.current_token_id
                JOIN tokens AS p ON p.token_id = l.token_id GROUP BY ALL) AS b
            USING (model, step, doc_id, bucket)
            WHERE a.n IS DISTINCT FROM b.n OR a.loss IS DISTINCT FROM b.loss""",
    ),
    Keys(
        name="bucket keys are unique",
        table="loss_buckets",
        meaning="A bucket of a checkpoint is one row.",
        columns=("model", "step", "bucket"),
    ),
    Query(
        name="every checkpoint has the four buckets",
        table="loss_buckets",
        needs=("checkpoints",),
        meaning="function→function, function→content, content→function and content→content are there, and no others.",
        offenders="""WITH wanted AS (SELECT model, step, kinds.a || '→' || kinds.b AS bucket FROM checkpoints,
                (SELECT * FROM (VALUES ('function'), ('content')) AS x (a), (VALUES ('function'), ('content')) AS y (b))
                AS kinds)
            SELECT model, step, bucket, b.n FROM loss_buckets AS b FULL JOIN wanted AS w USING (model, step, bucket)
            WHERE w.model IS NULL OR b.n IS NULL""",
    ),
    Query(
        name="buckets count the same predictions",
        table="loss_buckets",
        meaning="A bucket has as many predictions at every checkpoint of every series.",
        offenders="""SELECT * FROM (SELECT model, step, bucket, n, max(n) OVER (PARTITION BY bucket) AS most
            FROM loss_buckets) WHERE n IS DISTINCT FROM most""",
    ),
    Query(
        name="loss_buckets = document_losses grouped",
        table="loss_buckets",
        needs=("document_losses",),
        meaning="A bucket's predictions and mean loss are those of the documents; without one it has no mean.",
        offenders="""SELECT model, step, bucket, b.n, d.n AS documents_n, mean_loss, d.loss / d.n AS documents_mean
            FROM loss_buckets AS b FULL JOIN (SELECT model, step, bucket, sum(n) AS n, sum(loss) AS loss
                FROM document_losses GROUP BY ALL) AS d USING (model, step, bucket)
            WHERE (b.n = coalesce(d.n, 0) AND (mean_loss IS NULL) = (b.n = 0)
                AND coalesce(abs(mean_loss - d.loss / d.n) <= 1e-9 * (1 + mean_loss), true)) IS NOT TRUE""",
    ),
    Query(
        name="loss shares sum to 1",
        table="loss_buckets",
        meaning="A bucket's share is its n · mean over that of all four, and the shares add up to 1.",
        offenders="""SELECT * FROM (SELECT model, step, bucket, loss_share, sum(loss_share) OVER checkpoint AS shares,
                coalesce(n * mean_loss, 0) / sum(n * mean_loss) OVER checkpoint AS expected_share,
                sum(n * mean_loss) OVER checkpoint AS total
            FROM loss_buckets WINDOW checkpoint AS (PARTITION BY model, step))
            WHERE total > 0 AND (abs(shares - 1) <= 1e-9 AND abs(loss_share - expected_share) <= 1e-9) IS NOT TRUE""",
    ),
    Query(
        name="intervals contain the mean",
        table="loss_buckets",
        needs=("made_with",),
        meaning="Intervals have both ends or none, and contain what they are of (from 100 resamples on).",
        offenders="""SELECT model, step, bucket, mean_low, mean_loss, mean_high, share_low, loss_share, share_high
            FROM loss_buckets, made_with
            WHERE ((mean_low IS NULL) = (mean_high IS NULL) AND (share_low IS NULL) = (share_high IS NULL)
                AND coalesce(mean_low <= mean_high AND share_low <= share_high, true)
                AND (resamples < 100 OR coalesce(mean_loss BETWEEN mean_low * (1 - 1e-6) - 1e-9
                    AND mean_high * (1 + 1e-6) + 1e-9, true)
                    AND coalesce(loss_share BETWEEN share_low - 1e-6 AND share_high + 1e-6, true))) IS NOT TRUE""",
    ),
    Keys(
        name="learned_features keys are unique",
        table="learned_features",
        meaning="A checkpoint's SAE is one row.",
        columns=("model", "step"),
    ),
    Query(
        name="SAEs are of checkpoints",
        table="learned_features",
        needs=("checkpoints",),
        meaning="Every SAE is of a checkpoint that is there.",
        offenders="SELECT model, step, layer FROM learned_features ANTI JOIN checkpoints USING (model, step)",
    ),
    Query(
        name="every SAE has its graph",
        table="learned_features",
        needs=("checkpoint_graph",),
        meaning="A checkpoint's SAE and its graph are of one layer and one dictionary size.",
        offenders="""SELECT model, step, l.layer, g.layer AS graph_layer, l.dictionary_size,
                g.dictionary_size AS graph_dictionary_size
            FROM learned_features AS l FULL JOIN checkpoint_graph AS g USING (model, step)
            WHERE l.layer IS DISTINCT FROM g.layer OR l.dictionary_size IS DISTINCT FROM g.dictionary_size""",
    ),
    Keys(
        name="checkpoint_degree keys are unique",
        table="checkpoint_degree",
        meaning="A token of a checkpoint's graph is one row.",
        columns=("model", "step", "layer", "token_id"),
    ),
    Query(
        name="checkpoint_degree is of counted tokens",
        table="checkpoint_degree",
        needs=("tokens",),
        meaning="A token in a checkpoint's graph is in `tokens`, as often there at least, with its rank and its kind.",
        offenders="""SELECT model, step, token_id, d.rank, t.rank AS tokens_rank, d.count, t.count AS tokens_count,
                d.is_function, t.is_function AS tokens_is_function
            FROM checkpoint_degree AS d LEFT JOIN tokens AS t USING (token_id)
            WHERE (d.rank = t.rank AND d.is_function = t.is_function AND d.count <= t.count) IS NOT TRUE""",
    ),
    Query(
        name="checkpoints count the same tokens",
        table="checkpoint_degree",
        meaning="A token occurs as often in every checkpoint's graph: the documents are the same.",
        offenders="""SELECT token_id, min(count) AS least, max(count) AS most, count(*) AS checkpoints,
                (SELECT count(DISTINCT (model, step)) FROM checkpoint_degree) AS all_checkpoints
            FROM checkpoint_degree GROUP BY token_id HAVING least <> most OR checkpoints <> all_checkpoints""",
    ),
    Query(
        name="checkpoints' rarefied degree is at most the degree",
        table="checkpoint_degree",
        needs=("made_with",),
        meaning="0 ≤ rarefied_degree ≤ degree; it is null just where the token occurs less than m times.",
        offenders="""SELECT model, step, token_id, count, degree, rarefied_degree, d.m, made_with.m AS wanted_m
            FROM checkpoint_degree AS d, made_with
            WHERE (d.m = made_with.m AND (rarefied_degree IS NULL) = (count < d.m) AND degree >= 0
                AND coalesce(rarefied_degree, 0) BETWEEN 0 AND degree * (1 + 1e-9)) IS NOT TRUE""",
    ),
    Keys(
        name="one graph a checkpoint",
        table="checkpoint_graph",
        meaning="A checkpoint's graph is one row.",
        columns=("model", "step"),
    ),
    Query(
        name="checkpoint_graph = checkpoint_degree grouped",
        table="checkpoint_graph",
        needs=("checkpoint_degree",),
        meaning="Tokens and edges are those of the degrees; no token has more features than were activated.",
        offenders="""SELECT model, step, layer, g.n_tokens, d.n_tokens AS counted_tokens, n_edges, d.edges,
                activated_features, d.largest AS largest_degree
            FROM checkpoint_graph AS g FULL JOIN (SELECT model, step, layer, sum(count) AS n_tokens,
                sum(degree) AS edges, max(degree) AS largest FROM checkpoint_degree GROUP BY ALL) AS d
                USING (model, step, layer)
            WHERE (g.n_tokens = d.n_tokens AND n_edges = d.edges AND activated_features BETWEEN d.largest AND d.edges)
                IS NOT TRUE""",
    ),
    Rows(
        name="checkpoint graphs are possible",
        table="checkpoint_graph",
        meaning="Function and content tokens together activate what is activated, within the dictionary.",
        must="""activated_features BETWEEN 0 AND dictionary_size AND mean_l0 BETWEEN 0 AND activated_features
            AND function_features <= activated_features AND content_features <= activated_features
            AND function_features + content_features >= activated_features""",
        show="""model, step, dictionary_size, activated_features, mean_l0, function_features,
            content_features""",
    ),
    Rows(
        name="checkpoint coverages are shares",
        table="checkpoint_graph",
        meaning="Coverages are between 0 and 1 of the activated features; null where there is none.",
        must="""CASE WHEN activated_features = 0
            THEN function_coverage IS NULL AND content_coverage IS NULL AND top10_coverage IS NULL
            ELSE abs(function_coverage - function_features / activated_features) <= 1e-12
                AND abs(content_coverage - content_features / activated_features) <= 1e-12
                AND function_coverage BETWEEN 0 AND 1 AND content_coverage BETWEEN 0 AND 1
                AND top10_coverage BETWEEN 0 AND 1 END""",
        show="""model, step, activated_features, function_features, function_coverage, content_features,
            content_coverage, top10_coverage""",
    ),
    Keys(
        name="generation keys are unique",
        table="generations",
        meaning="A checkpoint continues a prompt once in each mode.",
        columns=("model", "step", "prompt", "mode"),
    ),
    Query(
        name="every checkpoint has the same prompts",
        table="generations",
        needs=("checkpoints",),
        meaning="Each prompt and mode is continued by every checkpoint.",
        offenders=differ(
            "SELECT model, step, prompt, mode, true AS is_there FROM generations",
            """SELECT model, step, prompt, mode, true AS is_there FROM checkpoints,
            (SELECT DISTINCT prompt, mode FROM generations)""",
            "model, step, prompt, mode",
            "is_there",
        ),
    ),
)
