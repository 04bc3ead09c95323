"""What `--cases` leaves of the cases of a test."""

import pytest

from tests.conftest import spread


@pytest.mark.parametrize(
    "most, kept",
    [(0, range(9)), (1, [0]), (2, [0, 8]), (3, [0, 4, 8]), (9, range(9)), (20, range(9))],
)
def test_cases_are_spread_from_the_first_to_the_last(most, kept):
    assert spread(list(range(9)), most) == list(kept)


@pytest.mark.parametrize("most", range(2, 40))
def test_no_case_is_kept_twice(most):
    assert len(set(spread(list(range(40)), most))) == most
