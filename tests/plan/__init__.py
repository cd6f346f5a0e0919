"""Tests of `dsv3_jax.plan`."""
