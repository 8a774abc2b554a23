-- What steering does, with the setting's control and place in one column.
SELECT *, control || ', ' || place AS setting
FROM steering_effects
ORDER BY mode, place <> 'last function token', place, control DESC, strength
