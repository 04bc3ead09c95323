"""Embedding beside `nnx.Embed` with the same table: rows, attend, conversion, cost, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, layers
from efficient_nets.errors import UserError
from efficient_nets.layers import Embedding, LayerSpec, convert, layer_norm_act

VOCABULARY, FEATURES = 70, 8
IDS = jnp.asarray([[0, 69, 7], [33, 33, -1]])


def make(text, run="factorized", **options):
    spec = LayerSpec(kernel=text if text == "dense" else f"{text},run={run},always")
    return Embedding(VOCABULARY, FEATURES, spec=spec, rngs=nnx.Rngs(0), **options)


def flax_of(layer):
    peer = nnx.Embed(VOCABULARY, FEATURES, rngs=nnx.Rngs(0))
    peer.embedding[...] = layer.w.dense()
    return peer


@pytest.mark.parametrize("text", ["dense", "cp:2", "tt:2"])
def test_rows_and_products_are_those_of_flax(text):
    layer = make(text)
    assert layer.w.factored == (text != "dense")

    @nnx.jit
    def both(layer):
        peer, x = flax_of(layer), jnp.sin(jnp.arange(2.0 * FEATURES)).reshape(2, FEATURES)
        return [(net(IDS), net.attend(x), net.attend(x[0])) for net in (layer, peer)]

    for found, expected in zip(*both(layer), strict=True):
        # Float32: sums of a hundred products.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["cp:3", "tt:4"])
def test_fresh_rows_have_length_1_in_the_mean(text):
    table = make(text).w.dense()
    # 560 draws of the dense table, whose mean square all forms take on: sqrt(2 / 560) is 0.06.
    np.testing.assert_allclose(jnp.mean(jnp.square(table)) * FEATURES, 1, rtol=0.2)


def test_types():
    def of(layer):
        """Of its rows, its products with a float32 vector, and its parameters."""
        made = jax.eval_shape(layer, IDS), jax.eval_shape(layer.attend, jnp.ones(FEATURES))
        params = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(layer))}
        return *(each.dtype.name for each in made), *params

    assert of(make("tt:2", dtype=jnp.bfloat16)) == ("bfloat16", "bfloat16", "float32")
    assert of(make("dense", param_dtype=jnp.bfloat16)) == ("bfloat16", "float32", "bfloat16")
    converted = layers.set_compute_dtype(make("dense"), jnp.bfloat16)
    assert of(converted) == ("bfloat16", "bfloat16", "float32")


class Net(nnx.Module):
    """Of images as ids; their rows are both ends."""

    def __init__(self, embed):
        self.embed = embed

    def __call__(self, images):
        return self.embed.attend(self.embed(images[..., 0].astype(jnp.int32)))


def test_a_table_is_decomposed_and_made_again():
    net, rule = Net(make("dense")), dict(match="embed", start="kept")

    @nnx.jit
    def there_and_back(net):
        of_cores = dict(kernel="tt:20,order=2,always,run=factorized")  # of 10 x 2 and 7 x 4
        cores = convert(net, [rule | of_cores], jax.random.key(0))
        again = convert(cores, [rule | dict(kernel="dense")], jax.random.key(0))
        return cores, cores.embed(IDS), again.embed.w.kernel[...]

    cores, rows, table = there_and_back(net)
    assert isinstance(cores.embed, Embedding) and cores.embed.w.factored
    assert cores.embed.w.kernel.core0.shape == (10, 2, 20)
    # Float32, behind an SVD.
    np.testing.assert_allclose(rows, net.embed(IDS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table, net.embed.w.dense(), rtol=1e-4, atol=1e-5)


def test_the_layer_table_counts_it():
    net = Net(make("tt:2,order=2,in=10x7,out=4x2"))
    (cost,) = analysis.layer_costs(net, (5, 3, 1))
    assert (cost.name, cost.kind, cost.kernels) == ("embed", "Embedding", ((70, 8),))
    assert cost.input_shape == (5, 3) and cost.output_shape == (5, 3, 8)
    assert cost.params == 10 * 4 * 2 + 2 * 7 * 2
    rows = 15 * 4 * 2 * 2  # 4 x 2 by 2 x 2 each
    back = 10 * 4 * 2 * 7 * 2 + 15 * 8 * 70  # both cores first, which moves fewer bytes
    assert cost.macs == rows + back
    assert "70x8" in analysis.layer_table(net, (5, 3, 1))
    (dense,) = analysis.layer_costs(Net(make("dense")), (5, 3, 1))
    (table,) = analysis.layer_costs(Net(make("tt:2", "reconstructed")), (5, 3, 1))
    assert dense.macs == table.macs == 15 * 70 * 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(neuron="ours"), "neuron='ours': an Embedding looks rows up; allowed linear"),
        (dict(norm="branch"), "norm='branch': .* allowed none"),
        (dict(algorithm="winograd:4"), "algorithm='winograd:4': .* allowed direct"),
        (dict(precision="lsq:w4a4"), "precision='.*lsq.*': .* allowed float"),
        (dict(start="variance"), "start='variance': .* allowed own, kept"),
    ],
)
def test_axes_that_no_lookup_has_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Embedding(4, 2, spec=LayerSpec(**fields), rngs=nnx.Rngs(0))
    net = Net(Embedding(4, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=rf"layers\[0\]: embed: {message}"):
        convert(net, [dict(match="embed", **fields)], jax.random.key(0))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="^vocabulary=0: must be at least 1"):
        Embedding(0, 2, rngs=nnx.Rngs(0))
    layer = Embedding(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="ids have dtype float32: an integer one is needed"):
        layer(jnp.zeros(3))
    for x in (jnp.ones((2, 3)), jnp.ones((2, 4), jnp.int32), jnp.ones(())):
        with pytest.raises(UserError, match="features=4: attend takes floating"):
            layer.attend(x)
    with pytest.raises(UserError, match="called by itself"):
        layer_norm_act(jnp.ones((2, 4)), layer)
    with pytest.raises(UserError, match="cannot be removed"):
        convert(Net(layer), [dict(match="embed", remove=True)], jax.random.key(0))


def test_bonds_of_a_table_are_dropped_and_penalised():
    layer = make("tt:4,dropout=0.5,lasso=0.1")
    ids = jnp.arange(6)
    first, second = layer(ids), layer(ids)
    assert np.abs(first - second).max() > 0 and layer.has_penalty
    layer.attend(first)
    assert layer.w.kernel.calls[...] == 3
    layer.eval()
    np.testing.assert_array_equal(layer(ids), layer(ids))


@pytest.mark.parametrize("run", ["factorized", "reconstructed"])
def test_narrow_ids_count_from_the_end(run):
    layer = Embedding(200, 8, spec=LayerSpec(kernel=f"tt:2,run={run}"), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(jnp.int8(-1)), layer(jnp.int32(199)))
