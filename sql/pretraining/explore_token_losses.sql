-- What was lost at each token of a window of a document: nats, predicted from the tokens before it.
SELECT position, loss AS value
FROM token_losses_in([$doc_id])
WHERE doc_id = $doc_id AND position BETWEEN $first AND $last AND model = $model AND step = $step
ORDER BY position
