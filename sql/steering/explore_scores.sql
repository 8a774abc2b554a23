-- Reactivation by layer: all of a kind of token before single tokens.
SELECT * FROM reactivation_scores ORDER BY layer, kind DESC, token NULLS FIRST
