"""Embedding: vectors of whole numbers, in one table or in the cores of a factorized one."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers.geometry import Geometry, Initializer
from efficient_nets.layers.linear import Layer
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.ops import factorization, linear_maps

# Variance 1 / features, so that a row has length 1 in the mean, as in `flax.nnx.Embed`.
embed_normal = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

# What a lookup leaves to choose beside `kernel`; it multiplies nothing that `backward` could save.
ALLOWED = {
    "neuron": ("linear",),
    "norm": ("none",),
    "kernel_norm": ("none",),
    "algorithm": ("direct",),
    "precision": ("float",),
    "start": ("own", "kept"),
    "joint": ("",),
}


class Embedding(Layer):
    """Rows of a kernel: ids `(...)` to `(..., features)`.

    It is a layer as `Dense` is, with one branch `w` and no bias, so that `convert` finds it,
    decomposes a trained table with `start='kept'`, and makes the table of its cores again.

    A lookup gathers slices of the cores and contracts them, see `ops.factorization.lookup`: the
    table never exists but with run='reconstructed', and with 'auto' where it takes fewer operations
    and bytes. Only the start draws one once, whose mean square the fresh cores take on.

    Ids from -vocabulary to -1 count from the end and the rows of others outside of the vocabulary
    are NaN, as in `flax.nnx.Embed`.

    Args:
      vocabulary: Number of ids.
      features: Size of the last axis of the output.
      spec: Its `kernel` alone is open, and `start`, 'own' or 'kept'.
      dtype: Type of the output, and of the products of cores; `param_dtype` if not given.
      param_dtype: Type of the parameters.
      kernel_init: Of the shape `(vocabulary, features)`.
      rngs: Source of the initial values.

    Raises:
      UserError: if a number is below 1 or another axis of the spec is set; on a call, if ids are
        not integers.
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        spec: LayerSpec | None = None,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: Initializer = embed_normal,
        rngs: nnx.Rngs,
    ):
        if vocabulary < 1:
            raise UserError(f"vocabulary={vocabulary}: must be at least 1")
        _check(spec or LayerSpec())
        init = (False, kernel_init, nnx.initializers.zeros, dtype, param_dtype)
        super().__init__(Geometry(vocabulary, features, (), (), "VALID", (), 1, *init), spec, rngs)

    def __call__(self, ids: Array) -> Array:
        if self.prepare is not None:
            self.prepare(self, ids)
        y = factorization.lookup(self.drawn("w"), ids, self.geometry.dtype)
        self.count()
        if self.watch is not None:
            self.watch(self, ids, y)
        return y

    def attend(self, x: Array) -> Array:
        """`x @ kernel.T`: `(..., features)` to `(..., vocabulary)`, of tied output layers.

        The map of the transposed network, so that x goes from core to core or meets the table that
        they make as in `Dense`. The compute type is `dtype`, x's if not given.
        """
        features = self.geometry.features
        if x.ndim == 0 or x.shape[-1] != features or not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(
                f"features={features}: attend takes floating (..., features), not "
                f"{x.dtype} {x.shape}"
            )
        x = x.astype(self.geometry.dtype or x.dtype)
        kernel = self.drawn("w")
        self.count()
        if self.w.factored:
            kernel = dataclasses.replace(kernel, network=kernel.network.transposed)
            y = factorization.factorized_map(linear_maps.DenseMap(), x, [kernel])
        else:
            y = linear_maps.DenseMap()(x, [kernel.T])
        if self.watch is not None:
            self.watch(self, x, y)
        return y

    def check_input(self, x: Array) -> None:
        """Of `layer_norm_act`, which is for floating inputs."""
        raise UserError("an Embedding is called by itself, its norm and activation behind it")

    def respecify(self, spec: LayerSpec, rngs: nnx.Rngs, *, joins: bool = False) -> None:
        _check(spec)
        super().respecify(spec, rngs, joins=joins)

    def remove(self, rngs: nnx.Rngs) -> None:
        raise UserError("an Embedding cannot be removed: nothing else makes vectors of its ids")


def _check(spec: LayerSpec) -> None:
    for field, allowed in ALLOWED.items():
        value = str(getattr(spec, field))
        if value not in allowed:
            raise UserError(
                f"{field}={value!r}: an Embedding looks rows up; allowed "
                + ", ".join(name or "''" for name in allowed)
            )
