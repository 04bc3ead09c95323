"""What generated images are judged by: FID and IS, from the features and logits of some classifier.

Both compare nets only where the classifier is the same one, the published values being those of an
Inception net trained on ImageNet.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Moments(NamedTuple):
    """Of features x `(N, D)` and the class probabilities p `(N, classes)` of logits, so far.

    Scatter is around the mean, and not the sum of products, whose difference with that of the mean
    would leave nothing of float32 where features are large beside their deviation.

    Attributes:
      count: Images.
      mean: Of x, `(D,)`.
      scatter: `sum (x - mean)(x - mean)^T`, `(D, D)`.
      classes: Sum of p, `(classes,)`.
      negentropy: Sum of `sum_k p_k log p_k`.
    """

    count: Array
    mean: Array
    scatter: Array
    classes: Array
    negentropy: Array


def no_moments(features: int, classes: int) -> Moments:
    """Those of no images, as NumPy arrays in float32."""
    shapes = Moments((), (features,), (features, features), (classes,), ())
    return Moments(*(np.zeros(shape, np.float32) for shape in shapes))


def moments(features: Array, logits: Array, weights: Array) -> Moments:
    """Of one batch, in float32; rows of weight 0 do not count.

    Args:
      features: `(N, D)`.
      logits: `(N, classes)`.
      weights: `(N,)` of 0 or 1.
    """
    x, logits, weights = (value.astype(jnp.float32) for value in (features, logits, weights))
    count = jnp.sum(weights)
    exact = lax.Precision.HIGHEST
    mean = jnp.matmul(weights, x, precision=exact) / jnp.maximum(count, 1)
    centred = (x - mean[None]) * weights[:, None]
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p) * weights[:, None]
    scatter = jnp.matmul(centred.T, centred, precision=exact)
    return Moments(count, mean, scatter, jnp.sum(p, axis=0), jnp.sum(p * log_p))


def merged(a: Moments, b: Moments) -> Moments:
    """Those of both batches together, neither being larger than it was (Chan et al. 1983)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    apart = b.mean - a.mean
    return Moments(
        count,
        a.mean + share * apart,
        a.scatter + b.scatter + a.count * share * jnp.outer(apart, apart),
        a.classes + b.classes,
        a.negentropy + b.negentropy,
    )


class Gaussian(NamedTuple):
    """Mean `(D,)` and covariance `(D, D)`, float64 on the host."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian(found: Moments) -> Gaussian:
    """Of moments over two or more images; the covariance is the unbiased one, as of FID."""
    mean, scatter = (np.asarray(value, np.float64) for value in (found.mean, found.scatter))
    return Gaussian(mean, scatter / (float(found.count) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))` (FID, arXiv 1706.08500).

    C_a C_b has the eigenvalues of the symmetric `C_a^(1/2) C_b C_a^(1/2)`, whose roots are the
    singular values of `C_a^(1/2) C_b^(1/2)`: their sum is the trace of the root. Covariances of
    fewer samples than features are singular, which this allows.
    """
    roots = [_root(of.covariance) for of in (a, b)]
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    root = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * root)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root; eigenvalues that rounding made negative are 0."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def inception_score(found: Moments) -> float:
    """`exp(mean KL(p(y|x) || p(y)))` (Salimans et al., arXiv 1606.03498), p(y) that of all images.

    Over all at once, and not the mean over ten parts of them, which is a little less. From 1 for
    images that all look alike to the number of classes.
    """
    count = float(found.count)
    p = np.asarray(found.classes, np.float64) / count
    seen = p[p > 0]
    return float(np.exp(float(found.negentropy) / count - np.sum(seen * np.log(seen))))
