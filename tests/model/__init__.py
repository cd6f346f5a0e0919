"""Tests of `dsv3_jax.model`."""
