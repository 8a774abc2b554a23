"""What must hold of the published tables of reactivation and steering (see `schemas.expectations`)."""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows, differ

_UNEQUAL = """(abs(a.{0} - b.{0}) <= 1e-6 * (1 + abs(b.{0}))
    OR (a.{0} IS NULL AND b.{0} IS NULL)) IS NOT TRUE"""


def _intervals(*names: str) -> str:
    """Each interval has both ends or none, in order, and contains what it is of."""
    return " AND ".join(
        f"(({name}_low IS NULL) = ({name}_high IS NULL) AND ({name} IS NOT NULL OR {name}_low IS NULL) "
        f"AND coalesce({name}_low <= {name}_high AND {name} BETWEEN {name}_low - 1e-6 * (1 + abs({name})) "
        f"AND {name}_high + 1e-6 * (1 + abs({name})), true))"
        for name in names
    )


_REACTIVATION: tuple[Expectation, ...] = (
    Keys(
        name="prompt token keys are unique",
        table="prompt_tokens",
        meaning="A position of a case's prompt holds one token.",
        columns=('"case"', "prompt", "position"),
    ),
    Query(
        name="prompt tokens are of the corpus' kinds",
        table="prompt_tokens",
        needs=("tokens",),
        meaning="A token is a function token where the corpus has it as one, and else a content token.",
        offenders="""SELECT p."case", position, token_id, p.is_function, t.is_function AS tokens_is_function
            FROM prompt_tokens AS p LEFT JOIN tokens AS t USING (token_id)
            WHERE p.is_function IS DISTINCT FROM coalesce(t.is_function, false)""",
    ),
    Query(
        name="cases have one relation, prompts that differ in one place",
        table="prompt_tokens",
        meaning="A case has two prompts at least and one relation; after the place its prompts have the same tokens.",
        offenders="""WITH places AS (
                SELECT "case", max(position) FILTER (in_place) AS last FROM prompt_tokens GROUP BY ALL)
            SELECT "case", count(DISTINCT prompt) AS prompts, count(DISTINCT relation) AS relations,
                bool_or(looked_at AND position <= last) AS looked_at_too_early,
                count(DISTINCT (position, token_id)) FILTER (position > last) AS tokens,
                count(DISTINCT position) FILTER (position > last) AS positions
            FROM prompt_tokens JOIN places USING ("case") GROUP BY "case"
            HAVING prompts < 2 OR relations <> 1 OR looked_at_too_early OR tokens <> positions""",
    ),
    Keys(
        name="reactivation keys are unique",
        table="reactivations",
        meaning="A feature of a layer is active once at a position.",
        columns=('"case"', "prompt", "layer", "position", "feature_id"),
    ),
    Rows(
        name="reactivations are active",
        table="reactivations",
        meaning="Activations are finite and above 0.",
        must="activation > 0 AND isfinite(activation) AND feature_id >= 0",
        show='"case", prompt, layer, position, feature_id, activation',
    ),
    Query(
        name="reactivations are at prompt tokens",
        table="reactivations",
        needs=("prompt_tokens",),
        meaning="Every position is one of the prompt's, with its token.",
        offenders="""SELECT r."case", position, r.token_id, t.token_id AS prompt_token_id
            FROM reactivations AS r LEFT JOIN prompt_tokens AS t USING ("case", prompt, position)
            WHERE (r.token_id = t.token_id AND r.relation = t.relation AND r.in_place = t.in_place
                AND r.is_function = t.is_function AND r.token IS NOT DISTINCT FROM t.token) IS NOT TRUE""",
    ),
    Query(
        name="own features tell prompts apart",
        table="reactivations",
        meaning="A feature is a prompt's own just where it is active at the place in it and in no other of its case.",
        offenders="""SELECT "case", prompt, layer, feature_id, position, is_own FROM (
                SELECT *, bool_or(in_place) OVER here AS at_place,
                    count(DISTINCT prompt) FILTER (in_place) OVER (PARTITION BY "case", layer, feature_id) AS prompts
                FROM reactivations WINDOW here AS (PARTITION BY "case", prompt, layer, feature_id))
            WHERE is_own IS DISTINCT FROM (at_place AND prompts = 1)""",
    ),
    Keys(
        name="reactivation position keys are unique",
        table="reactivation_positions",
        meaning="A layer of a later position is one row.",
        columns=('"case"', "prompt", "layer", "position"),
    ),
    Rows(
        name="reactivation counts are possible",
        table="reactivation_positions",
        meaning="Nothing is active more often than there are chances, which are multiples of the own features.",
        must="""own BETWEEN 0 AND n_own AND counterfactual BETWEEN 0 AND n_counterfactual
            AND unrelated BETWEEN 0 AND n_unrelated AND n_counterfactual >= n_own
            AND (n_own > 0 OR n_counterfactual + n_unrelated = 0)
            AND n_counterfactual % greatest(n_own, 1) = 0 AND n_unrelated % greatest(n_own, 1) = 0""",
        show='"case", prompt, layer, position, n_own, own, n_counterfactual, counterfactual, n_unrelated, unrelated',
    ),
    Query(
        name="reactivation_positions = reactivations counted",
        table="reactivation_positions",
        needs=("reactivations",),
        meaning="Own features, and those active again at a position, are those of `reactivations`.",
        offenders="""WITH own AS (SELECT "case", prompt, layer, count(DISTINCT feature_id) AS n_own
                FROM reactivations WHERE is_own GROUP BY ALL),
            again AS (SELECT "case", prompt, layer, position, count(*) AS own
                FROM reactivations WHERE is_own GROUP BY ALL)
            SELECT p."case", prompt, layer, position, p.n_own, o.n_own AS counted_n_own, p.own, a.own AS counted_own
            FROM reactivation_positions AS p LEFT JOIN own AS o USING ("case", prompt, layer)
                LEFT JOIN again AS a USING ("case", prompt, layer, position)
            WHERE p.n_own <> coalesce(o.n_own, 0) OR p.own <> coalesce(a.own, 0)""",
    ),
    Keys(
        name="reactivation score keys are unique",
        table="reactivation_scores",
        meaning="A token of a kind and layer is one row, and so is the kind as a whole.",
        columns=("layer", "kind", "token"),
    ),
    Query(
        name="reactivation_scores = reactivation_positions grouped",
        table="reactivation_scores",
        needs=("reactivation_positions",),
        meaning="Cases, positions and shares are those of the positions, which weigh by their own features.",
        offenders=f"""WITH counted AS (
                SELECT layer, if(is_function, 'function', 'content') AS kind, token,
                    count(DISTINCT "case") AS n_cases, count(*) AS n_positions, sum(own) / sum(n_own) AS own,
                    sum(n_own * counterfactual / n_counterfactual) / sum(n_own) AS counterfactual,
                    sum(n_own * unrelated / n_unrelated) FILTER (n_unrelated > 0)
                        / sum(n_own) FILTER (n_unrelated > 0) AS unrelated
                FROM reactivation_positions WHERE n_own > 0
                GROUP BY GROUPING SETS ((layer, kind), (layer, kind, token)))
            SELECT layer, kind, place AS token, a.n_cases, a.n_positions, a.own, a.counterfactual, a.unrelated,
                b.n_cases AS counted_cases, b.n_positions AS counted_positions, b.own AS counted_own,
                b.counterfactual AS counted_counterfactual, b.unrelated AS counted_unrelated
            FROM (SELECT *, coalesce(token, chr(1)) AS place FROM reactivation_scores) AS a
            FULL JOIN (SELECT *, coalesce(token, chr(1)) AS place FROM counted) AS b
                USING (layer, kind, place)
            WHERE a.n_cases IS DISTINCT FROM b.n_cases OR a.n_positions IS DISTINCT FROM b.n_positions
                OR {" OR ".join(_UNEQUAL.format(score) for score in ("own", "counterfactual", "unrelated"))}""",
    ),
    Rows(
        name="reactivation scores are shares with intervals",
        table="reactivation_scores",
        meaning="Shares are between 0 and 1, the excess is their difference, and intervals contain what they are of.",
        must=f"""own BETWEEN 0 AND 1 AND counterfactual BETWEEN 0 AND 1 AND coalesce(unrelated BETWEEN 0 AND 1, true)
            AND abs(excess - (own - counterfactual)) <= 1e-6
            AND (unrelated IS NULL) = (excess_unrelated IS NULL)
            AND (n_cases > 1 OR own_low IS NULL)
            AND {_intervals("own", "counterfactual", "unrelated", "excess", "excess_unrelated")}""",
        show="layer, kind, token, n_cases, own_low, own, own_high, excess_low, excess, excess_high",
    ),
)

