"""The tests, laid out as `dsv3_jax/` is: tests/model/test_router.py holds dsv3_jax/model/router.py to its word."""
