"""Tests of the programs: train.py, infer.py and `python -m dsv3_jax.evaluate`."""
