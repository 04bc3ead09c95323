"""Group-Net (arXiv 1811.10413): a block as a sum of several, with gates between groups."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array


class Group(nnx.Module):
    """K blocks `bases` of the same shape side by side, as `y = sum_k scale_k base_k(x_k)`.

    Without gates each x_k of the next group is y. With gates theta it is

        x_k = sigmoid(theta_k) base_k(...) + (1 - sigmoid(theta_k)) y

    so a base may keep to its own branch or read the sum. One base without gates is the block: scale
    starts at 1 / K. theta starts at 0, half of each.

    Args:
      make: `rngs -> block`.
      bases: K.
      gated: Whether there are gates behind this group; the last one of a net needs none.
      rngs: Source of the initial values.
    """

    def __init__(
        self, make: Callable[[nnx.Rngs], nnx.Module], bases: int, *, gated: bool, rngs: nnx.Rngs
    ):
        self.bases = nnx.List([make(rngs) for _ in range(bases)])
        self.scale = nnx.Param(jnp.full((bases,), 1 / bases))
        self.gate = nnx.data(nnx.Param(jnp.zeros((bases,))) if gated else None)

    def __call__(self, branches: tuple[Array, ...]) -> tuple[Array, ...]:
        """What each base reads, to what each of the next group does: K images of a shape each."""
        outputs = [base(x) for base, x in zip(self.bases, branches, strict=True)]
        scale = self.scale[...].astype(outputs[0].dtype)
        total = sum(scale[k] * output for k, output in enumerate(outputs))
        if self.gate is None:
            return (total,) * len(outputs)
        gate = nnx.sigmoid(self.gate[...]).astype(total.dtype)
        return tuple(gate[k] * y + (1 - gate[k]) * total for k, y in enumerate(outputs))
