"""Nets without their batch norms give what they gave, within the rounding of a few products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import deploy, layers, models
from efficient_nets.layers import BatchNorm, Conv, FrozenBatchNorm, LayerSpec, layer_norm_act
from efficient_nets.ops import neurons
from tests.deploy.integer_test import EXACT, in_use, normal

# Of the largest output: a kernel times s is rounded once more, and so is each of a sum's n terms,
# but they do not all go one way: sqrt(n) * 2^-24 for n up to 4,608, some layers deep.
ROUNDING = 1e-5


def with_statistics(net, seed=0):
    """The net with random norms: scales of both signs, the first one 0; in evaluation mode."""
    random = np.random.default_rng(seed)
    for _, norm in nnx.iter_graph(net):
        if isinstance(norm, BatchNorm):
            size = norm.num_features
            scale = random.choice([-1, 1], size) * random.uniform(0.3, 1.2, size)
            scale[0] = 0
            for name, values in dict(
                scale=scale,
                bias=0.3 * random.normal(size=size),
                mean=0.3 * random.normal(size=size),
                var=random.uniform(0.5, 2, size),
            ).items():
                getattr(norm, name)[...] = jnp.asarray(values, jnp.float32)
    net.eval()
    return net


def assert_same(found, expected, rounding=ROUNDING):
    most = float(np.max(np.abs(expected)))
    assert most > 0.01 and np.isfinite(most)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * most)


def norms_of(net):
    return {
        "/".join(map(str, path))
        for path, norm in nnx.iter_graph(net)
        if isinstance(norm, BatchNorm)
    }


class Unit(nnx.Module):
    """A layer and its norm; `norm1`, in front, is no layer's."""

    def __init__(self, spec=None, make=BatchNorm, use_bias=False):
        rngs = nnx.Rngs(0)
        self.norm1 = BatchNorm(4, rngs=rngs)
        self.conv1 = Conv(4, 6, (3, 3), groups=2, use_bias=use_bias, spec=spec, rngs=rngs)
        self.norm = make(6, rngs=rngs)

    def __call__(self, x):
        return layer_norm_act(self.norm1(x), self.conv1, self.norm, nnx.silu)


SMALL = dict(blocks=(1, 1, 1), width=0.25)
QUADRATIC = [dict(match=r"conv\d", neuron="ours", norm="branch")]


@pytest.mark.parametrize(
    ("name", "options", "rules", "stays"),
    [
        ("resnet", dict(models.preset("resnet", "torchvision"), **SMALL), [], 0),
        ("resnet", dict(models.preset("resnet", "bireal"), **SMALL), [], 0),
        # Pre-activation: `norm1` stands in front of `conv1`; one more in front of the head.
        ("resnet", dict(models.preset("resnet", "dorefa"), **SMALL), [], 2 * 3 + 1),
        ("resnet", SMALL, QUADRATIC, 0),
        ("mobilenet", dict(layout="q8", width=0.05), [], 0),
        ("vgg", dict(layout="small", width=0.1), [], 0),
    ],
    ids=["torchvision", "bireal", "dorefa", "quadratic", "mobilenet", "vgg"],
)
def test_a_net_gives_the_same_without_its_norms(name, options, rules, stays):
    made = models.create(name, image_shape=(8, 8, 3), num_classes=10, rngs=nnx.Rngs(0), **options)
    net = with_statistics(layers.convert(made, rules, jax.random.key(0)))
    before, x = jax.tree.map(jnp.copy, nnx.state(net)), normal(4, 8, 8, 3)
    expected = jax.jit(lambda x: net(x))(x)
    found, left = deploy.fold_norms(net, (8, 8, 3))
    assert_same(jax.jit(lambda x: found(x))(x), expected, 1e-4 if rules else ROUNDING)
    assert norms_of(found) == set(left) and len(left) == stays
    assert set(left.values()) <= {"it follows no layer"}
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)  # it is left as it is


@pytest.mark.parametrize("neuron", [*neurons.NEURONS, "t1:2", "cqnn:2"])
def test_factors_and_shifts_of_branches_are_those_of_the_output(neuron):
    parts, random = neurons.neuron(neuron), np.random.default_rng(0)
    values = dict(zip(parts.branches, random.normal(size=len(parts.branches)), strict=True))
    before = parts.combine(*values.values())
    if parts.scaling:
        scaled = {name: (3 if name in parts.scaling else 1) * x for name, x in values.items()}
        np.testing.assert_allclose(parts.combine(*scaled.values()), 3 * before)
    for name in parts.shifting:
        shifted = values | {name: values[name] + 2}
        np.testing.assert_allclose(parts.combine(*shifted.values()), before + 2)
    assert bool(parts.scaling) == (neuron != "t3")
    assert bool(parts.shifting) == (neuron not in ("t3", "t4", "qres", "cqnn:2"))


