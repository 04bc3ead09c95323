"""Factorized kernels whose cores are rounded: the site 'core' of the precision axis."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, deploy, layers, models
from efficient_nets.errors import UserError
from efficient_nets.layers import GRU, LSTM, Conv, Dense, LayerSpec, calibrate, convert
from tests.deploy.packed_test import _data_bytes

LOW, HIGH = -8, 7  # of 4 bits
IMAGES = (2, 5, 5, 4)


def images(seed=0, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), IMAGES, dtype)


def conv(kernel, precision="lsq:c4", neuron="linear", dtype=jnp.float64, **fields):
    spec = LayerSpec(neuron, kernel=f"{kernel},always", precision=precision, **fields)
    return Conv(4, 6, (3, 3), spec=spec, param_dtype=dtype, rngs=nnx.Rngs(0))


def with_dense(layer, kernels):
    """The same layer with these arrays as kernels, nothing of it rounded."""
    spec = dataclasses.replace(layer.spec, kernel="dense", precision="float")
    made = Conv(4, 6, (3, 3), spec=spec, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    for name, kernel in kernels.items():
        getattr(made, name).kernel[...] = jnp.asarray(kernel)
    return made


def narrowed(layer):
    """With steps at which some values of each core are clipped, another step each."""
    for index, found in enumerate(layer.ranges.values()):
        found.step[...] = found.step[...] * (0.2 + 0.1 * (index % 3))
    return layer


def rounded(core, step):
    return step * np.round(np.clip(core / step, LOW, HIGH))


def rounded_cores(layer, branch):
    return {
        name: rounded(np.asarray(core), np.asarray(layer.ranges[f"core_{branch}_{name}"].step))
        for name, core in getattr(layer, branch).value().cores.items()
    }


def contracted(network, arrays, out):
    """Of arrays by the names of cores, or by their indices, in numpy."""
    numbers = {name: i for i, (name, _) in enumerate(network.sizes)}
    operands = []
    for name, array in arrays.items():
        indices = network.indices[name] if isinstance(name, str) else name
        operands += [array, [numbers[index] for index in indices]]
    return np.einsum(*operands, [numbers[index] for index in out])


def kernel_of(network, cores):
    return np.asarray(network.cut_kernel(jnp.asarray(contracted(network, cores, network.modes))))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kernel", [slow("cp:3"), slow("tucker:0.4"), "tt:2", slow("tr:2"), slow("ht:2"), slow("bt:0.4")]
)
def test_the_kernel_is_what_the_rounded_cores_make(x64, kernel):
    x = images()
    for run in ("factorized", "reconstructed", "auto"):
        layer = narrowed(conv(f"{kernel},run={run}"))
        made = kernel_of(layer.w.kernel.network, rounded_cores(layer, "w"))
        # Sums of 36 products in float64.
        np.testing.assert_allclose(layer.rounded_kernel("w"), made, rtol=0, atol=1e-14)
        expected = with_dense(layer, {"w": made})(x)
        np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-13)
    assert np.max(np.abs(made - layer.w.dense())) > 0.01


@pytest.mark.parametrize(
    ("neuron", "fields"),
    [
        ("linear", dict(kernel="tucker:0.4,run=factorized")),
        ("ours", dict(kernel="cp:3", norm="branch", backward="hybrid")),
        slow("ours", dict(kernel="cp:3", norm="branch", backward="autodiff")),
    ],
    ids=["linear", "hybrid", "autodiff"],
)
def test_gradients_are_straight_through(x64, neuron, fields):
    """Of a core's step, LSQ's formula value by value, of what the contraction hands back."""
    layer, x = narrowed(conv(neuron=neuron, **fields)), images()

    def gradient(layer):
        return nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(layer)

    found = gradient(layer)
    cores = {name: rounded_cores(layer, name) for name in layer.spec.branches}
    network = layer.branches[0].kernel.network
    plain = with_dense(layer, {name: kernel_of(network, own) for name, own in cores.items()})
    of_kernels = gradient(plain)
    clipped = 0
    for branch, own in cores.items():
        whole = np.asarray(network.padded_kernel(getattr(of_kernels, branch).kernel[...]))
        for core in own:
            others = {name: array for name, array in own.items() if name != core}
            g = contracted(network, others | {network.modes: whole}, network.indices[core])
            values = np.asarray(getattr(layer, branch).kernel.value().cores[core])
            key = f"core_{branch}_{core}"
            step = float(layer.ranges[key].step[0])
            of_values, of_step = np.zeros(g.shape), 0.0
            for place in np.ndindex(g.shape):
                u = values[place] / step
                if u <= LOW or u >= HIGH:
                    of_step += g[place] * (LOW if u <= LOW else HIGH)
                    clipped += 1
                else:
                    of_values[place] = g[place]
                    of_step += g[place] * (np.round(u) - u)
            of_step /= math.sqrt(values.size * HIGH)
            # Sums of hundreds of products in float64.
            got = getattr(getattr(found, branch).kernel, core)
            np.testing.assert_allclose(got[...], of_values, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(found.ranges[key].step[0], of_step, rtol=1e-9, atol=1e-11)
    assert clipped > 3


def test_ranges_move_before_they_are_used_and_in_training_only(x64):
    layer = conv("tt:2", "c=minmax:4")
    for name, core in layer.cores.items():
        core[...] = 3 * core[...]
        before = np.asarray(layer.ranges[name].lo)
        assert before < 0
    layer.eval()
    state = nnx.to_pure_dict(nnx.state(layer))
    layer(images())
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer)), state)
    layer.train()
    old = {name: found.lo[...] for name, found in layer.ranges.items()}
    trained = layer(images())
    for name, core in layer.cores.items():
        expected = 0.99 * old[name] + 0.01 * jnp.minimum(jnp.min(core[...]), 0)
        np.testing.assert_allclose(layer.ranges[name].lo[...], expected, rtol=1e-12)
        assert expected != old[name]
    layer.eval()
    np.testing.assert_array_equal(layer(images()), trained)


def test_schedules_and_losses_reach_the_ranges_of_cores(x64):
    fields = dict(method="lsq", bits=4, float_epochs=1.0, freeze_epoch=2.0, loss=0.5)
    layer = conv("tt:2", dict(core=fields))
    net = nnx.List([layer])
    names = [f"0/ranges/core_w_core{i}" for i in range(4)]
    assert [name for name, _ in layers.ranges(net)] == names
    np.testing.assert_allclose(layer.rounded_kernel("w"), layer.w.dense(), rtol=0, atol=1e-14)
    ranges = [found for _, found in layers.ranges(net)]
    layers.advance(ranges, 1.5)
    made = kernel_of(layer.w.kernel.network, rounded_cores(layer, "w"))
    np.testing.assert_allclose(layer.rounded_kernel("w"), made, rtol=0, atol=1e-14)
    with layers.collecting("losses") as losses:
        layer(images())
    cores = {name: np.asarray(core) for name, core in layer.w.value().cores.items()}
    errors = [cores[name] - core for name, core in rounded_cores(layer, "w").items()]
    expected = [0.5 * np.mean(error**2) for error in errors]
    np.testing.assert_allclose([loss for _, loss in losses], expected, rtol=1e-12)


def test_calibration_covers_the_cores(x64):
    net = nnx.List([conv("tucker:0.4", "lsq:c4a4")])
    for _, found in layers.ranges(net):
        found.step[...] = 100.0

    class Net(nnx.Module):
        def __init__(self):
            self.conv = net[0]

        def __call__(self, x):
            return self.conv(x)

    made = calibrate(Net(), images(), how="minmax").conv
    for name, core in made.cores.items():
        lo, hi = np.min(core[...]), np.max(core[...])
        np.testing.assert_allclose(made.ranges[name].step[0], max(hi / HIGH, lo / LOW), rtol=1e-12)


def test_zero_cores_start_as_the_others():
    layer = Conv(
        8, 12, (3, 3), spec=LayerSpec(kernel="tt:2", precision="lsq:c4"),
        kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert not np.any(layer.w.dense())
    steps = [float(found.step[0]) for found in layer.ranges.values()]
    assert max(steps) < 3 * min(steps)


def lenet():
    return models.create(
        "lenet", image_shape=(8, 8, 1), num_classes=10, width=0.25, rngs=nnx.Rngs(0)
    )


RULE = dict(match="conv|hidden", kernel="tt:6", precision="lsq:c4a4")


def test_layers_that_stay_dense_have_no_cores_to_round():
    net = convert(lenet(), [RULE], jax.random.key(0))
    assert (net.conv1.spec.kernel, str(net.conv1.spec.precision)) == ("dense", "lsq:a4")
    assert str(net.hidden.spec.precision) == "lsq:a4c4"
    assert list(net.conv1.ranges) == ["input"]
    assert set(net.hidden.ranges) == {"input", "core_w_core0", "core_w_core1", "core_w_core2"}
    assert "lsq:a4c4" in analysis.layer_table(net, (8, 8, 1))
    again = convert(net, [RULE], jax.random.key(1))  # the same is no change
    np.testing.assert_array_equal(again.hidden.w.dense(), net.hidden.w.dense())
    assert str(again.conv1.spec.precision) == "lsq:a4"


def test_trained_cores_and_ranges_are_kept():
    float_net = convert(lenet(), [RULE | dict(precision="float")], jax.random.key(0))
    net = convert(float_net, [RULE], jax.random.key(1)).hidden
    for name, core in net.cores.items():
        np.testing.assert_array_equal(core[...], float_net.hidden.cores[name][...])
        step = 2 * np.mean(np.abs(core[...])) / math.sqrt(HIGH)
        np.testing.assert_allclose(net.ranges[name].step[0], step, rtol=1e-5)
        net.ranges[name].step[...] = 7.0
    for fields in (
        dict(precision="c=lsq:4,a=minmax:8", kernel="tt:6,run=factorized"),
        dict(kernel="tt:6,run=factorized", start="kept"),
    ):
        made = convert(nnx.List([net]), [RULE | dict(match="0") | fields], jax.random.key(2))[0]
        for name, core in made.cores.items():
            np.testing.assert_array_equal(core[...], net.cores[name][...])
            assert made.ranges[name].step[...] == 7.0
    for fields in (dict(precision="lsq:c3"), dict(kernel="tt:5", start="kept")):
        made = convert(nnx.List([net]), [RULE | dict(match="0") | fields], jax.random.key(2))[0]
        assert all(made.ranges[name].step[...] != 7.0 for name in made.cores)


@pytest.mark.parametrize(
    ("cell", "run"), [(LSTM, "factorized"), slow(LSTM, "reconstructed"), slow(GRU, "auto")]
)
def test_recurrent_layers_round_their_cores_once_a_call(cell, run):
    kernel = f"tt:2,order=2,always,run={run}"
    spec = LayerSpec(kernel=kernel, precision="c=minmax:4")
    net = cell(6, 8, input_spec=spec, hidden_spec=spec, rngs=nnx.Rngs(0))
    plain = cell(6, 8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    net.eval()
    for name in ("input", "hidden"):
        getattr(plain, name).w.kernel[...] = getattr(net, name).rounded_kernel("w")
    # Five steps of sums of 14 products in float32.
    np.testing.assert_allclose(net(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    net.train()
    net.hidden.ranges["core_w_core0"].lo[...] = jnp.zeros((1,))
    net(x)
    least = jnp.min(net.hidden.cores["core_w_core0"][...])
    np.testing.assert_allclose(net.hidden.ranges["core_w_core0"].lo[...], 0.01 * least, rtol=1e-5)


class Tiny(nnx.Module):
    def __init__(self, precision, seed=0, **fields):
        spec = LayerSpec(kernel="tucker:0.6", precision=precision, **fields)
        self.conv = Conv(8, 12, (3, 3), spec=spec, rngs=nnx.Rngs(seed))

    def __call__(self, x):
        return self.conv(x)


CHANNELS = dict(core=dict(method="lsq", bits=3, per="channel"))


@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("lsq:c4", dict(neuron="ours")),
        ("c=lq:2,a=lsq:4", {}),
        ("lsq:w4a4c4", {}),
        slow("minmax:c8", {}),
        slow(CHANNELS, {}),
        slow("lsq:c4", dict(algorithm="winograd:2")),
        slow("minmax:c4a8u8v8", dict(algorithm="winograd:2")),
    ],
    ids=["lsq", "values", "kernel too", "8 bits", "channels", "winograd", "winograd in int8"],
)
def test_nets_for_use(precision, fields, tmp_path):
    net, x = Tiny(precision, **fields), jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    net(x)
    net.eval()
    whole = deploy.to_integers(net)
    np.testing.assert_array_equal(whole(x), net(x))
    held = not {"kernel", "transformed_kernel"} & set(net.conv.spec.precision.quantizers)
    assert whole.conv.branches[0].factored == held
    deploy.save(net, tmp_path / "net")
    found = deploy.load(Tiny(precision, seed=1, **fields), tmp_path / "net")
    np.testing.assert_array_equal(found(x), net(x))
    cost = analysis.model_cost(net, (6, 6, 8))
    assert _data_bytes(tmp_path / "net") == cost["packed_bytes"] < cost["bytes"]
    if "lq" not in str(precision):
        deploy.save(whole, tmp_path / "whole")
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "net").read_bytes()


def test_costs():
    spec = LayerSpec(kernel="tucker:4x4,run=factorized", precision="lsq:c4a8")
    layer = Dense(64, 32, use_bias=False, spec=spec, rngs=nnx.Rngs(0))

    def cost(layer):
        return analysis.cost.layer_costs(Head(layer), (8, 8, 1))[0]

    class Head(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

        def __call__(self, x):
            return self.layer(x.reshape(x.shape[0], -1))

    found = cost(layer)
    sizes = (64 * 4, 4 * 4, 4 * 32)
    assert found.bits == 4 and found.input_bits == 8
    # Codes and a table of 16 each, but for the smallest core, which is not packed; scales.
    assert found.packed_bytes == (128 + 16) + 16 + (64 + 16) + 4 * 3 + 4
    assert found.macs == sum(sizes) and found.bops == sum(sizes) * 4 * 32
    whole = cost(
        Dense(64, 32, spec=dataclasses.replace(spec, kernel="tucker:4x4,run=reconstructed"),
              rngs=nnx.Rngs(0))
    )  # fmt: skip
    assert whole.bits == 4 and whole.bops == 64 * 32 * 32 * 8


def test_errors():
    with pytest.raises(UserError, match="precision.core with kernel='dense', which has no cores"):
        LayerSpec(precision="lsq:c4")
    with pytest.raises(UserError, match="layers.0.: 0: precision.core with kernel='dense'"):
        net = nnx.List([Dense(8, 4, rngs=nnx.Rngs(0))])
        convert(net, [dict(match="0", precision="lsq:c4")], jax.random.key(0))
    with pytest.raises(UserError, match="precision.core.per='groups:3': it does not divide the 4"):
        groups = dict(core=dict(method="lsq", bits=4, per="groups:3"))
        Dense(64, 32, spec=LayerSpec(kernel="tucker:4x4", precision=groups), rngs=nnx.Rngs(0))
    LayerSpec(kernel="tt:8,run=factorized", precision="lsq:c4")
