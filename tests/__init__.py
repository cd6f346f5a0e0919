"""The tests, laid out as `dsv3_jax/` is: tests/model/test_moe_router.py holds dsv3_jax/model/moe.py to its word."""
