"""What must hold of the cases that reactivation has read (PAPER 1.3).

Views of the `reactivation` suite: `shards` (one row a case that was read), `layer_shards` (one a case and layer),
`wanted` (the prompts of the cases' file), `dictionaries`, `vocabulary`, and of all folders together `prompt_tokens` (of
`shards`) and `prompt_features` (of `layer_shards`; cases of the same prompts share them), with their `folder` and
`file_row`, the row's number in its file.
"""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows

REACTIVATION: tuple[Expectation, ...] = (
    Query(
        name="every case has its folder",
        table="shards",
        needs=("wanted",),
        meaning="The cases of the file are the cases that were read, each once, and each is committed.",
        offenders="""SELECT "case", w."case" IS NOT NULL AS is_wanted, coalesce(s.folders, 0) AS folders, s.committed
            FROM (SELECT DISTINCT "case" FROM wanted) AS w FULL JOIN (SELECT "case", count(*) AS folders,
                bool_and(committed) AS committed FROM shards GROUP BY "case") AS s USING ("case")
            WHERE (w."case" IS NOT NULL AND s.folders = 1 AND s.committed) IS NOT TRUE""",
    ),
    Query(
        name="every layer of a case has its folder",
        table="layer_shards",
        needs=("wanted", "dictionaries"),
        meaning="A case has the features of each layer that has a dictionary, each once, and each is committed.",
        offenders="""SELECT "case", layer, w."case" IS NOT NULL AS is_wanted, coalesce(s.folders, 0) AS folders,
                s.committed
            FROM (SELECT DISTINCT "case", layer FROM wanted, dictionaries) AS w FULL JOIN (SELECT "case", layer,
                count(*) AS folders, bool_and(committed) AS committed FROM layer_shards GROUP BY ALL) AS s
            USING ("case", layer) WHERE (w."case" IS NOT NULL AND s.folders = 1 AND s.committed) IS NOT TRUE""",
    ),
    Query(
        name="every prompt is read",
        table="prompt_tokens",
        needs=("shards", "wanted"),
        meaning="A case's tokens are those of its own prompts, under its name and relation, and of each of them.",
        offenders="""SELECT folder, "case", relation, prompt, w.folder IS NOT NULL AS is_wanted,
                t.folder IS NOT NULL AS is_there
            FROM (SELECT DISTINCT folder, "case", relation, prompt FROM wanted JOIN shards USING ("case")) AS w
            FULL JOIN (SELECT DISTINCT folder, "case", relation, prompt FROM prompt_tokens) AS t
            USING (folder, "case", relation, prompt) WHERE w.folder IS NULL OR t.folder IS NULL""",
    ),
    Query(
        name="tokens are all there",
        table="shards",
        needs=("prompt_tokens",),
        meaning="A case has the tokens that its manifest says.",
        offenders="""SELECT folder, "case", n_tokens, found_tokens FROM shards
            LEFT JOIN (SELECT folder, count(*) AS found_tokens FROM prompt_tokens GROUP BY folder) USING (folder)
            WHERE n_tokens IS DISTINCT FROM coalesce(found_tokens, 0)""",
    ),
    Query(
        name="positions ascend",
        table="prompt_tokens",
        meaning="A prompt's tokens stand at positions from 0, each once, in their order.",
        offenders="""SELECT * FROM (SELECT folder, prompt, position, token,
                lag(position, 1, -1) OVER (PARTITION BY folder, prompt ORDER BY file_row) AS position_before
            FROM prompt_tokens) WHERE (position > position_before) IS NOT TRUE""",
    ),
    Query(
        name="prompt tokens are the tokenizer's",
        table="prompt_tokens",
        needs=("vocabulary",),
        meaning="Every token of a prompt is in the vocabulary, and is shown as text.",
        offenders="""SELECT folder, prompt, position, p.token_id, p.token FROM prompt_tokens AS p
            LEFT JOIN vocabulary AS v USING (token_id) WHERE v.token_id IS NULL OR p.token IS NULL""",
    ),
    Query(
        name="prompts differ in one place alone",
        table="prompt_tokens",
        meaning="Outside the place where a case's prompts differ, all of them have the same tokens.",
        offenders="""SELECT * FROM (SELECT folder, "case", position, list(DISTINCT token ORDER BY token) AS tokens,
                count(*) AS prompts, any_value(all_prompts) AS all_prompts
            FROM prompt_tokens JOIN (SELECT folder, count(DISTINCT prompt) AS all_prompts FROM prompt_tokens
                GROUP BY folder) USING (folder)
            WHERE NOT in_place GROUP BY folder, "case", position
            HAVING count(DISTINCT token_id) > 1 OR count(*) <> any_value(all_prompts))""",
    ),
    Query(
        name="what is looked at comes later",
        table="prompt_tokens",
        meaning="Tokens that are looked at stand after the place where their case's prompts differ.",
        offenders="""SELECT folder, prompt, position, token, in_place, last_in_place FROM prompt_tokens
            LEFT JOIN (SELECT folder, max(position) AS last_in_place FROM prompt_tokens WHERE in_place
                GROUP BY folder) USING (folder)
            WHERE (NOT looked_at OR (NOT in_place AND position > coalesce(last_in_place, position - 1))) IS NOT TRUE""",
    ),
    Keys(
        name="prompt feature keys are unique",
        table="prompt_features",
        meaning="A position of a prompt activates a feature of a layer once.",
        columns=("folder", "prompt", "layer", "position", "feature_id"),
    ),
    Rows(
        name="prompt activations are positive",
        table="prompt_features",
        meaning="An activation is above 0 and finite.",
        must="activation > 0 AND isfinite(activation)",
        show="folder, prompt, position, layer, feature_id, activation",
    ),
    Query(
        name="prompt features are in the dictionaries",
        table="prompt_features",
        needs=("layer_shards", "dictionaries"),
        meaning="Every feature is of its folder's layer, and 0 ≤ feature_id < latents.",
        offenders="""SELECT folder, prompt, position, layer, feature_id, d_sae FROM prompt_features
            LEFT JOIN (SELECT DISTINCT folder, layer, d_sae FROM layer_shards JOIN dictionaries USING (layer))
                USING (folder, layer)
            WHERE (feature_id BETWEEN 0 AND d_sae - 1) IS NOT TRUE""",
    ),
    Query(
        name="features are of tokens",
        table="prompt_features",
        needs=("layer_shards", "prompt_tokens"),
        meaning="Features are active at tokens of their case's prompts; special tokens have none.",
        offenders="""SELECT folder, "case", prompt, position, layer, feature_id
            FROM prompt_features JOIN (SELECT "case", folder FROM layer_shards) USING (folder)
            ANTI JOIN prompt_tokens USING ("case", prompt, position)""",
    ),
)
