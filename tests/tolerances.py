"""Tolerances between two float computations of the same values, by dtype.

The only such table; docs/numerics.md says where the numbers come from, and gets a line when one is loosened.
"""

from __future__ import annotations

TOLERANCE = {
    "float32": {"rtol": 1e-5, "atol": 2e-5},
    "bfloat16": {"rtol": 2e-2, "atol": 2e-2},
}
"""Arguments of `chex.assert_trees_all_close`, for values of about unit size: `**TOLERANCE["float32"]`."""
