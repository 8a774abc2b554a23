-- What a feature's decoder direction promotes, or suppresses.
SELECT place, token_id, token, logit
FROM feature_logits
WHERE layer = $layer AND feature_id = $feature_id AND sign = $sign
ORDER BY place
