"""Experiment: losses and features along pre-training (PAPER 1.4)."""
