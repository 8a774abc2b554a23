"""The token-feature graph: which token activates which feature (PAPER 1.2)."""