# What stays: of every neuron without branch norms, and with them.
OUTER = {"t3", "t4", "cqnn:2"}
BRANCHES = {"qres", "t1:2"}


@pytest.mark.parametrize("norm", ["none", "branch"])
@pytest.mark.parametrize("neuron", [*neurons.NEURONS, "t1:2", "cqnn:2"])
def test_every_neuron(neuron, norm):
    for make, use_bias in ((BatchNorm, False), (FrozenBatchNorm, True)):
        net = with_statistics(Unit(LayerSpec(neuron=neuron, norm=norm), make, use_bias))
        if use_bias:
            for value in jax.tree.leaves(nnx.state(net.conv1, nnx.Param), is_leaf=_is_variable):
                if value[...].ndim == 1:
                    value[...] = value[...] + 0.1
        found, left = deploy.fold_norms(net, (5, 5, 4))
        stays = {"norm1"} | ({"norm"} if neuron in OUTER else set())
        if norm == "branch" and neuron in BRANCHES:
            stays |= {f"conv1/{name}/norm" for name in found.conv1.spec.branches}
        assert set(left) == norms_of(found) == stays
        x = normal(2, 5, 5, 4)
        assert_same(found(x), net(x))


def _is_variable(x):
    return isinstance(x, nnx.Variable)


@pytest.mark.parametrize("precision", EXACT.values(), ids=EXACT)
def test_codes_stay_and_their_scales_take_the_factor(precision):
    spec = LayerSpec(precision=precision)
    if spec.precision.output is not None:
        pytest.skip("its output is rounded in front of the norm")
    net = with_statistics(Unit(spec))
    x = normal(2, 3, 3, 4)
    net = in_use(net, x)
    live, left = deploy.fold_norms(net, (3, 3, 4))
    assert "to_integers" in left["norm"] and live.norm is not None
    whole = deploy.to_integers(net)
    found, left = deploy.fold_norms(whole, (3, 3, 4))
    assert set(left) == {"norm1"} and found.norm is None
    np.testing.assert_array_equal(found.conv1.w.kernel[...], whole.conv1.w.kernel[...])
    assert found.conv1.ranges["w"].scale.shape == (1, 1, 1, 6)
    assert_same(found(x), whole(x), 1e-6)  # the same sums; a product more, a row of 18 fewer


def test_quadratic_layers_of_whole_numbers():
    spec = LayerSpec(neuron="ours", norm="branch", precision="lsq:w4a8")
    net, x = with_statistics(Unit(spec)), jnp.abs(normal(2, 5, 5, 4))
    whole = deploy.to_integers(in_use(net, x))
    found, left = deploy.fold_norms(whole, (5, 5, 4))
    assert set(left) == {"norm1"} and found.conv1.spec.norm == "none"
    assert_same(found(x), whole(x))


def test_rounded_outputs_keep_their_norm_behind_them():
    net = with_statistics(Unit(LayerSpec(norm="branch", precision="o=lsq:8")))
    x = normal(2, 5, 5, 4)
    net = in_use(net, x)
    found, left = deploy.fold_norms(net, (5, 5, 4))
    assert set(left) == {"norm1", "norm"} and "rounded in front of it" in left["norm"]
    # The branch's own norm is in front of the rounding, whose step a value may just have crossed.
    step = float(net.conv1.ranges["output"].step[0])
    np.testing.assert_allclose(found(x), net(x), rtol=0, atol=3 * step)
    assert np.mean(np.abs(found(x) - net(x)) > 1e-5) < 0.01


class Shared(nnx.Module):
    """One norm behind two layers; another layer with and without one."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second, self.third = (Conv(4, 4, (3, 3), rngs=rngs) for _ in range(3))
        self.both, self.once = BatchNorm(4, rngs=rngs), BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = layer_norm_act(x, self.second, self.both)
        x = layer_norm_act(x, self.first, self.both)
        return layer_norm_act(self.third(x), self.third, self.once)


def test_shared_norms_and_layers_stay():
    net, x = with_statistics(Shared()), normal(2, 5, 5, 4)
    found, left = deploy.fold_norms(net, (5, 5, 4))
    assert left == {
        "both": "it follows several layers: first, second",
        "once": "third is called without it too",
    }
    np.testing.assert_array_equal(found(x), net(x))


class Hidden(Unit):
    def __call__(self, x):
        return nnx.remat(Unit.__call__)(self, x)


def test_layers_that_hide_are_refused():
    with pytest.raises(ValueError, match=r"inside of nnx.remat"):
        deploy.fold_norms(with_statistics(Hidden()), (5, 5, 4))
