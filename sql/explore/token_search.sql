-- Tokens by what somebody typed: an id, or a text as it stands ($typed) or as tokens are shown here ($meant: ␣ and \n are
-- read). The whole text comes before its beginning, and that before a part of it; blanks around it ($word is without)
-- and upper case make less of a match.
WITH matched AS (
    SELECT
        *,
        CASE
            WHEN token IN ($typed, $meant) OR token_id = $token_id THEN 1
            WHEN $word = '' THEN if(contains(token, $meant), 6, NULL)
            WHEN trim(token) = $word THEN 2
            WHEN lower(trim(token)) = lower($word) THEN 3
            WHEN starts_with(token, $meant) OR starts_with(ltrim(token), $word) THEN 4
            WHEN starts_with(lower(ltrim(token)), lower($word)) THEN 5
            WHEN contains(token, $word) THEN 6
            WHEN contains(lower(token), lower($word)) THEN 7
        END AS place
    FROM tokens
)
SELECT
    place,
    CASE
        WHEN place > 1 THEN
            ['but for blanks', 'but for case', 'begins so', 'begins so, but for case', 'contains it',
                'contains it, but for case'][place - 1]
        WHEN token IN ($typed, $meant) THEN 'the text itself'
        ELSE 'its id'
    END AS match,
    rank,
    token_id,
    token,
    count,
    doc_share,
    if(is_function, 'function', 'content') AS kind
FROM matched
WHERE place IS NOT NULL
ORDER BY place, rank
