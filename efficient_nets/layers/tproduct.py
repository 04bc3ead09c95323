"""TDense: a dense layer of tensors, whose rows are tubes and whose product is a t-product."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers.geometry import Initializer
from efficient_nets.ops import tproduct

# Of each frontal slice (in, out) by itself.
lecun_normal = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal", batch_axis=(0,))


class TDense(nnx.Module):
    """`kernel * x + bias` by `ops.tproduct`: x `(tubes, ..., in_features)` to `(..., features)`.

    A dense layer from tubes * in_features to tubes * features values with a tubes-th of its
    weights, and a tubes-th of its products but for the transforms.

    Attributes:
      kernel: `(tubes, in_features, features)`, before the transform, so that it is real under any.
      bias: `(tubes, features)` or None.
      transform, dtype: Static.
      watch: Static; as that of `layers.Layer`.

    Args:
      in_features: Rows of the input, its last axis.
      features: Rows of the output.
      transform: `ops.tproduct.transform(name or matrix, tubes)`.
      use_bias: Adds a tube to each row.
      dtype: Compute type of the products, the input's if not given; parameters stay in
        `param_dtype`. Under 'dft' the products are in float32 at least.
      kernel_init: Of the shape `(tubes, in_features, features)`. What it gives is divided by the
        root of `ops.tproduct.gain`, so that variance 1 / in_features keeps that of the input under
        any transform, orthonormal or not.
      rngs: Source of the initial values.

    Raises:
      UserError: if a number of features is below 1; on a call, if the input has other tubes or rows
        or is not floating.
    """

    watch: Callable | None = None

    def __init__(
        self,
        in_features: int,
        features: int,
        transform: tproduct.Transform,
        *,
        use_bias: bool = True,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        for field, value in (("in_features", in_features), ("features", features)):
            if value < 1:
                raise UserError(f"{field}={value}: must be at least 1")
        self.in_features, self.features = in_features, features
        self.transform, self.dtype = transform, dtype
        tubes = transform.size
        kernel = kernel_init(rngs.params(), (tubes, in_features, features), param_dtype)
        scale = 1 / np.sqrt(tproduct.gain(transform))
        self.kernel = nnx.Param(kernel * jnp.asarray(scale, param_dtype))
        bias = bias_init(rngs.params(), (tubes, features), param_dtype) if use_bias else None
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)

    def __call__(self, x: Array) -> Array:
        if x.ndim < 2 or (x.shape[0], x.shape[-1]) != (self.transform.size, self.in_features):
            raise UserError(
                f"tubes={self.transform.size}, in_features={self.in_features}: the input, "
                f"(tubes, ..., in_features), cannot be {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"the input has dtype {x.dtype}: a floating one is needed")
        x = x.astype(self.dtype or x.dtype)
        y = tproduct.product(x, self.kernel[...], self.transform)
        if self.bias is not None:
            bias = self.bias[...].astype(y.dtype)
            bias = bias.reshape(bias.shape[0], *(1,) * (y.ndim - 2), bias.shape[1])
            y = y + jnp.broadcast_to(bias, y.shape)
        if self.watch is not None:
            self.watch(self, x, y)
        return y
