"""Numbers as people read them."""

from __future__ import annotations

import pytest

from dsv3_jax.train.report import humanize, in_time


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (980, "980"),
        (999.6, "1K"),
        (1000, "1K"),
        (1234567, "1.2M"),
        (3_276_800, "3.3M"),
        (99_960, "100K"),
        (123_456, "123K"),
        (999_960, "1M"),
        (14.8e12, "14.8T"),
        (999e12, "999T"),
        (5e16, "5e+16"),
        (-2500, "-2.5K"),
        (0.5, "0.5"),
    ],
)
def test_counts(number: float, text: str) -> None:
    assert humanize(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (3600, "60 min"), (7200, "2.0 h"), (86400, "24.0 h"), (259200, "3.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


def test_more_decimals() -> None:
    assert [humanize(number, 2) for number in (1250, 12_750, 127_500, 1000)] == ["1.25K", "12.75K", "128K", "1K"]
