"""What `--part` leaves of the tests, and `--cases` of the cases of one."""

import pytest

from tests.conftest import part, spread


@pytest.mark.parametrize(
    "most, kept",
    [(0, range(9)), (1, [0]), (2, [0, 8]), (3, [0, 4, 8]), (9, range(9)), (20, range(9))],
)
def test_cases_are_spread_from_the_first_to_the_last(most, kept):
    assert spread(list(range(9)), most) == list(kept)


@pytest.mark.parametrize("most", range(2, 40))
def test_no_case_is_kept_twice(most):
    assert len(set(spread(list(range(40)), most))) == most


def test_parts_are_all_tests_once_and_of_like_size():
    tests = list(range(10))
    parts = [part(tests, f"{index}/3") for index in range(3)]
    assert sorted(sum(parts, [])) == tests and {len(found) for found in parts} == {3, 4}
    assert part(tests, "5/3") == parts[2] and part(tests, "0/1") == tests


@pytest.mark.parametrize("text", ["3", "1/0", "-1/3", "a/b", "1/3/5", ""])
def test_a_part_that_is_none(text):
    with pytest.raises(pytest.UsageError, match=f"--part={text}: must be I/K"):
        part([], text)
