"""Tests of `dsv3_jax.kernels`."""
