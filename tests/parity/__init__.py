"""Comparison with transformers, live."""
