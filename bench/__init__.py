"""Benchmarks, side by side in one run: `make bench`; README.md keeps what they gave."""
