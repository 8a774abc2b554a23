-- Decoding speed at a budget.
SELECT * FROM retention_speed WHERE budget = $budget ORDER BY length, policy
