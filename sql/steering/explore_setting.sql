-- What one setting does, to the trait's features and to random ones.
SELECT * FROM steering_effects
WHERE mode = $mode AND place = $place AND strength = $strength
ORDER BY control DESC
