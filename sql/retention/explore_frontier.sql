-- What every policy and budget costs, in one setting.
SELECT * FROM retention WHERE length = $length AND protocol = $protocol ORDER BY budget, policy
