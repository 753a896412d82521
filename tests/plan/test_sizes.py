"""Amounts in and out of words."""

import pytest

from moestro.errors import ConfigError
from moestro.plan.sizes import bytes_text, flops_text, number_text, parameters_text, parse_bytes


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("80GB", 80 * 10**9),
        (" 1.5 tib ", 3 * 2**39),
        ("512 MB", 512 * 10**6),
        ("7b", 7),
    ],
)
def test_memory_is_read(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "24", "lots", "GiB", "-3GB", "0GB", "1e3GB", "24GiBs", "nan"])
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError, match="24GiB or 80GB"):
        parse_bytes(text)


def test_three_digits():
    assert [parameters_text(n) for n in (0, 999, 46_702_792_704, 1.5713e12, 999_960)] == [
        "0", "999", "46.7B", "1.57T", "1.00M",
    ]  # fmt: skip
    assert [bytes_text(n) for n in (1023, 2**30, 87 * 2**30, 1000 * 2**30)] == [
        "1.00 KiB", "1.00 GiB", "87.0 GiB", "0.98 TiB",
    ]  # fmt: skip
    assert flops_text(350e9) == "350 GFLOP"
    assert [number_text(n) for n in (37_607.2, 4.316, 0.01476)] == ["37,607", "4.32", "0.0148"]
