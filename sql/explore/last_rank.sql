-- The rank of the last token in the graph.
SELECT max(rank) FROM token_degree
