"""Terms add up to the layer's value, each neuron's are those of its formula; shares and cross."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis
from efficient_nets.analysis import terms
from efficient_nets.layers import Conv, Dense, LayerSpec
from efficient_nets.ops import neurons

KINDS = {
    "linear": ["linear"],
    "t1": ["form", "linear"],
    "t2": ["square"],
    "t3": ["product"],
    "t4": ["product"],
    "t1&2": ["form", "square"],
    "t2&4": ["product", "square"],
    "fan": ["product", "square"],
    "ours": ["product", "linear"],
    "qres": ["product", "linear"],
    "cqnn": ["form", "linear"],
    "t1:2": ["product", "linear"],
    "cqnn:2": ["product"],
}


def layer_of(kind, neuron, norm="none"):
    """A layer with random parameters and running statistics, in evaluation mode; and an input."""
    spec = LayerSpec(neuron=neuron, norm=norm)
    if kind == "dense":
        layer, shape = Dense(5, 4, spec=spec, rngs=nnx.Rngs(0)), (6, 5)
    else:
        layer = Conv(4, 6, (2, 3), groups=2, strides=2, spec=spec, rngs=nnx.Rngs(0))
        shape = (3, 5, 6, 4)
    rng = np.random.default_rng(0)
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.2, 1, x.shape), x.dtype), state)
    layer = nnx.merge(graph, state)
    layer.eval()
    return layer, jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_every_neuron_is_here():
    assert set(KINDS) - {"t1:2", "cqnn:2"} == set(neurons.NEURONS)


@pytest.mark.parametrize("norm", ["none", "branch"])
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("neuron", KINDS)
def test_terms_add_up_to_the_layer(neuron, kind, norm):
    layer, x = layer_of(kind, neuron, norm)
    found = terms.term_values(layer, x)
    assert [name for name in terms.KINDS if name in found and name != "bias"] == KINDS[neuron]
    assert ("bias" in found) == (layer.bias is not None)
    # The same float32 sums of a few positive terms in another order.
    np.testing.assert_allclose(sum(found.values()), layer(x), rtol=1e-5, atol=1e-5)


def test_terms_of_ours_are_its_products_and_its_linear_map():
    layer, x = layer_of("dense", "ours")
    a, b, c = (x @ branch.kernel[...] + branch.bias[...][None] for branch in layer.branches)
    found = terms.term_values(layer, x)
    np.testing.assert_allclose(found["product"], a * b, rtol=1e-5)
    np.testing.assert_allclose(found["linear"], c, rtol=1e-5)


def test_a_neuron_without_terms_is_one(monkeypatch):
    gated = dataclasses.replace(neurons.NEURONS["t4"], combine=lambda a, b: a * jnp.tanh(b))
    monkeypatch.setitem(neurons.NEURONS, "gated", dataclasses.replace(gated, terms=()))
    layer, x = layer_of("dense", "gated")
    found = terms.term_values(layer, x)
    assert list(found) == ["value"]
    np.testing.assert_allclose(found["value"], layer(x), rtol=1e-6)
    assert analysis.layer_spectrum(layer) is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_shares_add_up_to_1_and_cross_is_what_the_terms_have_in_common(sign):
    """(x)(1) + sign * 2x on x of unit variance: moments 1 and 4, cross term sign * 2 * 2."""
    layer = Dense(1, 1, spec=LayerSpec(neuron="ours"), rngs=nnx.Rngs(0))
    for branch, kernel, bias in zip(
        layer.branches, (1.0, 0.0, 2.0 * sign), (0.0, 1.0, 0.0), strict=True
    ):
        branch.kernel[...], branch.bias[...] = jnp.full((1, 1), kernel), jnp.full(1, bias)
    x = jnp.asarray([[1.0], [-1.0]])
    (found,) = analysis.analyze(layer, x, x, lambda y, labels: jnp.mean(y)).layers
    assert found.shares == {"product": 0.2, "linear": 0.8}
    assert found.cross == pytest.approx(sign * 4 / 5, rel=1e-6)
    assert found.moment == pytest.approx((1 + 2 * sign) ** 2)
    assert (found.product_max, found.product_rms) == (1, 1)
