"""Histograms against NumPy's, with values that are not finite, alike, or none."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets import analysis


def test_it_is_numpys_of_the_finite_values():
    x = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    x[0, :4] = np.nan, np.inf, -np.inf, np.nan
    finite = x[np.isfinite(x)]
    found = analysis.histogram(x)
    counts, edges = np.histogram(finite.astype(np.float64), 64)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(found.edges, edges)
    assert (found.counts.sum(), found.nonfinite) == (1196, 4)
    # Sums in float64 of float32 values.
    np.testing.assert_allclose([found.mean, found.std], [finite.mean(), finite.std()], rtol=1e-5)


@pytest.mark.parametrize("x", [[], [np.nan], [2.5, 2.5], [1.0, np.nextafter(np.float32(1), 2)]])
def test_few_and_equal_values(x):
    found = analysis.histogram(np.asarray(x, np.float32))
    assert found.counts.sum() == np.isfinite(x).sum()
    assert np.all(np.diff(found.edges) > 0) and np.isfinite([found.mean, found.std]).all()


def test_bfloat16_is_taken():
    found = analysis.histogram(jnp.asarray([-1.0, 0.0, 3.0], jnp.bfloat16))
    assert (found.edges[0], found.edges[-1], found.counts.sum()) == (-1, 3, 3)


def test_quantiles_are_those_of_the_values_but_for_a_bin():
    x = np.random.default_rng(0).gamma(2.0, size=10_000)
    found = analysis.histogram(x)
    shares = [0.0, 0.05, 0.25, 0.5, 0.95, 1.0]
    width = found.edges[1] - found.edges[0]
    np.testing.assert_allclose(found.quantiles(shares), np.quantile(x, shares), atol=width)
    assert found.quantiles(0.0) == np.float32(x.min())
