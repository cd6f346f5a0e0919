"""Tests of `dsv3_jax.data`."""
