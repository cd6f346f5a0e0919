"""Tests of `dsv3_jax.parallel`."""
