-- Where a feature is active: its largest activations, and some of each decile of them.
SELECT kind, place, doc_id, position, token_id, activation
FROM feature_examples
WHERE layer = $layer AND feature_id = $feature_id
ORDER BY kind, place
