"""Tests of `dsv3_jax.serve`."""
