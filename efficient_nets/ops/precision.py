"""The precision axis: what is rounded in front of a linear map, and how the gradient passes."""

import dataclasses
from collections.abc import Callable

from jax import Array


def _same(x: Array) -> Array:
    return x


@dataclasses.dataclass(frozen=True)
class Precision:
    """What is rounded.

    Attributes:
      input: Array to array of the same shape, applied to what a layer reads. Its gradient is its
        own: a straight-through estimator by `jax.lax.stop_gradient` or `jax.custom_vjp`.
      kernel: The same of a branch's kernel.
    """

    input: Callable[[Array], Array] = _same
    kernel: Callable[[Array], Array] = _same


PRECISIONS = {"float": Precision()}
