"""Tensor nets against their formulas in NumPy's float64; what their logits and errors say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import deploy, layers, models
from efficient_nets.errors import UserError
from efficient_nets.ops import tproduct
from tests.models import reference

IMAGE = (6, 8, 2)
# float64 rounding of sums of up to some hundred products.
close = dict(rtol=1e-9, atol=1e-9)


def t_layer(x, values, name, by):
    """x `(tubes, N, rows)`, one matrix product for each slice."""
    forward, inverse = by.matrices
    kernel, bias = values[f"{name}/kernel"], values[f"{name}/bias"]
    x, kernel = (np.tensordot(forward, z, 1) for z in (x, kernel))
    slices = np.stack([x[s] @ kernel[s] for s in range(by.size)])
    return np.tensordot(inverse, slices, 1).real + bias[:, None]


def log_probabilities(x, by):
    slices = np.exp(np.tensordot(by.matrices[0], x, 1))
    return np.log(np.mean(slices / slices.sum(-1, keepdims=True), axis=0))


def logits(x, values, by, depth, readout):
    for number in range(depth):
        x = np.maximum(t_layer(x, values, f"hidden/{number}", by), 0)
    if readout == "tubal_softmax":
        return log_probabilities(t_layer(x, values, "head", by), by)
    flat = np.concatenate(list(x), axis=-1)
    return reference.dense(flat, reference.part(values, "head"))


each_readout = pytest.mark.parametrize(
    ("transform", "readout"), [("haar", "tubal_softmax"), ("dft", "dense")]
)


@each_readout
def test_tnn_is_its_formula(transform, readout, x64):
    options = dict(depth=2, transform=transform, readout=readout)
    model, values = reference.build("tnn", IMAGE, **options)
    images = np.random.default_rng(1).normal(size=(3, *IMAGE))
    x = np.stack([images[:, :, w].reshape(3, -1) for w in range(8)])
    expected = logits(x, values, tproduct.transform(transform, 8), 2, readout)
    np.testing.assert_allclose(jax.jit(model)(jnp.asarray(images)), expected, **close)


def test_slice_wise_each_slice_is_a_net_of_its_own(x64):
    options = dict(depth=1, transform="haar", readout="tubal_softmax", slice_wise=True)
    model, values = reference.build("tnn", IMAGE, **options)
    images = np.random.default_rng(1).normal(size=(3, *IMAGE))
    slices = np.einsum("st,nhtc->snhc", tproduct.transform("haar", 8).matrices[0], images)
    probabilities = np.zeros((3, 5))
    for s, x in enumerate(slices.reshape(8, 3, -1)):
        for name in ("hidden/0", "head"):
            x = x @ values[f"{name}/kernel"][s] + values[f"{name}/bias"][s]
            x = np.maximum(x, 0) if name == "hidden/0" else np.exp(x)
        probabilities += x / x.sum(-1, keepdims=True) / 8
    found = jax.jit(model)(jnp.asarray(images))
    np.testing.assert_allclose(found, np.log(probabilities), **close)


@each_readout
def test_conv_tnn_is_its_formula(transform, readout, x64):
    options = dict(depth=2, transform=transform, readout=readout, width=0.125)
    model, values = reference.build("conv_tnn", IMAGE, **options)
    images = np.random.default_rng(1).normal(size=(3, *IMAGE))
    x = images
    for name in ("conv1", "conv2"):
        conv = reference.part(values, f"{name}/w")
        x = np.maximum(reference.conv(x, conv["kernel"]) + conv["bias"], 0)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * height].reshape(3, height, 2, width, 2, -1).max((2, 4))
    x = np.stack([x[..., c].reshape(3, -1) for c in range(8)])
    expected = logits(x, values, tproduct.transform(transform, 8), 2, readout)
    np.testing.assert_allclose(jax.jit(model)(jnp.asarray(images)), expected, **close)


def test_logits_are_log_probabilities_to_which_every_slice_adds(x64):
    model, _ = reference.build("tnn", IMAGE, depth=1, readout="tubal_softmax")
    images = jnp.asarray(np.random.default_rng(1).normal(size=(3, *IMAGE)))
    graph, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(state):
        return nnx.merge(graph, state)(images)[:, 0].sum()

    np.testing.assert_allclose(np.exp(jax.jit(model)(images)).sum(-1), 1, **close)
    # With respect to the slices of the kernel, of an orthonormal transform.
    by = tproduct.transform("dct", 8)
    slices = np.tensordot(by.matrices[0], gradient(state)["head"]["kernel"][...], 1)
    assert np.abs(slices).max((1, 2)).min() > 1e-3


def test_slices_of_a_t_layer_add_up_to_any_dense_layer(x64):
    """What `_readout` says: of each dense kernel there is a t-layer's with the same sum."""
    by, draws = tproduct.transform("bior", 4), np.random.default_rng(0)
    x, dense = draws.normal(size=(4, 5, 3)), draws.normal(size=(4, 3, 2))
    kernel = np.tensordot(by.matrices[1], np.tensordot(by.matrices[1].T, dense, 1), 1)
    y = tproduct.product(jnp.asarray(x), jnp.asarray(kernel), by)
    found = tproduct.to_slices(y, by).sum(0)
    np.testing.assert_allclose(found, np.einsum("tni,tio->no", x, dense), **close)


