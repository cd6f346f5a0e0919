"""Tests of `dsv3_jax.checkpoint`."""
