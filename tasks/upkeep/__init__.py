"""Upkeep of a root: what is damaged, and what nothing reaches."""
