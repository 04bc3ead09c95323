"""The option `activation`: its table, that it reaches every unit, and nets without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import models
from efficient_nets.errors import UserError
from efficient_nets.models import parts
from tests.models import reference

# Options of small nets, the image they take, and how many activations an image passes.
NETS = {
    "lenet": (dict(width=0.125), (8, 8, 1), 3),
    "vgg": (dict(layout="Q7", width=0.0625), (32, 32, 3), 7),
    "resnet": (dict(blocks=(1, 2, 1), width=0.25), (8, 8, 3), 1 + 4 * 2),
    "bottlenecks": (
        dict(layout="imagenet", depth=50, width=0.0625),
        (32, 32, 3),
        1 + (3 + 4 + 6 + 3) * 3,
    ),
    "mobilenet": (dict(layout="q8", width=0.0625), (8, 8, 3), 1 + 8 * 2),
    "quadranet": (dict(depths=(1, 1, 2, 1), width=1 / 24), (8, 8, 3), 5),
}


def calls(net, monkeypatch, spied, **option):
    """How often a forward pass calls the named activation."""
    options, image_shape, _ = NETS[net]
    name = "resnet" if net == "bottlenecks" else net
    found = []

    def spy(x):
        found.append(x.shape)
        return x

    monkeypatch.setitem(parts.ACTIVATIONS, spied, spy)
    nnx.eval_shape(
        lambda images: models.create(
            name, image_shape=image_shape, num_classes=5, rngs=nnx.Rngs(0), **options, **option
        )(images),
        jnp.zeros((2, *image_shape)),
    )
    return len(found)


@pytest.mark.parametrize("net", NETS)
def test_the_option_reaches_every_unit(net, monkeypatch):
    assert calls(net, monkeypatch, "tanh", activation="tanh") == NETS[net][-1]


@pytest.mark.parametrize("net", NETS)
def test_the_default_is_what_the_papers_take(net, monkeypatch):
    assert parts.ACTIVATIONS["relu"] is nnx.relu
    default = "gelu" if net == "quadranet" else "relu"
    assert calls(net, monkeypatch, default) == NETS[net][-1]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("relu6", lambda x: min(max(x, 0.0), 6.0)),
        ("leaky", lambda x: max(x, 0.01 * x)),
        ("none", lambda x: x),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        # 1 + erf(x / sqrt 2) is twice the normal distribution function: here at five points.
        ("gelu", {-3: -0.00404969, -0.5: -0.15426877, 0: 0, 0.5: 0.34573123, 3: 2.99595031}.get),
        ("tanh", np.tanh),
        ("hard_tanh", lambda x: min(max(x, -1.0), 1.0)),
    ],
)
def test_each_activation_is_its_formula(name, formula):
    points = [-3, -0.5, 0, 0.5, 3] + [7] * (name == "relu6")
    found = jax.jit(parts.activation(name))(jnp.asarray(points, jnp.float32))
    # float32 rounding; 8 decimals of the table for gelu. Its approximation is off by 1e-4.
    np.testing.assert_allclose(found, [formula(x) for x in points], atol=3e-7)


def test_there_is_a_formula_for_each():
    names = ["gelu", "hard_tanh", "leaky", "none", "relu", "relu6", "silu", "tanh"]
    assert sorted(parts.ACTIVATIONS) == names


def test_without_activations_a_linear_net_is_affine(x64):
    options, image_shape, _ = NETS["resnet"]
    x, y = np.random.default_rng(1).normal(0, 1, (2, 1, *image_shape))

    def off(activation):
        model, _ = reference.build("resnet", image_shape, activation=activation, **options)
        of_x, of_y, of_0, of_sum = model(jnp.concatenate([x, y, 0 * x, x + y]))
        assert np.abs(of_0).min() > 1e-3 * np.abs(of_sum).max()  # affine, and not linear
        return np.abs(of_x + of_y - of_0 - of_sum).max() / np.abs(of_sum).max()

    # float64 rounding, through eleven layers.
    assert off("none") < 1e-12
    assert off("relu") > 1e-3


def test_without_activations_a_quadratic_net_is_not_affine(x64):
    options, image_shape, _ = NETS["resnet"]
    rule = dict(match=r"stage\d/.*/conv\d", neuron="ours", norm="branch")
    model, _ = reference.build("resnet", image_shape, [rule], activation="none", **options)
    x, y = np.random.default_rng(1).normal(0, 1, (2, 1, *image_shape))
    of_x, of_y, of_0, of_sum = model(jnp.concatenate([x, y, 0 * x, x + y]))
    assert np.abs(of_x + of_y - of_0 - of_sum).max() > 1e-3 * np.abs(of_sum).max()


@pytest.mark.parametrize("name", ["lenet", "vgg", "resnet", "mobilenet"])
def test_an_unknown_name_is_an_error(name):
    options, image_shape, _ = NETS[name]
    make = functools.partial(models.create, name, num_classes=5, rngs=nnx.Rngs(0), **options)
    with pytest.raises(UserError, match=r"model\.activation='rleu' is not known: .*mean 'relu'"):
        make(image_shape=image_shape, activation="rleu")
