-- What the run says of itself.
SELECT key, value FROM run_info ORDER BY key, value
