"""The losses of classification, in training and in evaluation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_nets import config as configs
from efficient_nets import data, experiment
from efficient_nets.errors import UserError
from efficient_nets.tasks import classification
from efficient_nets.tasks.classification import LOSSES, Classification
from tests import tiny_config


def scalar_cross_entropy(row, label):
    return math.log(sum(map(math.exp, row))) - row[label]


def scalar_squared_hinge(row, label):
    signs = [1 if k == label else -1 for k in range(len(row))]
    return sum(max(0, 1 - t * z) ** 2 for t, z in zip(signs, row, strict=True)) / len(row)


SCALAR = {"cross_entropy": scalar_cross_entropy, "squared_hinge": scalar_squared_hinge}
each_loss = pytest.mark.parametrize("name", LOSSES)


def expected_loss(name, logits, labels):
    """Of soft labels: the mean over labels that are drawn from them, in Python's floats."""
    return np.mean(
        [
            sum(share * SCALAR[name](row, label) for label, share in enumerate(shares))
            for row, shares in zip(logits.tolist(), labels.tolist(), strict=True)
        ]
    )


@pytest.fixture
def batch():
    """Logits on both sides of 1 and -1, and mixed labels."""
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.standard_normal((5, 7)), rng.integers(0, 7, 5)
    hard = np.eye(7)[labels]
    return logits, labels, 0.7 * hard + 0.3 * np.roll(hard, 1, axis=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@each_loss
def test_a_loss_and_its_gradient_are_those_of_the_scalar_reference(name, smoothing, batch):
    logits, _, labels = batch
    task = Classification(smoothing, LOSSES[name])
    value, gradient = jax.value_and_grad(lambda z: task.loss(z, jnp.float32(labels))[0])(
        jnp.float32(logits)
    )
    smooth = (1 - smoothing) * labels + smoothing / 7
    # float32, sums of 35 terms.
    assert value == pytest.approx(expected_loss(name, logits, smooth), rel=1e-5)
    for index in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-6
        above, below = (expected_loss(name, logits + s, smooth) for s in (step, -step))
        assert gradient[index] == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


@each_loss
def test_evaluation_has_training_s_loss_without_smoothing(name, batch):
    logits, labels, _ = batch
    logits, labels = jnp.bfloat16(logits), jnp.int32(labels)
    scores = Classification(0.1, LOSSES[name]).scores(logits, labels, jnp.float32([1, 1, 1, 1, 0]))
    plain = Classification(sample_loss=LOSSES[name])
    expected = plain.label_loss(logits[:4], labels[:4])
    # float32 sums of four.
    np.testing.assert_allclose(classification.summarise(scores)["loss"], expected, rtol=1e-6)


def test_the_default_is_cross_entropy(batch):
    logits, labels, mixed = (jnp.asarray(x, x.dtype.name.replace("64", "32")) for x in batch)
    config = tiny_config.get_config()
    task = experiment.build(config, data.load(config.data)).task
    assert task == Classification() and task.sample_loss is optax.softmax_cross_entropy
    loss, _ = task.loss(logits, mixed)
    np.testing.assert_array_equal(loss, jnp.mean(optax.softmax_cross_entropy(logits, mixed)))
    scores = task.scores(logits, labels, jnp.ones(5, jnp.float32))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    # float32 rounding of another formula.
    np.testing.assert_allclose(classification.summarise(scores)["loss"], expected, rtol=1e-6)


def test_a_config_says_which_loss():
    config = tiny_config.get_config()
    config.train.loss = "squared_hinge"
    assert experiment.build(config, data.load(config.data)).task.sample_loss is (
        classification.squared_hinge
    )
    config.train.loss = "squared_hing"
    with pytest.raises(UserError, match="train.loss='squared_hing' is not known: .*squared_hinge'"):
        configs.check(config)
