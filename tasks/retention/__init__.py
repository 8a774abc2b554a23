"""Experiment: which tokens must a model keep? Structured token retention against the field's baselines (PAPER 2)."""
