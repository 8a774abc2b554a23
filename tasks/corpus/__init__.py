"""Documents to token shards: reading, tokenizing, counting, cutting into windows (PAPER 1.1)."""
