"""Losses, FID and IS against NumPy and SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from efficient_nets import data
from efficient_nets.tasks import image_scores
from efficient_nets.tasks.generation import LEVEL, Generation, to_pixels

RNG = np.random.default_rng(0)


def of(features):
    return image_scores.Gaussian(features.mean(0), np.cov(features, rowvar=False))


def test_hinge_loss():
    scores, real = RNG.normal(size=8) * 2, np.array([1, 0, 0, 1, 1, 0, 0, 0])
    loss, metrics = Generation().loss(jnp.asarray(scores, jnp.float32), jnp.asarray(real))
    own, made = scores[real == 1], scores[real == 0]
    expected = np.maximum(0, 1 - own).mean() + np.maximum(0, 1 + made).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # float32, eight terms
    np.testing.assert_allclose(metrics["real_score"], own.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["made_score"], made.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        Generation().generator_loss(jnp.asarray(made, jnp.float32)), -made.mean(), rtol=1e-6
    )


def test_inputs_are_levels_with_noise_of_half_of_one():
    image = jnp.asarray(RNG.integers(0, 256, (4, 6, 6, 1)), jnp.uint8)
    config = data_config()
    info = data.Info("any", 3, (6, 6, 1), (0.5,), (0.5,))
    inputs = lambda key: Generation().inputs(  # noqa: E731
        jax.random.key(key),
        {"image": image, "label": jnp.zeros(4, jnp.int32)},
        config_data=config,
        info=info,
    )[0]
    off = np.asarray(inputs(0)) - (np.asarray(image, np.float64) / 255 * 2 - 1)
    assert LEVEL / 4 < np.abs(off).max() <= LEVEL / 2 + 1e-6
    assert not np.array_equal(inputs(0), inputs(1))
    np.testing.assert_array_equal(to_pixels(jnp.asarray(image / 255 * 2 - 1, jnp.float32)), image)


def data_config():
    from ml_collections import ConfigDict

    return ConfigDict(data.defaults())


@pytest.mark.parametrize("samples", [50, 4])
def test_frechet_distance_is_that_of_the_matrix_root(samples):
    """Of 4 samples of 6 features both covariances are singular."""
    a, b = (RNG.normal(size=(samples, 6)) @ RNG.normal(size=(6, 6)) + shift for shift in (0, 1))
    mine = image_scores.frechet_distance(of(a), of(b))
    root = scipy.linalg.sqrtm(of(a).covariance @ of(b).covariance + 1e-14 * np.eye(6))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        of(a).covariance + of(b).covariance - 2 * root.real
    )
    np.testing.assert_allclose(mine, expected, rtol=1e-5)  # roots of 1e-14 beside those of 1
    assert abs(image_scores.frechet_distance(of(a), of(a))) < 1e-9


def test_frechet_distance_of_diagonal_gaussians():
    """`sum (m - n)^2 + (s - t)^2` of means m, n and deviations s, t."""
    m, n, s, t = RNG.uniform(0, 2, (4, 5))
    pair = [image_scores.Gaussian(m, np.diag(s**2)), image_scores.Gaussian(n, np.diag(t**2))]
    expected = np.sum((m - n) ** 2 + (s - t) ** 2)
    np.testing.assert_allclose(image_scores.frechet_distance(*pair), expected, rtol=1e-12)


def test_moments_of_batches_are_those_of_all():
    """Means of 1000 beside deviations of 1, which sums of squares in float32 would lose."""
    x, logits = RNG.normal(size=(12, 3)) + 1000, 3 * RNG.normal(size=(12, 4))
    weights = np.ones(12)
    weights[10:] = 0
    total = image_scores.no_moments(3, 4)
    for rows in (slice(0, 5), slice(5, 8), slice(8, 12)):
        given = (jnp.asarray(value[rows], jnp.float32) for value in (x, logits, weights))
        total = image_scores.merged(total, image_scores.moments(*given))
    x, logits = x[:10], logits[:10]
    found = image_scores.gaussian(total)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6)
    # float32 holds a value of 1000 to 6e-5.
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), atol=1e-3)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    divergence = np.sum(p * np.log(p / p.mean(0)), axis=1)
    np.testing.assert_allclose(
        image_scores.inception_score(total), np.exp(divergence.mean()), rtol=1e-5
    )