_TRAITS: tuple[Expectation, ...] = (
    Keys(
        name="trait layer keys are unique",
        table="trait_layers",
        meaning="A layer of a trait is one row.",
        columns=("trait", "layer"),
    ),
    Query(
        name="each trait has one most informative layer",
        table="trait_layers",
        meaning="It is the one with the largest separation, of equal ones the lowest.",
        offenders="""SELECT trait, layer, separation, best FROM (SELECT *,
                count(*) FILTER (is_most_informative) OVER (PARTITION BY trait) AS best,
                row_number() OVER (PARTITION BY trait ORDER BY separation DESC NULLS LAST, layer) AS place
            FROM trait_layers)
            WHERE best <> 1 OR (separation IS NOT NULL AND is_most_informative <> (place = 1))""",
    ),
    Rows(
        name="trait layers are possible",
        table="trait_layers",
        meaning="Accuracy is a share and explained variance at most 1.",
        must="""coalesce(accuracy BETWEEN 0 AND 1, true) AND coalesce(explained_variance <= 1, true)
            AND coalesce(isfinite(separation), true) AND (separation IS NULL OR n_pairs >= 2)""",
        show="trait, layer, separation, accuracy, explained_variance, n_pairs",
    ),
    Keys(
        name="trait feature keys are unique",
        table="trait_features",
        meaning="A place of a trait and layer is one feature.",
        columns=("trait", "layer", "place"),
    ),
    Query(
        name="trait features are ranked by contribution",
        table="trait_features",
        needs=("trait_layers",),
        meaning="Places count from 1; the features that prompts gave fall in contribution; each is of a trait's layer.",
        offenders="""SELECT trait, layer, place, feature_id, contribution FROM (
                SELECT f.*, l.trait IS NULL AS is_unknown, l.separation IS NOT NULL AS is_found,
                    row_number() OVER ranked AS nth, lag(contribution) OVER ranked AS before,
                    count(*) OVER (PARTITION BY f.trait, f.layer, feature_id) AS times
                FROM trait_features AS f LEFT JOIN trait_layers AS l ON l.trait = f.trait AND l.layer = f.layer
                WINDOW ranked AS (PARTITION BY f.trait, f.layer ORDER BY place))
            WHERE is_unknown OR place <> nth OR times > 1 OR (is_found AND contribution > before)""",
    ),
)