def shapes(name, **options):
    return nnx.eval_shape(
        lambda: models.create(
            name, image_shape=(28, 28, 1), num_classes=10, rngs=nnx.Rngs(0), **options
        )
    )


def count(name, **options):
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes(name, **options), nnx.Param)))


def test_parameter_counts_are_those_of_the_docstrings():
    tnn = 4 * (28 * 28 * 28 + 28 * 28) + (28 * 28 * 10 + 10)
    dense = 4 * (784 * 784 + 784) + (784 * 10 + 10)
    assert count("tnn") == tnn
    assert {f"{tnn:,}", f"{dense:,}"} <= set(re.findall(r"[\d,]+\d", models.tnn.TNN.__doc__))
    conv_tnn = (26 * 32 + (25 * 32 + 1) * 64) + 64 * (49 * 32 + 32) + (64 * 32 * 10 + 10)
    assert count("conv_tnn") == conv_tnn
    said = set(re.findall(r"[\d,]+\d", models.tnn.ConvTNN.__doc__))
    assert {f"{conv_tnn:,}", f"{count('lenet'):,}"} <= said


def test_options_change_the_layers():
    def kernels(name, **options):
        found = layers.t_layers(shapes(name, **options))
        return {path: layer.kernel.shape for path, layer in found}

    assert kernels("tnn", depth=2, width=0.5, readout="tubal_softmax") == {
        "hidden/0": (28, 28, 14),
        "hidden/1": (28, 14, 14),
        "head": (28, 14, 10),
    }
    assert kernels("conv_tnn", depth=2, hidden=8) == {
        "hidden/0": (64, 49, 8),
        "hidden/1": (64, 8, 8),
    }


@pytest.mark.slow
def test_a_rounded_net_comes_back_from_its_file(tmp_path):
    """The t-layers stay as they are."""
    model, _ = reference.build(
        "conv_tnn", (4, 4, 1), [dict(match="conv", precision="minmax:w8a8")], "float32", width=0.125
    )
    deploy.save(model, tmp_path / "net.safetensors")
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 1)), jnp.float32)
    whole = deploy.load(nnx.eval_shape(lambda: model), tmp_path / "net.safetensors")
    np.testing.assert_array_equal(whole(images), deploy.to_integers(model)(images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tnn", dict(depth=0), r"model\.depth=0: must be at least 1"),
        ("conv_tnn", dict(hidden=0), r"model\.hidden=0: must be at least 1"),
        ("tnn", dict(transform="dctt"), r"model\.transform='dctt' is not known.*mean 'dct'"),
        ("tnn", dict(readout="softmax"), r"model\.readout='softmax' is not known.*'tubal_softmax'"),
        (
            "tnn",
            dict(transform="dft", readout="tubal_softmax"),
            r"model\.transform='dft': its slices are complex.*or give model\.readout='dense'",
        ),
        (
            "tnn",
            dict(transform="dft", slice_wise=True),
            r"model\.transform='dft'.*or give model\.slice_wise=False",
        ),
        ("conv_tnn", dict(width=1 / 64, transform="haar"), r"tubes=1: .* must be even"),
        ("tnn", dict(activation="rleu"), r"model\.activation='rleu'.*mean 'relu'"),
        ("conv_tnn", dict(width=0.0), r"model\.width=0\.0: must be above 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        shapes(name, **options)


def test_images_of_another_size_are_named():
    with pytest.raises(UserError, match=r"tubes=28, in_features=28: .* cannot be \(32, 2, 32\)"):
        nnx.eval_shape(lambda m, x: m(x), shapes("tnn"), jnp.zeros((2, 32, 32, 1)))
