"""The recurrent net against its formula in NumPy's float64; its sequences, counts and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models
from efficient_nets.errors import UserError
from tests.models import reference

IMAGE = (3, 4, 2)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, values, forget_bias):
    h = c = np.zeros((x.shape[0], 4))
    outputs = []
    for t in range(x.shape[1]):
        z = reference.dense(x[:, t], reference.part(values, "input"))
        i, f, g, o = np.split(z + h @ values["hidden/w/kernel"], 4, axis=-1)
        c = sigmoid(f + forget_bias) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


def gru(x, values, _):
    h = np.zeros((x.shape[0], 4))
    outputs = []
    for t in range(x.shape[1]):
        z = np.split(reference.dense(x[:, t], reference.part(values, "input")), 3, axis=-1)
        u = np.split(reference.dense(h, reference.part(values, "hidden")), 3, axis=-1)
        update = sigmoid(z[1] + u[1])
        h = (1 - update) * np.tanh(z[2] + sigmoid(z[0] + u[0]) * u[2]) + update * h
        outputs.append(h)
    return np.stack(outputs, axis=1)


@pytest.mark.parametrize(
    ("options", "cell", "shape"),
    [
        (dict(forget_bias=0.5, depth=2), lstm, (3, 8)),
        (dict(cell="gru", sequence="pixels"), gru, (12, 2)),
    ],
)
def test_rnn_is_its_formula(options, cell, shape, x64):
    model, values = reference.build("rnn", IMAGE, hidden=4, **options)
    images = np.random.default_rng(1).normal(size=(2, *IMAGE))
    x = images.reshape(2, *shape)
    for number in range(options.get("depth", 1)):
        own = reference.part(values, f"cells/{number}")
        x = cell(x, own, options.get("forget_bias"))
    expected = reference.dense(x[:, -1], reference.part(values, "head"))
    # float64 rounding of sums of some ten products, over twelve steps.
    np.testing.assert_allclose(jax.jit(model)(jnp.asarray(images)), expected, rtol=1e-9, atol=1e-9)


def shapes(image_shape=(28, 28, 1), **options):
    return nnx.eval_shape(
        lambda: models.create(
            "rnn", image_shape=image_shape, num_classes=10, rngs=nnx.Rngs(0), **options
        )
    )


def test_parameter_counts_are_those_of_the_docstring():
    params = sum(x.size for x in jax.tree.leaves(nnx.state(shapes(), nnx.Param)))
    assert params == (28 + 1 + 128) * 4 * 128 + 129 * 10
    assert f"{params:,}" in models.MODELS["rnn"].__doc__


def test_options_change_the_layers():
    made = shapes(cell="gru", sequence="pixels", hidden=16, depth=2, width=0.5)
    assert {path: layer.w.kernel.shape for path, layer in layers.layers(made)} == {
        "cells/0/input": (1, 24),
        "cells/0/hidden": (8, 24),
        "cells/1/input": (8, 24),
        "cells/1/hidden": (8, 24),
        "head": (8, 10),
    }
    # By pixels a sequence may have any length, by rows a row may not have another one.
    call = lambda model, x: model(x)  # noqa: E731
    assert nnx.eval_shape(call, made, jnp.zeros((2, 5, 7, 1))).shape == (2, 10)
    assert nnx.eval_shape(call, shapes(), jnp.zeros((2, 30, 28, 1))).shape == (2, 10)
    with pytest.raises(UserError, match=r"in_features=28: the input cannot be \(2, 28, 30\)"):
        nnx.eval_shape(call, shapes(), jnp.zeros((2, 28, 30, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cell="lstn"), r"model\.cell='lstn' is not known.*mean 'lstm'"),
        (dict(sequence="columns"), r"model\.sequence='columns' is not known: allowed pixels, rows"),
        (dict(hidden=0), r"model\.hidden=0: must be at least 1"),
        (dict(depth=0), r"model\.depth=0: must be at least 1"),
        (dict(width=0.0), r"model\.width=0\.0: must be above 0"),
        (dict(cell="gru", forget_bias=0.0), r"model\.forget_bias=0\.0: cell='gru' has no forget"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        shapes(**options)