_EXPERIMENTS: tuple[Expectation, ...] = (
    Keys(
        name="steering keys are unique",
        table="steering",
        meaning="A setting of an experiment is one row.",
        columns=('"case"', "prompt", "target", "mode", "place", "control", "draw", "strength"),
    ),
    Rows(
        name="strength 0 changes nothing",
        table="steering",
        meaning="At strength 0 the text and its perplexity are the unsteered model's, and every change is exactly 0.",
        must="""strength <> 0 OR (steered_text = baseline_text AND kl = 0 AND target_logprob_delta = 0
            AND (perplexity IS NULL) = (baseline_perplexity IS NULL)
            AND coalesce(abs(perplexity / baseline_perplexity - 1) <= 1e-3, true))""",
        show='"case", prompt, mode, place, control, draw, kl, target_logprob_delta',
    ),
    Rows(
        name="steering is measured",
        table="steering",
        meaning="Divergences are finite and at least 0, perplexities at least 1; a draw counts from 1, 0 is the trait.",
        must="""isfinite(kl) AND kl >= -1e-5 AND isfinite(target_logprob_delta) AND target_logprob <= 1e-5
            AND coalesce(perplexity >= 1 - 1e-6, true) AND (control = 'trait') = (draw = 0)
            AND control IN ('trait', 'random') AND (place = 'all positions') = (position IS NULL)
            AND len(feature_ids) > 0""",
        show='"case", prompt, mode, place, control, draw, strength, kl, target_logprob, perplexity, feature_ids',
    ),
    Query(
        name="an experiment has one baseline",
        table="steering",
        meaning="All settings of an experiment compare with one log-probability of the target, but for rounding.",
        offenders="""SELECT "case", prompt, target, min(target_logprob) AS least, max(target_logprob) AS most
            FROM steering GROUP BY ALL HAVING (most - least <= 1e-3 * (1 - least)) IS NOT TRUE""",
    ),
    Keys(
        name="steering effect keys are unique",
        table="steering_effects",
        meaning="A setting is one row.",
        columns=("mode", "place", "control", "strength"),
    ),
    Query(
        name="steering_effects = steering grouped",
        table="steering_effects",
        needs=("steering",),
        meaning="Means are over the experiments, random draws of one averaged first.",
        offenders=f"""WITH each AS (SELECT mode, place, control, strength, "case", prompt, target,
                avg(target_logprob_delta) AS target_logprob_delta, avg(kl) AS kl FROM steering GROUP BY ALL),
            counted AS (SELECT mode, place, control, strength, count(*) AS n,
                avg(target_logprob_delta) AS target_logprob_delta, avg(kl) AS kl FROM each GROUP BY ALL)
            SELECT mode, place, control, strength, a.n, a.target_logprob_delta, a.kl, b.n AS counted_n,
                b.target_logprob_delta AS counted_delta, b.kl AS counted_kl
            FROM steering_effects AS a FULL JOIN counted AS b USING (mode, place, control, strength)
            WHERE a.n IS DISTINCT FROM b.n
                OR {" OR ".join(_UNEQUAL.format(effect) for effect in ("target_logprob_delta", "kl"))}""",
    ),
    Rows(
        name="steering effects have intervals",
        table="steering_effects",
        meaning="Intervals contain what they are of; the advantage is over random features, so these have none.",
        must=f"""(n > 1 OR kl_low IS NULL) AND changed BETWEEN 0 AND 1 AND (control = 'trait' OR advantage IS NULL)
            AND {_intervals("target_logprob_delta", "advantage", "kl", "log_perplexity_delta")}""",
        show="mode, place, control, strength, n, target_logprob_delta, advantage, kl, log_perplexity_delta, changed",
    ),
    Query(
        name="settings are of the same experiments",
        table="steering_effects",
        meaning="Each control and place counts as many experiments at every strength and in every mode.",
        offenders=differ(
            "SELECT mode, place, control, strength, n FROM steering_effects",
            """SELECT mode, place, control, strength, max(n) OVER (PARTITION BY place, control) AS n
            FROM steering_effects""",
            "mode, place, control, strength",
            "n",
        ),
    ),
)

STEERING_TABLES: tuple[Expectation, ...] = _REACTIVATION + _TRAITS + _EXPERIMENTS
