-- One row a reading: what is paired with another policy's reading of the same sequence. Means over layers are taken in
-- the order of layers, so that they are equal to the bit.
WITH layered AS (
  SELECT folder,
         avg(retained_mass ORDER BY layer) AS retained_mass,
         avg(CASE WHEN error > 0 AND local_error > 0 THEN ln(error / local_error) END ORDER BY layer) AS log_carried,
         arg_max(error, layer) AS last_error,
         avg(key_similarity ORDER BY layer) AS key_similarity,
         avg(full_key_similarity ORDER BY layer) AS full_key_similarity
  FROM shard_reading_layers GROUP BY folder
)
SELECT r.policy, r.budget, r.protocol, r.length, r.sequence, s.n,
       CAST(s.loss_units - s.full_loss_units AS DOUBLE) / 4294967296 AS delta_nll_sum,
       CAST(s.kl_units AS DOUBLE) / 4294967296 AS kl_sum,
       s.agreed,
       l.retained_mass, l.log_carried, l.last_error, l.key_similarity, l.full_key_similarity
FROM readings AS r
JOIN shard_reading_sums AS s USING (folder)
LEFT JOIN layered AS l USING (folder)
ORDER BY r.length, r.protocol, r.policy, r.budget, r.sequence
