-- The tokens before and after a rank.
SELECT rank, token_id, token FROM tokens WHERE rank IN ($rank - 1, $rank + 1) ORDER BY rank
