"""Packed numbers against arithmetic on one large whole number."""

import numpy as np
import pytest

from efficient_nets.ops import packing


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 1, 1), (0,)])
def test_packing_is_a_number_in_base_two_to_the_bits(bits, shape):
    values = np.random.default_rng(bits).integers(0, 2**bits, shape)
    packed = packing.pack(values, bits)
    number = sum(int(value) << (bits * i) for i, value in enumerate(values.ravel()))
    assert int.from_bytes(packed.tobytes(), "little") == number
    assert packed.shape == (packing.packed_size(values.size, bits),)
    found = packing.unpack(packed, bits, shape)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values)


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="-1 to 2 do not fit 2 bits"):
        packing.pack(np.array([-1, 2]), 2)
    with pytest.raises(ValueError, match="to 4 do not fit 2 bits"):
        packing.pack(np.array([0, 4]), 2)
    with pytest.raises(ValueError, match="5 numbers of 2 bits"):
        packing.unpack(np.zeros(3, np.uint8), 2, (5,))
