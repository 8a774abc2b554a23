"""Sparse autoencoders: fetched, read or trained, and what they are trained on."""
