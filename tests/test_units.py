"""Sizes, rates and durations: exact in, honest out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.units import GIB, KIB, MIB, format_duration, format_rate, format_size, format_size_both, parse_size


@pytest.mark.parametrize(
    "size,text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1049, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (999_999, "1.0 MB"),
        (1_000_000, "1.0 MB"),
        (999_949_999, "999.9 MB"),
        (999_999_999, "1.0 GB"),
        (14_483_464_192, "14.5 GB"),
        (93_405_585_408, "93.4 GB"),
        (10**12, "1.0 TB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 10**15))
def test_no_size_is_shown_as_a_thousand_of_a_unit_or_off_by_more_than_rounding(size: int) -> None:
    number, unit = format_size(size).split()
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(number) < 1000 or unit == "TB"
    assert abs(float(number) * factor - size) <= 0.0501 * factor


@pytest.mark.parametrize(
    "size,text",
    [
        (14_483_464_192, "14.48 GB (13.49 GiB)"),
        (93_405_585_408, "93.41 GB (86.99 GiB)"),
        (4 * MIB, "4.2 MB"),
        (10**8, "0.10 GB (0.09 GiB)"),
    ],
)
def test_format_size_both(size: int, text: str) -> None:
    assert format_size_both(size) == text


@pytest.mark.parametrize(
    "rate,text",
    [(112_000_000, "112.0 MB/s"), (0, "0 B/s"), (0.4, "0 B/s"), (math.inf, "unknown"), (math.nan, "unknown")],
)
def test_format_rate(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (10**6, "277h46m"),
        (math.inf, "unknown"),
        (math.nan, "unknown"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "text,size",
    [
        ("0", 0),
        ("500", 500),
        (" 500 B ", 500),
        ("1.5GB", 1_500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("4MiB", 4 * MIB),
        ("4mib", 4 * MIB),
        ("1KiB", KIB),
        ("1 GiB", GIB),
        ("1k", 1000),
        ("10MB/s", 10_000_000),
        ("10M/s", 10_000_000),
        ("10MBps", 10_000_000),
        ("0.5", 0),
        ("1.9999", 1),
        ("9007199254740993", 9_007_199_254_740_993),
        ("0.000000001GB", 1),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "GB", "-1", "+1", "1e9", "1,5GB", ".5GB", "1.GB", "1 G B", "1PB", "0x10", "1/s/s", "1_000"),
        *("\u0663", "1\u212a", "1\u017f", "9" * 400, "1" * 5000, "nan", "inf", "1GB extra", "1\n2"),
    ],
)
def test_what_is_no_size_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["100Mbps", "1gbps", "8bps"])
def test_bits_are_not_taken_for_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="bits or bytes"):
        parse_size(text)


@given(st.integers(0, 10**18 - 1))
def test_whole_numbers_are_read_exactly(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}MiB") == size * MIB


@given(st.text(alphabet="0123456789. kKmMgGtTiIbB/sps-+eE\n٣", max_size=12))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert size >= 0
    assert text.strip()[0].isdigit()
