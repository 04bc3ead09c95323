import itertools

import jax
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.models.space import Space

SMALL = Space(nodes=2, precisions=("ternary", "float"))


def test_size_counts_every_architecture():
    tiny = Space(nodes=1, ops=("a", "b"), precisions=("x", "y", "z"))
    ranges = [range(n) for n in tiny.choices.flat]
    assert tiny.size == sum(1 for _ in itertools.product(*ranges))
    assert Space(nodes=1, ops=("a", "b"), precisions=("x", "y"), shared_precision=True).size == 512
    # 5.06e12 cells of the source's space.
    assert Space().size == ((2 * 3 * 4 * 5 * 6) ** 2 * 5**10) ** 2


def test_strings_are_those_of_the_source():
    space = Space(nodes=2)
    text = "[0 2 0 0 0 4 1 1] [1 0 0 0 2 1 2 2]"
    found = space.parse(text)
    assert found[0, 1, 0].tolist() == [0, 4, 0] and found[1, 1, 1].tolist() == [2, 2, 0]
    assert " ".join(space.lists(found)) == text
    np.testing.assert_array_equal(space.parse(space.text(found)), found)
    np.testing.assert_array_equal(space.parse(text.replace(" ", ", ")), found)


def test_strings_carry_precisions():
    found = np.asarray(SMALL.random(jax.random.key(3)))
    assert len(set(found[..., 2].flat)) > 1
    np.testing.assert_array_equal(SMALL.parse(SMALL.text(found)), found)
    assert len(SMALL.text(found).split()) == 24


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0 1 2", "arc has 3 numbers: 2 nodes in each of two cells need 16, or 24 with precisions"),
        ("0 0 0 0 3 0 0 0 " + "0 " * 8, "input 3 of operand 1 of node 1 of the normal cell: it"),
        ("0 " * 9 + "5 " + "0 " * 6, "op 5 of operand 1 of node 0 of the reduction cell: it must"),
        ("0 " * 23 + "2", "precision 2 of operand 2 of node 1 of the reduction cell: it must be 0"),
        ("0 -1", "'-' is in it"),
        # 2^32, and what no integer of a machine holds.
        ("4294967296 " + "0 " * 15, "arc: 4294967296 is in it, which no input, op or precision"),
        ("9" * 5000 + " 0" * 15, "arc: 99999999999999999999 is in it"),
    ],
)
def test_bad_strings_say_what_is_wrong(text, part):
    with pytest.raises(UserError, match=part):
        SMALL.parse(text)


def test_random_reaches_every_token_evenly():
    found = np.stack(jax.vmap(SMALL.random)(jax.random.split(jax.random.key(0), 4000)))
    for place in np.ndindex(SMALL.shape):
        number = SMALL.choices[place]
        counts = np.bincount(found[(slice(None), *place)], minlength=number)
        # Five standard deviations of a count of 4,000 draws.
        assert len(counts) == number and np.abs(counts - 4000 / number).max() < 5 * 32


def test_one_precision_is_shared():
    shared = Space(nodes=2, precisions=("a", "b", "c"), shared_precision=True)
    found = np.stack(jax.vmap(shared.random)(jax.random.split(jax.random.key(0), 50)))
    assert all(len(set(one[..., 2].flat)) == 1 for one in found)
    assert set(found[..., 2].flat) == {0, 1, 2}
    with pytest.raises(UserError, match="several precisions"):
        shared.check(np.arange(24).reshape(shared.shape) % 2)


def test_loose_ends_are_what_no_node_reads():
    space = Space(nodes=3)
    found = space.parse("0 0 1 0 2 0 2 0 0 0 0 0  0 0 1 0 0 0 0 0 1 1 1 1")
    np.testing.assert_array_equal(
        np.asarray(space.unused(found)), [[False, True, True], [True, True, True]]
    )


def test_uniform_probabilities_are_those_of_a_random_architecture():
    for values, number in zip(SMALL.uniform, np.moveaxis(SMALL.choices, -1, 0), strict=True):
        assert values.dtype == np.float32
        for place, count in np.ndenumerate(number):
            expected = [1 / count] * count + [0] * (values.shape[-1] - count)
            np.testing.assert_allclose(values[place], expected, rtol=1e-6)
