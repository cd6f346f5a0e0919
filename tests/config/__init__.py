"""Tests of `dsv3_jax.config`."""
