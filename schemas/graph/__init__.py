"""What must hold of the token-feature graph (PAPER 1.2)."""
