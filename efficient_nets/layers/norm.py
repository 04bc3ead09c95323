"""Flax's norms, as our units need them; arrays of the batch norm for `ops.quadratic`."""

import math

from flax import nnx
from jax import Array, lax

from efficient_nets.ops import batch_norm, linear_maps


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over all axes but the last, statistics in two passes and in float32.

    Running averages move as `momentum * old + (1 - momentum) * batch`, in training mode only
    (`use_running_average=False`, which `model.train()` sets and `model.eval()` undoes).

    Args:
      features: Number of channels C.
      momentum: Share of the old running average that a step keeps.
      epsilon: Added to the variance.
    """

    def __init__(
        self, features: int, *, momentum: float = 0.9, epsilon: float = 1e-5, rngs: nnx.Rngs
    ):
        super().__init__(
            features,
            momentum=momentum,
            epsilon=epsilon,
            use_fast_variance=False,
            use_running_average=False,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        """Alone, without a layer in front; the output has the input's type."""
        return super().__call__(x.astype(linear_maps.wide(x.dtype))).astype(x.dtype)

    def arrays(self) -> batch_norm.Norm:
        """Scale and bias, with the running statistics if they are what normalises now."""
        frozen = (self.mean[...], self.var[...]) if self.use_running_average else (None, None)
        return batch_norm.Norm(self.scale[...], self.bias[...], *frozen)

    def update(self, batch: batch_norm.Moments) -> None:
        """Moves the running averages towards the batch's moments, `(C,)` each, if in training."""
        if self.use_running_average:
            return
        for average, new in ((self.mean, batch.mean), (self.var, batch.var)):
            new = new.astype(average.dtype)
            average[...] = self.momentum * average[...] + (1 - self.momentum) * new


class FrozenBatchNorm(BatchNorm):
    """A batch norm none of whose arrays ever moves, in training either.

    Scale and bias are parameters by name, so that a trained net's fit, but get no gradient. It is a
    fixed affine map, which a checkpoint gives; for nets that start from a trained one and whose
    batches are too small for statistics.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, rngs=rngs)

    def arrays(self) -> batch_norm.Norm:
        return lax.stop_gradient(super().arrays())

    def __call__(self, x: Array) -> Array:
        of = self.arrays()
        wide = x.astype(linear_maps.wide(x.dtype))
        return batch_norm.normalise(
            wide, of, batch_norm.Moments(of.mean, of.var), self.epsilon
        ).astype(x.dtype)

    # Flax's `train()` sets the attribute of every norm; here there is nothing to set.
    @property
    def use_running_average(self) -> bool:
        return True

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        pass


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm` (arXiv 1803.08494) of an image at a time, in float32; epsilon 1e-5.

    Mean and variance are over space and the channels of a group, `(N, groups)` of them; scale and
    bias are one a channel. The output has the input's type; the variance takes two passes.

    Args:
      features: Number of channels C.
      groups: Number of groups; 0 for groups of 16 channels (table 3 there), or of the greatest
        divisor of 16 that divides C.
    """

    def __init__(self, features: int, *, groups: int = 0, rngs: nnx.Rngs):
        super().__init__(
            features,
            num_groups=groups or features // math.gcd(16, features),
            epsilon=1e-5,
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        return super().__call__(x.astype(linear_maps.wide(x.dtype))).astype(x.dtype)


class InstanceNorm(GroupNorm):
    """Each channel of each image on its own (arXiv 1607.08022): as many groups as channels."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, groups=features, rngs=rngs)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis (epsilon 1e-6), in float32 whatever the input's type.

    The output has the input's type; the variance takes two passes.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return super().__call__(x.astype(linear_maps.wide(x.dtype))).astype(x.dtype)


def arrays_or_none(norm: BatchNorm | None) -> batch_norm.Norm | None:
    return None if norm is None else norm.arrays()


def normalise(norm: nnx.Module | None, x: Array) -> Array:
    return x if norm is None else norm(x)
