"""Experiment: reactivation of features at function tokens, and steering by them (PAPER 1.3)."""
