-- How large a feature's activations are.
SELECT bin, low, high, n FROM feature_histogram WHERE layer = $layer AND feature_id = $feature_id ORDER BY bin
