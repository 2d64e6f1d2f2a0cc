"""Readers of weights that others published: one file per family, safe reading of every container."""
