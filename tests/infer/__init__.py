"""Tests of `dsv3_jax.infer`."""
