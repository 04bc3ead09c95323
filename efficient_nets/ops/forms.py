"""Quadratic forms `x' W x`, one a feature, of symmetric matrices stored without their copies.

A symmetric matrix of n inputs has n (n + 1) / 2 coefficients, one for each product x_i x_j with
i <= j. They are stored by cyclic diagonals: block d holds the coefficients of

    x_i x_((i + d) mod n),    i = 0 .. n - 1,    d = 0 .. (n - 1) // 2

and, where n is even, a last half block those of d = n / 2, i = 0 .. n / 2 - 1. Every product occurs
once, a block's products are one elementwise product of x with a shift of itself, and its sum is one
matrix product: no coefficient is computed twice, and never do all n^2 products exist at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from efficient_nets.ops import linear_maps


def pairs(n: int) -> int:
    """Products x_i x_j with i <= j of n inputs."""
    return n * (n + 1) // 2


def quadratic_form(x: Array, kernel: Array) -> Array:
    """`y[..., o] = sum over i <= j of w_ijo x_i x_j`, group by group.

    Args:
      x: `(..., groups, n)`.
      kernel: `(n (n + 1) / 2, features)`, see above for its rows; features are cut into `groups`
        contiguous runs. Taken in x's dtype, as are the products x_i x_j.

    Returns:
      `(..., features)`, summed in float32 or wider. Its gradient keeps x and kernel alone.
    """
    *lead, groups, n = x.shape
    wide = linear_maps.wide(x.dtype)
    kernel = kernel.astype(x.dtype).reshape(pairs(n), groups, -1)
    diagonals = (n + 1) // 2
    whole = kernel[: n * diagonals].reshape(diagonals, n, *kernel.shape[1:])

    def weighted(products, weights):
        return jnp.einsum("...gi,igo->...go", products, weights, preferred_element_type=wide)

    # Recomputed in the backward: else every diagonal's products would be kept, n / 2 times x.
    @jax.checkpoint
    def diagonal(twice, weights, d):
        shifted = lax.dynamic_slice_in_dim(twice, d, n, axis=-1)
        return weighted(twice[..., :n] * shifted, weights)

    twice = jnp.concatenate([x, x], axis=-1)
    y = jnp.zeros((*lead, *kernel.shape[1:]), wide)
    y, _ = lax.scan(
        lambda y, block: (y + diagonal(twice, *block), None),
        y,
        (whole, jnp.arange(diagonals, dtype=jnp.int32)),
    )
    if n % 2 == 0:
        y = y + weighted(x[..., : n // 2] * x[..., n // 2 :], kernel[n * diagonals :])
    return y.reshape(*lead, -1)


def form_matrices(kernel: Array) -> Array:
    """The symmetric matrices W of `quadratic_form`'s kernel: `(pairs, features)` to
    `(features, n, n)`, so that `y_o = x' W_o x`."""
    n = (int(np.sqrt(8 * kernel.shape[0] + 1)) - 1) // 2
    distance, row = np.divmod(np.arange(pairs(n)), n)
    column = (row + distance) % n
    half = jnp.moveaxis(kernel, -1, 0) / 2
    matrices = jnp.zeros((kernel.shape[-1], n, n), kernel.dtype)
    return matrices.at[:, row, column].add(half).at[:, column, row].add(half)
