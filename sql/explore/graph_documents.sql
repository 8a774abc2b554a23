-- The documents whose features were read are the first so many; none where the run does not say.
SELECT CAST(value AS BIGINT) FROM run_info WHERE key = 'graph_documents'
