"""The static shape of a Dense or Conv, and the checks of what a caller gives for it."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.ops import linear_maps

Initializer = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """All that a layer is built from, so that `convert` can build it anew with another spec."""

    in_features: int
    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: linear_maps.Padding
    dilation: tuple[int, ...]
    groups: int
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer
    dtype: jnp.dtype | None
    param_dtype: jnp.dtype

    def __post_init__(self):
        for field in ("in_features", "features", "groups"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)}: must be at least 1")
        for field in ("in_features", "features"):
            if getattr(self, field) % self.groups:
                raise UserError(
                    f"groups={self.groups} does not divide {field}={getattr(self, field)}"
                )

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return (*self.kernel_size, self.in_features // self.groups, self.features)

    @property
    def direct_map(self) -> linear_maps.DenseMap | linear_maps.ConvMap:
        """The linear map as `lax` computes it."""
        if not self.kernel_size:
            return linear_maps.DenseMap()
        return linear_maps.ConvMap(
            self.strides, self.padding, self.dilation, self.groups, self.kernel_size
        )

    @property
    def inputs(self) -> int:
        """n, the number of inputs of an output value."""
        return math.prod(self.kernel_shape[:-1])


def per_axis(field: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """A whole number, or one for each of `rank` spatial axes, as a tuple."""
    values = np.broadcast_to(value, rank) if np.ndim(value) == 0 else np.asarray(value)
    if values.shape != (rank,) or values.dtype.kind not in "iu" or values.min() < 1:
        raise UserError(f"{field}={value}: give a positive whole number, or {rank} of them")
    return tuple(values.tolist())


def padding_of(value, rank: int) -> linear_maps.Padding:
    """'SAME', 'VALID', or a (low, high) pair for each of `rank` spatial axes."""
    if isinstance(value, str):
        if value not in ("SAME", "VALID"):
            raise UserError(
                f"padding={value!r}: allowed 'SAME', 'VALID', a number, or {rank} of them"
            )
        return value
    sides = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    pairs = [tuple(side) if isinstance(side, Sequence) else (side, side) for side in sides]
    numbers = [number for pair in pairs for number in pair]
    whole = all(isinstance(number, int | np.integer) and number >= 0 for number in numbers)
    if [len(pair) for pair in pairs] != [2] * rank or not whole:
        raise UserError(
            f"padding={value}: give 'SAME', 'VALID', a whole number, or {rank} of them or of pairs"
        )
    return tuple((int(low), int(high)) for low, high in pairs)
