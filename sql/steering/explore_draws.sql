-- What the draws of random features made of the texts, in one setting.
SELECT "case", prompt, target, draw, baseline_text, steered_text, target_logprob_delta
FROM steering
WHERE control = 'random' AND mode = $mode AND place = $place AND strength = $strength
ORDER BY "case", prompt, target, draw
