"""Dropout and lasso of factorized kernels in layers: what is drawn when, and what the loss gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_nets import analysis, deploy, layers
from efficient_nets.layers import Conv, Dense, LayerSpec, convert
from efficient_nets.ops import factorization

FORM = "tucker:4x5"


def conv(text=f"{FORM},dropout=0.4", neuron="linear", **fields):
    spec = LayerSpec(neuron, kernel=text, **fields)
    return Conv(8, 12, (3, 3), spec=spec, rngs=nnx.Rngs(0))


def images():
    return jax.random.normal(jax.random.key(1), (8, 5, 5, 8))


def of_kernel(layer, kernels):
    """A dense layer with these kernels, by branch."""
    made = Conv(8, 12, (3, 3), spec=LayerSpec(layer.spec.neuron), rngs=nnx.Rngs(0))
    for name, kernel in kernels.items():
        getattr(made, name).kernel[...] = factorization.dense(kernel)
    return made


@pytest.mark.parametrize(
    ("neuron", "run"),
    [("linear", "factorized"), ("linear", "reconstructed"), ("ours", "factorized")],
)
def test_each_call_in_training_computes_with_the_next_draw(neuron, run):
    layer, x, seen = conv(f"{FORM},run={run},dropout=0.4", neuron), images(), []
    for _ in range(3):
        drawn = {name: layer.drawn(name) for name in layer.spec.branches}
        # Float32: sums of a hundred products, and products of them.
        np.testing.assert_allclose(layer(x), of_kernel(layer, drawn)(x), rtol=1e-3, atol=1e-3)
        seen.append(drawn)
    kernels = [factorization.dense(found[layer.spec.branches[0]]) for found in seen]
    assert all(np.any(a != b) for a, b in zip(kernels, kernels[1:], strict=False))
    if neuron == "ours":
        assert len({tuple(b.kernel.seed[...].tolist()) for b in layer.branches}) == 3
    layer.eval()
    plain = {name: getattr(layer, name).value() for name in layer.spec.branches}
    for _ in range(2):
        np.testing.assert_allclose(layer(x), of_kernel(layer, plain)(x), rtol=1e-3, atol=1e-3)
    assert all(branch.kernel.calls[...] == 3 for branch in layer.branches)


def test_the_gradient_is_that_of_the_masked_kernel():
    """Also behind the hybrid backward: what is dropped learns nothing, what stays learns more."""
    x, grads = images(), []
    for backward in ("hybrid", "autodiff"):
        layer = conv(neuron="ours", norm="branch", backward=backward)
        grads.append(nnx.to_pure_dict(nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(layer)))
    a, b = grads
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), a, b)
    layer = conv()
    drawn = layer.drawn("w").cores
    grad = nnx.grad(lambda m: jnp.sum(m(x)))(layer)
    factor = np.asarray(drawn["factor_i0"])
    off = np.all(factor == 0, axis=0)
    assert 0 < off.sum() < 4
    assert np.all(np.asarray(grad.w.kernel.core[...])[:, :, off] == 0)
    assert np.any(np.asarray(grad.w.kernel.core[...])[:, :, ~off] != 0)


def step(graph, state, x):
    """Pure: as a training step does it."""
    layer = nnx.merge(graph, state)
    layer.train()
    return layer(x), nnx.state(layer)


def test_draws_follow_from_seed_and_calls():
    """Under jit, in a scan, on many devices, and in a run that goes on from a saved state."""
    x, layer = images(), conv()
    graph, start = nnx.split(layer)
    jitted = jax.jit(lambda state, x: step(graph, state, x))
    state, outputs, saved = start, [], []
    for _ in range(3):
        saved.append(nnx.to_pure_dict(state))
        y, state = jitted(state, x)
        outputs.append(y)
    assert np.any(outputs[0] != outputs[1])

    _, scanned = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(graph, s, x)[::-1], s, None, 3))(
        start
    )
    np.testing.assert_allclose(scanned, outputs, rtol=1e-5, atol=1e-5)

    nnx.replace_by_pure_dict(again := nnx.state(layer), saved[2])
    np.testing.assert_array_equal(jitted(again, x)[0], outputs[2])

    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.device_put(x, NamedSharding(mesh, P("data")))
    whole = jax.device_put(start, NamedSharding(mesh, P()))
    y, moved = jitted(whole, rows)
    np.testing.assert_allclose(y, outputs[0], rtol=1e-5, atol=1e-5)
    assert moved["w"]["kernel"]["calls"][...] == 1


def test_rules_change_dropout_and_nothing_else():
    net = nnx.List([conv(FORM), Dense(8, 4, rngs=nnx.Rngs(0))])
    fresh = nnx.List([conv(f"{FORM},dropout=0.2"), Dense(8, 4, rngs=nnx.Rngs(0))])
    rule = dict(match="0", kernel=f"{FORM},dropout=0.2,lasso=0.1")
    made = convert(net, [rule], jax.random.key(0))
    for other in (fresh, made):
        for name, core in net[0].w.value().cores.items():
            np.testing.assert_array_equal(core, getattr(other[0].w.kernel, name)[...])
        assert other[0].w.kernel.dropout == 0.2 and other[0].w.kernel.calls[...] == 0
    made[0](images())
    again = convert(made, [rule | dict(kernel=f"{FORM},dropout=0.3")], jax.random.key(1))
    assert again[0].w.kernel.calls[...] == 1  # goes on
    np.testing.assert_array_equal(again[0].w.kernel.seed[...], made[0].w.kernel.seed[...])
    none = convert(again, [rule | dict(kernel=FORM)], jax.random.key(1))
    assert jax.tree.structure(nnx.state(none)) == jax.tree.structure(nnx.state(net))
    kept = convert(made, [rule | dict(start="kept")], jax.random.key(2))
    for name, core in net[0].w.value().cores.items():
        np.testing.assert_array_equal(core, getattr(kept[0].w.kernel, name)[...])


def test_dropout_has_no_costs_and_no_place_in_files(tmp_path):
    nets = [nnx.List([conv(text)]) for text in (FORM, f"{FORM},dropout=0.2,lasso=0.1")]
    for net in nets:
        net.__class__.__call__ = lambda self, x: self[0](x)
    plain, dropping = (analysis.cost.layer_costs(net, (5, 5, 8))[0] for net in nets)
    for field in ("params", "bytes", "packed_bytes", "macs"):
        assert getattr(plain, field) == getattr(dropping, field)
    sizes = [deploy.save(net, tmp_path / "net") for net in nets]
    assert sizes[0] == sizes[1]
    loaded = deploy.load(nets[1], tmp_path / "net")
    nets[1].eval()
    np.testing.assert_allclose(loaded(images()), nets[1](images()), rtol=1e-6, atol=1e-6)


def test_steps_of_a_recurrent_layer_share_a_draw():
    cell = layers.LSTM(
        6, 8, hidden_spec=LayerSpec(kernel="tucker:3x3,run=factorized,dropout=0.5"),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 4, 6))
    for _ in range(2):
        drawn = factorization.dense(cell.hidden.drawn("w"))
        plain = layers.LSTM(6, 8, rngs=nnx.Rngs(0))
        plain.input = cell.input
        plain.hidden.w.kernel[...] = drawn
        np.testing.assert_allclose(cell(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    assert cell.hidden.w.kernel.calls[...] == 2


# Lasso


def test_the_penalty_is_of_all_branches():
    layer = conv(f"{FORM},lasso=0.5", "ours")
    kernels = [branch.value() for branch in layer.branches]
    expected = sum(float(factorization.rank_lasso(k.network, k.cores)) for k in kernels)
    assert layer.has_penalty
    np.testing.assert_allclose(layer.penalty, 0.5 * expected, rtol=1e-6)
    assert not any(conv(other).has_penalty for other in (FORM, "dense"))
