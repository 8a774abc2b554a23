-- What is still known of a context at a budget, and under the full cache.
SELECT * FROM retention_retrieval WHERE budget = $budget OR policy = 'full' ORDER BY task, length, policy, depth
