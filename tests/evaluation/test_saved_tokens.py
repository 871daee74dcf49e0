"""Token values keep three digits when they are packed; data of other kinds unpacks to None."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_disco.evaluation.saved_tokens import pack_values, pack_widths, unpack_values, unpack_widths


def test_values_are_restored_to_three_digits() -> None:
    values = np.array([0.0, 1.0, -0.123456, 7e-4, -2000.4, 1e9])
    again = unpack_values(pack_values(values), 6)
    assert again is not None
    np.testing.assert_allclose(again[:5], values[:5], rtol=5e-4)
    assert again[5] == 65504  # the largest number of half precision, instead of infinity


def test_equal_values_are_packed_as_one_number() -> None:
    assert pack_values([-0.78123, -0.78123, -0.7812301]) == -0.781
    assert pack_values([0.0, 0.0]) == 0.0
    np.testing.assert_array_equal(unpack_values(-0.781, 3), [-0.781] * 3)
    assert isinstance(pack_values([1.0, 1.01]), str)


def test_widths_of_any_size_are_restored() -> None:
    assert unpack_widths(pack_widths([3, 0, 1, 4096])) == [3, 0, 1, 4096]
    assert unpack_widths(pack_widths([])) == []


@pytest.mark.parametrize("odd", [None, "no base64!", [1, 2], {"a": 1}, "AA=="])
def test_other_data_unpacks_to_none(odd: object) -> None:
    assert unpack_widths(odd) is None and unpack_values(odd, 2) is None


def test_values_of_another_count_unpack_to_none() -> None:
    assert unpack_values(pack_values([1.0, 2.0]), 3) is None
