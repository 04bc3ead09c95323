"""Spectral normalisation of kernels: `kernel_norm='spectral'`.

    W / sigma(W)

sigma is the largest singular value of the kernel as a matrix with a row an input of a window and a
column a feature (Miyato et al. 2018, arXiv 1802.05957). A linear layer whose windows do not overlap
then changes distances by a factor of 1 at most. Each branch of a neuron has its own sigma, so that
a product of two normed maps grows with the square of the input: such a layer has no such bound.

sigma is found by the power iteration, of which each call in training makes one step:

    v = W u / |W u|,  u = W^T v / |W^T v|

and then is `|W u|` for the unit vector u that is kept. Its gradient with u held fixed is `v u^T`,
which is that of the singular value itself once u is its singular vector (their equation 12).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from efficient_nets.ops import factorization
from efficient_nets.ops.factorization import Factored


class Direction(nnx.Variable):
    """A unit vector that the power iteration turns; moved in training only, by no gradient."""


class SpectralNorm(nnx.Module):
    """What one kernel is divided by.

    Attributes:
      u: The right singular vector so far, `(features,)`.
      use_running_average: As of a batch norm: `model.eval()` sets it, and nothing moves then.
    """

    def __init__(self, features: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.use_running_average = False
        start = nnx.initializers.normal(1.0)(rngs.params(), (features,), dtype)
        self.u = Direction(start / jnp.linalg.norm(start))

    def sigma(self, kernel: Array) -> Array:
        """`|W u| / |u|`, a scalar; 1 where that is 0, so that a kernel of zeros stays one.

        u has the length 1 but in a net whose arrays are moving averages.
        """
        u = lax.stop_gradient(self.u[...])
        square = jnp.sum(jnp.square(_matrix(kernel) @ (u / jnp.linalg.norm(u))))
        return jnp.sqrt(jnp.where(square > 0, square, 1))

    def normed(self, kernel: Array | Factored) -> Array | Factored:
        """The kernel divided by sigma; of a factorized one its last core."""
        if not isinstance(kernel, Factored):
            return kernel / self.sigma(kernel)
        last = kernel.network.cores[-1][0]
        divided = kernel.cores[last] / self.sigma(factorization.dense(kernel))
        return dataclasses.replace(kernel, cores=dict(kernel.cores) | {last: divided})

    def advance(self, kernel: Array | Factored) -> None:
        """One step of the power iteration, in training."""
        if self.use_running_average:
            return
        matrix, u = lax.stop_gradient(_matrix(factorization.dense(kernel))), self.u[...]
        v = _unit(matrix @ u, jnp.zeros_like(matrix[:, 0]))
        self.u[...] = _unit(v @ matrix, u)


def _matrix(kernel: Array) -> Array:
    return kernel.reshape(-1, kernel.shape[-1])


def _unit(x: Array, otherwise: Array) -> Array:
    """x at length 1, or the other one where it is 0."""
    size = jnp.linalg.norm(x)
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), otherwise)
