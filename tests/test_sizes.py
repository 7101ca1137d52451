import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockswap.errors import ConfigError
from blockswap.sizes import UNIT_BYTES, format_bytes, has_unit, parse_fraction, parse_size

NUM_BYTES = st.integers(0, 2**62)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("10GiB", 10 * 2**30),
        ("10 GB", 10 * 10**9),
        ("1.5 gib", 3 * 2**29),
        (" 512MiB ", 512 * 2**20),
        (".5KiB", 512),
        ("4gb", 4 * 10**9),
        ("4096B", 4096),
        ("4096", 4096),
        ("2TiB", 2**41),
        ("0.1B", 0),
        (12345, 12345),
        (0, 0),
    ],
)
def test_sizes_people_write_are_read(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "junk",
    [
        *(
            "",
            " ",
            "GiB",
            "ten GiB",
            "-1GiB",
            "1e3GiB",
            "nanGiB",
            "infGB",
            "10 XB",
            "1.5",
            "1,5GiB",
        ),
        *("1GiB2", "0x10B", "10GiB;", "١٠GiB", "9" * 400 + "B", "9" * 5000, "9999999999TiB", "10G"),
        *(-1, True, False, None, 1.5, float("nan"), float("inf"), b"1GiB", [1], 2**63),
    ],
)
def test_junk_is_refused_with_what_was_given_and_what_is_accepted(junk):
    with pytest.raises(ConfigError, match="10GiB") as error:
        parse_size(junk, "vram")
    assert str(error.value).startswith(f"vram={junk!r}")


@given(NUM_BYTES)
def test_bytes_written_with_a_unit_of_bytes_come_back_exactly(num_bytes):
    assert parse_size(f"{num_bytes}B") == num_bytes
    assert parse_size(str(num_bytes)) == num_bytes


@given(st.integers(0, 2**62))
def test_formatted_bytes_parse_back_to_within_the_digits_shown(num_bytes):
    text = format_bytes(num_bytes)
    unit_bytes = UNIT_BYTES[text.split()[1].lower()]
    assert abs(parse_size(text) - num_bytes) <= unit_bytes * 0.05 + 1


@given(st.integers(0, 2**40), st.sampled_from(sorted(UNIT_BYTES)))
def test_whole_numbers_of_every_unit_are_exact(count, unit):
    total = count * UNIT_BYTES[unit]
    if total < 2**63:
        assert parse_size(f"{count}{unit.upper()}") == total
        assert has_unit(f"{count} {unit}")


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_never_anything_else(text):
    try:
        assert 0 <= parse_size(text) < 2**63
    except ConfigError:
        pass


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (64 * 2**20, "64.0 MiB"),
        (5 * 2**28, "1.25 GiB"),
        (3 * 2**41, "6.00 TiB"),
        (2**52, "4096.00 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_are_written_as_cpp_writes_them(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "share"),
    [("80%", 0.8), ("0.8", 0.8), (" 12.5 %", 0.125), ("10GiB", None), ("8", None), ("%", None)],
)
def test_shares_are_told_from_sizes(text, share):
    assert parse_fraction(text) == share
