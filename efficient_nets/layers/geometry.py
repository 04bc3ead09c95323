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
    def keeps_shape(self) -> bool:
        """The output has the input's shape, so that the identity can stand in."""
        return self.in_features == self.features and set(self.strides) <= {1} and self._pads_fully

    @property
    def _pads_fully(self) -> bool:
        """The window never shrinks the map: at stride s, S positions become ceil(S / s)."""
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if isinstance(self.padding, str):
            return self.padding == "SAME" or not any(spans)
        return [low + high for low, high in self.padding] == spans

    def adapter(self) -> "Geometry":
        """The 1x1 convolution with this one's channels, groups and strides, output shape too.

        Raises:
          UserError: if there is none: a dense layer has no window to give up, and where the window
            shrinks the map, a 1x1 one would not.
        """
        if not self.kernel_size:
            raise UserError(
                f"a dense layer from {self.in_features} to {self.features} features cannot be "
                "removed: nothing smaller changes the width"
            )
        if not self._pads_fully:
            raise UserError(
                f"a convolution with kernel_size={self.kernel_size} and padding={self.padding} "
                "cannot be removed: it shrinks the map, which only its window does"
            )
        rank = len(self.kernel_size)
        return dataclasses.replace(
            self, kernel_size=(1,) * rank, padding=((0, 0),) * rank, dilation=(1,) * rank
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
