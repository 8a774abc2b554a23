-- The tokens that each feature of one layer promotes and suppresses most, if its decoder direction alone is read by the
-- model's head: the logit lens, with the weight of the final norm folded in, without its scale, and without the biases,
-- scaling and soft capping of the logits. Of every feature of the dictionary, activated or not.
SELECT $layer::INTEGER AS layer, feature_id, sign, place, token_id, token, logit
FROM extreme_logits
JOIN vocabulary USING (token_id)
ORDER BY feature_id, sign, place
