"""Tests of `dsv3_jax.train`."""
