"""The quadratic form's eigenvalues: against the layer's own Hessian, and in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis
from efficient_nets.layers import Conv, Dense, LayerSpec
from tests.analysis.terms_test import KINDS, layer_of

QUADRATIC = [neuron for neuron in KINDS if neuron != "linear"]
FLOAT32 = dict(rtol=1e-4, atol=1e-5)  # Hessians are sums of some ten float32 products


def oracle(function, n):
    """Eigenvalues of half the Hessian of a function of n inputs: of Q in x'Qx, largest first."""
    hessian = np.asarray(jax.hessian(function)(jnp.zeros(n)), np.float64)
    return np.sort(np.linalg.eigvalsh(hessian / 2))[::-1]


def forward_mode(layer):
    layer.spec = dataclasses.replace(layer.spec, backward="autodiff")
    return layer


def padded(values, n):
    """With the n - len(values) zeros that the closed form leaves out, largest first."""
    return np.sort(np.concatenate([values, np.zeros(n - len(values))]))[::-1]


@pytest.mark.parametrize("norm", ["none", "branch"])
@pytest.mark.parametrize("neuron", QUADRATIC)
def test_eigenvalues_are_those_of_half_the_hessian(neuron, norm):
    layer, _ = layer_of("dense", neuron, norm)
    found = analysis.layer_spectrum(forward_mode(layer))
    assert (found.inputs, found.features) == (5, 4)
    for feature, values in enumerate(found.eigenvalues):
        expected = oracle(lambda x, o=feature: layer(x[None])[0, o], 5)
        np.testing.assert_allclose(padded(values, 5), expected, **FLOAT32)
        # Rounding of the Hessian leaves about 1e-7 of the largest in the place of a zero.
        assert found.rank[feature] == np.sum(abs(expected) > 2e-6 * abs(expected).max())


@pytest.mark.parametrize("neuron", ["ours", "fan", "t1"])
def test_of_a_convolution_it_is_in_the_window_of_one_group(neuron):
    spec = LayerSpec(neuron=neuron, backward="autodiff")
    conv = Conv(4, 6, (2, 3), groups=2, padding="VALID", spec=spec, rngs=nnx.Rngs(0))
    found = analysis.layer_spectrum(conv)
    assert (found.inputs, len(found.eigenvalues)) == (12, 6)
    for feature, values in enumerate(found.eigenvalues):
        whole = oracle(lambda x, o=feature: conv(x.reshape(1, 2, 3, 4))[0, 0, 0, o], 24)
        np.testing.assert_allclose(padded(values, 24), whole, **FLOAT32)


def products(a, b):
    """A t4 Dense of rows a and b, `(features, n)`."""
    features, n = np.shape(a)
    layer = Dense(n, features, use_bias=False, spec=LayerSpec("t4"), rngs=nnx.Rngs(0))
    layer.a.kernel[...], layer.b.kernel[...] = jnp.asarray(a).T, jnp.asarray(b).T
    return layer


def test_one_product_in_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 300)).astype(np.float32)
    found = analysis.layer_spectrum(products(a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    inner = np.sum(a * b, axis=1)
    expected = np.stack([(inner + norms) / 2, (inner - norms) / 2], axis=1)
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.rank, 2)


def test_rank_of_equal_opposite_and_zero_factors():
    row = np.random.default_rng(0).normal(size=50).astype(np.float32)
    other = np.roll(row, 1)
    found = analysis.layer_spectrum(
        products([row, row, row, row], [row, np.float32(-0.3) * row, 0 * row, other])
    )
    np.testing.assert_array_equal(found.rank, [1, 1, 0, 2])
    assert found.eigenvalues[0, 0] > 0 > found.eigenvalues[1, 1]


def test_a_nan_stays_with_its_feature():
    layer = products(np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))
    layer.a.kernel[...] = layer.a.kernel[...].at[0, 1].set(jnp.nan)
    found = analysis.layer_spectrum(layer)
    np.testing.assert_array_equal(np.isnan(found.eigenvalues).any(axis=1), [False, True, False])
    np.testing.assert_array_equal(found.rank, [1, 0, 1])


def test_more_eigenvalues_than_asked_for_leave_features_out():
    fan, _ = layer_of("dense", "fan")
    assert analysis.layer_spectrum(fan, most=10).eigenvalues.shape == (2, 5)
    assert analysis.layer_spectrum(fan, most=1).eigenvalues.shape == (1, 5)
    ours, _ = layer_of("dense", "ours")  # two of each are not zero
    found = analysis.layer_spectrum(ours, most=6)
    assert found.eigenvalues.shape == (3, 2) and found.features == 4


def test_a_linear_layer_has_none():
    assert analysis.layer_spectrum(Dense(3, 4, rngs=nnx.Rngs(0))) is None
