"""What must hold of traits and of steered prompts (PAPER 1.3).

Views of the `steering` suite: `traits` (one row a trait and layer) and `experiments`, a folder each; what the cases'
file asks for: `wanted_traits` (with the number of their pairs of prompts; 0: their features are given), `wanted_layers`
(where each is to be looked for), `wanted_features` (those that are given), `wanted_experiments` and `wanted_members`
(the traits of each); `conditions` (what each experiment is to be steered by), `settings` and `dictionaries`; and of all
folders together `trait_layers`, `trait_features` and `steering`, with their `folder` and `file_row`, the row's number
in its file.
"""

from __future__ import annotations

from schemas.expectation import Expectation, Query, Rows, differ

_TRAITS: tuple[Expectation, ...] = (
    Query(
        name="every layer of a trait has its folder",
        table="traits",
        needs=("wanted_layers",),
        meaning="""The traits of the file are looked for at every layer, those that are given have their own alone; each
            once, and each is committed.""",
        offenders="""SELECT trait, layer, w.trait IS NOT NULL AS is_wanted, coalesce(t.folders, 0) AS folders,
                t.committed
            FROM wanted_layers AS w FULL JOIN (SELECT trait, layer, count(*) AS folders,
                bool_and(committed) AS committed FROM traits GROUP BY ALL) AS t USING (trait, layer)
            WHERE (w.trait IS NOT NULL AND t.folders = 1 AND t.committed) IS NOT TRUE""",
    ),
    Query(
        name="a folder judges its layer",
        table="trait_layers",
        needs=("traits",),
        meaning="A folder has one row on its layer, of its trait.",
        offenders=differ(
            "SELECT folder, trait, layer, count(*) AS n FROM trait_layers GROUP BY ALL",
            "SELECT folder, trait, layer, 1 AS n FROM traits",
            "folder, trait, layer",
            "n",
        ),
    ),
    Rows(
        name="layers are possible",
        table="trait_layers",
        meaning="Explained variance ≤ 1; a separation is finite, an accuracy between 0 and 1, of two pairs or more.",
        must="""coalesce(explained_variance <= 1, true) AND (separation IS NULL) = (accuracy IS NULL)
            AND (separation IS NULL OR (isfinite(separation) AND accuracy BETWEEN 0 AND 1 AND n_pairs >= 2))""",
        show="folder, trait, layer, separation, accuracy, explained_variance, n_pairs",
    ),
    Query(
        name="pairs are the trait's",
        table="trait_layers",
        needs=("wanted_traits",),
        meaning="Every layer judges all pairs of prompts; given features are judged by none.",
        offenders="""SELECT trait, layer, separation, l.n_pairs, w.n_pairs AS wanted_pairs FROM trait_layers AS l
            LEFT JOIN wanted_traits AS w USING (trait)
            WHERE l.n_pairs IS DISTINCT FROM w.n_pairs OR (separation IS NULL) <> (w.n_pairs = 0)""",
    ),
    Query(
        name="places run from 1",
        table="trait_features",
        meaning="The features of a layer have the places 1, 2, …, in the files' order, each feature once.",
        offenders="""SELECT * FROM (SELECT folder, trait, layer, feature_id, place,
                row_number() OVER (PARTITION BY folder, layer ORDER BY file_row) AS expected_place,
                count(*) OVER (PARTITION BY folder, layer, feature_id) AS rows FROM trait_features)
            WHERE place IS DISTINCT FROM expected_place OR rows <> 1""",
    ),
    Query(
        name="the strongest come first",
        table="trait_features",
        needs=("wanted_traits",),
        meaning="Features that were found are ranked by their contribution.",
        offenders="""SELECT * FROM (SELECT trait, layer, place, feature_id, contribution, n_pairs,
                lag(contribution) OVER (PARTITION BY folder, layer ORDER BY place) AS contribution_before
            FROM trait_features JOIN wanted_traits USING (trait))
            WHERE n_pairs > 0 AND contribution > contribution_before""",
    ),
    Query(
        name="trait features are in the dictionaries",
        table="trait_features",
        needs=("trait_layers", "dictionaries"),
        meaning="Every feature is of a layer of its trait, and 0 ≤ feature_id < latents.",
        offenders="""SELECT trait, layer, feature_id, d_sae FROM trait_features
            LEFT JOIN (SELECT folder, trait, layer, d_sae FROM trait_layers JOIN dictionaries USING (layer))
                USING (folder, trait, layer)
            WHERE (feature_id BETWEEN 0 AND d_sae - 1) IS NOT TRUE""",
    ),
    Query(
        name="coefficients are possible",
        table="trait_features",
        needs=("wanted_traits", "settings"),
        meaning="""Features that were found have positive, finite numbers; a clamp value is at least the mean over all
            positive prompts, and a coefficient from activations is the difference of the means.""",
        offenders="""SELECT trait, layer, feature_id, coefficient, contribution, clamp_value, mean_positive,
                mean_negative
            FROM trait_features JOIN wanted_traits USING (trait), settings
            WHERE n_pairs > 0 AND (coefficient > 0 AND contribution > 0 AND isfinite(coefficient + contribution)
                AND mean_positive > 0 AND mean_negative >= 0 AND isfinite(clamp_value)
                AND clamp_value >= mean_positive * (1 - 1e-6)
                AND (decomposition <> 'activations' OR abs(coefficient - (mean_positive - mean_negative))
                    <= 1e-6 * (mean_positive + mean_negative))) IS NOT TRUE""",
    ),
    Query(
        name="given features are those given",
        table="trait_features",
        needs=("traits", "wanted_traits", "wanted_features"),
        meaning="A trait whose features are given has these, in their order, with these values.",
        offenders=differ(
            """SELECT trait, layer, place, feature_id, coefficient, clamp_value FROM trait_features
            JOIN wanted_traits USING (trait) WHERE n_pairs = 0""",
            """SELECT trait, layer, place, feature_id, value AS coefficient, value AS clamp_value
            FROM wanted_features SEMI JOIN traits USING (trait)""",
            "trait, layer, place",
            "feature_id",
            "coefficient",
            "clamp_value",
        ),
    ),
)

