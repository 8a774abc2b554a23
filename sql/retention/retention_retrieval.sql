-- Log-probabilities are added as multiples of 2^-32, so that the order of prompts changes nothing.
WITH answers AS (
  SELECT *, CAST(round(answer_logprob * 4294967296) AS HUGEINT) AS units FROM shard_retrieval_answers
),
paired AS (
  SELECT a.policy, a.budget, a.task, a.length, a.depth, a.exact_match, a.units,
         f.exact_match AS full_exact_match, f.units AS full_units
  FROM answers AS a
  JOIN answers AS f ON f.policy = 'full' AND f.task = a.task AND f.length = a.length AND f.depth = a.depth
    AND f.number = a.number
),
solved AS (
  SELECT task, length, avg(CAST(exact_match AS INTEGER)) >= 0.9 AS counts
  FROM answers WHERE policy = 'full' GROUP BY task, length
)
SELECT p.policy, p.budget, p.task, p.length, p.depth, count(*)::BIGINT AS n,
       avg(CAST(p.full_exact_match AS INTEGER)) AS full_exact_match,
       avg(CAST(p.exact_match AS INTEGER)) AS exact_match,
       CAST(sum(p.units) AS DOUBLE) / 4294967296 / count(*) AS answer_logprob,
       CAST(sum(p.full_units) AS DOUBLE) / 4294967296 / count(*) AS full_answer_logprob,
       any_value(s.counts) AS counts
FROM paired AS p
JOIN solved AS s USING (task, length)
GROUP BY p.policy, p.budget, p.task, p.length, p.depth
ORDER BY p.task, p.length, p.policy, p.budget, p.depth