_EXPERIMENTS: tuple[Expectation, ...] = (
    Query(
        name="every experiment has its folder",
        table="experiments",
        needs=("wanted_experiments", "steering"),
        meaning="The experiments of the file are those that were run, each once, and each is committed.",
        offenders="""SELECT "case", prompt, target, traits, w."case" IS NOT NULL AS is_wanted,
                coalesce(e.folders, 0) AS folders, e.committed
            FROM wanted_experiments AS w FULL JOIN (SELECT "case", prompt, target, traits,
                count(DISTINCT folder) AS folders, bool_and(committed) AS committed
                FROM steering JOIN experiments USING (folder, "case", prompt) GROUP BY ALL) AS e
            USING ("case", prompt, target, traits)
            WHERE (w."case" IS NOT NULL AND e.folders = 1 AND e.committed) IS NOT TRUE""",
    ),
    Query(
        name="rows are of their experiment",
        table="steering",
        needs=("experiments",),
        meaning="A folder's rows are of one experiment, at one layer.",
        offenders="""SELECT folder, "case", prompt, target, traits, layer, e.folder IS NOT NULL AS is_own
            FROM (SELECT *, count(*) OVER (PARTITION BY folder) AS variants FROM
                (SELECT DISTINCT folder, "case", prompt, target, traits, layer FROM steering))
            LEFT JOIN (SELECT DISTINCT folder, "case", prompt FROM experiments) AS e USING (folder, "case", prompt)
            WHERE variants > 1 OR e.folder IS NULL""",
    ),
    Query(
        name="every condition is tried once",
        table="steering",
        needs=("experiments", "conditions"),
        meaning="""An experiment has each mode, place, control, draw and strength once, and no others; the content
            token's are left out where its prompt has none.""",
        offenders="""SELECT folder, mode, place, control, draw, strength, c.folder IS NOT NULL AS is_wanted,
                coalesce(s.n, 0) AS rows
            FROM (SELECT DISTINCT folder, mode, place, control, draw, strength FROM experiments, conditions) AS c
            FULL JOIN (SELECT folder, mode, place, control, draw, strength, count(*) AS n FROM steering GROUP BY ALL)
                AS s USING (folder, mode, place, control, draw, strength)
            WHERE (c.folder IS NOT NULL AND s.n = 1) IS NOT TRUE AND NOT (s.n IS NULL AND place = 'content token'
                AND folder NOT IN (SELECT folder FROM steering WHERE place = 'content token'))""",
    ),
    Query(
        name="positions are of their places",
        table="steering",
        meaning="""The last function token has one position in a prompt, a content token an earlier one; steering
            everywhere has none.""",
        offenders="""SELECT folder, mode, place, control, draw, strength, position, last_position FROM steering
            LEFT JOIN (SELECT folder, min(position) AS last_position FROM steering
                WHERE place = 'last function token' GROUP BY folder) USING (folder)
            WHERE (CASE place WHEN 'all positions' THEN position IS NULL
                WHEN 'last function token' THEN position >= 0 AND position = last_position
                ELSE position >= 0 AND position < coalesce(last_position, position + 1) END) IS NOT TRUE""",
    ),
    Query(
        name="experiments are steered at the layer chosen",
        table="steering",
        needs=(
            *("wanted_experiments", "wanted_members", "wanted_traits"),
            *("trait_layers", "trait_features", "settings"),
        ),
        meaning="""It is the configured layer, else that of given traits, else, of those where every trait has features,
            the one whose separations, added over the traits, are largest.""",
        offenders="""WITH sums AS (SELECT "case", prompt, target, layer, sum(coalesce(separation, 0)) AS separation,
                bool_or(n_pairs = 0) AS is_given, bool_and(f.trait IS NOT NULL) AS has_features
                FROM wanted_members JOIN trait_layers USING (trait)
                LEFT JOIN (SELECT DISTINCT trait, layer FROM trait_features) AS f USING (trait, layer) GROUP BY ALL),
            best AS (SELECT "case", prompt, target, max(separation) FILTER (WHERE has_features) AS separation,
                bool_or(is_given) AS is_given, min(layer) FILTER (WHERE is_given) AS given_layer
                FROM sums GROUP BY ALL)
            SELECT DISTINCT folder, "case", layer, configured_layer, given_layer, s.separation,
                best.separation AS largest_separation
            FROM steering LEFT JOIN sums AS s USING ("case", prompt, target, layer)
            LEFT JOIN best USING ("case", prompt, target), settings
            WHERE (CASE WHEN configured_layer IS NOT NULL THEN layer = configured_layer
                WHEN best.is_given THEN layer = given_layer
                ELSE s.has_features AND s.separation >= best.separation - 1e-9 * abs(best.separation) END)
                IS NOT TRUE""",
    ),
    Query(
        name="steered features are the traits'",
        table="steering",
        needs=("wanted_members", "wanted_traits", "trait_features", "settings"),
        meaning="Together, the strongest features of each trait at the layer are steered, or those that are given.",
        offenders="""SELECT DISTINCT folder, "case", layer, feature_ids, expected FROM steering LEFT JOIN
                (SELECT "case", prompt, target, f.layer, list_sort(list(DISTINCT feature_id)) AS expected
                FROM wanted_members JOIN wanted_traits USING (trait) JOIN trait_features AS f USING (trait), settings
                WHERE n_pairs = 0 OR place <= configured_features GROUP BY ALL) USING ("case", prompt, target, layer)
            WHERE control = 'trait' AND list_sort(feature_ids) IS DISTINCT FROM expected""",
    ),
    Query(
        name="random features are others",
        table="steering",
        needs=("dictionaries",),
        meaning="""A draw is as many other latents of the dictionary as the trait has features, the same in every
            setting.""",
        offenders="""SELECT DISTINCT folder, "case", draw, feature_ids, trait_ids, d_sae FROM
                (SELECT *, count(DISTINCT feature_ids) OVER (PARTITION BY folder, draw) AS sets FROM steering
                WHERE control = 'random')
            LEFT JOIN (SELECT folder, min(feature_ids) AS trait_ids FROM steering WHERE control = 'trait'
                GROUP BY folder) USING (folder)
            LEFT JOIN dictionaries USING (layer)
            WHERE (sets = 1 AND list_unique(feature_ids) = len(feature_ids) AND NOT list_has_any(feature_ids, trait_ids)
                AND len(feature_ids) = least(len(trait_ids), d_sae - len(trait_ids))
                AND coalesce(list_min(feature_ids) >= 0 AND list_max(feature_ids) < d_sae, true)) IS NOT TRUE""",
    ),
    Rows(
        name="strength 0 changes nothing",
        table="steering",
        meaning="At strength 0 distribution, target and text are the unsteered model's own, exactly.",
        must="""strength <> 0 OR (kl = 0 AND target_logprob_delta = 0 AND steered_text = baseline_text
            AND perplexity IS NOT DISTINCT FROM baseline_perplexity AND relative_norm = 0)""",
        show="""folder, mode, place, control, draw, strength, kl, target_logprob_delta, steered_text, baseline_text,
            perplexity, baseline_perplexity, relative_norm""",
    ),
    Rows(
        name="effects are possible",
        table="steering",
        meaning="""Texts are there, divergences are at least 0, log-probabilities at most 0 and finite, perplexities at
            least 1, norms finite.""",
        must="""steered_text IS NOT NULL AND baseline_text IS NOT NULL AND kl >= -1e-9 AND NOT isnan(kl)
            AND isfinite(target_logprob + target_logprob_delta) AND target_logprob <= 1e-6
            AND target_logprob + target_logprob_delta <= 1e-6 * (1 - target_logprob)
            AND coalesce(perplexity >= 1 - 1e-6 AND isfinite(perplexity), true)
            AND coalesce(baseline_perplexity >= 1 - 1e-6 AND isfinite(baseline_perplexity), true)
            AND relative_norm >= 0 AND isfinite(relative_norm)""",
        show="""folder, mode, place, control, draw, strength, kl, target_logprob, target_logprob_delta, perplexity,
            baseline_perplexity, relative_norm""",
    ),
    Query(
        name="random controls move as far",
        table="steering",
        meaning="In each setting, random features change the residual by as much as the trait's.",
        offenders="""SELECT folder, mode, place, r.draw, strength, r.relative_norm, t.relative_norm AS trait_norm
            FROM steering AS r JOIN steering AS t USING (folder, mode, place, strength)
            WHERE r.control = 'random' AND t.control = 'trait' AND len(r.feature_ids) > 0
                AND (abs(r.relative_norm - t.relative_norm) <= 1e-3 * t.relative_norm) IS NOT TRUE""",
    ),
)

STEERING: tuple[Expectation, ...] = _TRAITS + _EXPERIMENTS
