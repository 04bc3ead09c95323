"""Linear maps `(x, kernels) -> z`, linear in `x` and in each kernel: the algorithm axis.

A neuron with several branches (see `ops.quadratic`) needs several linear maps of one input. They
are fused: the branch kernels are concatenated on the output axis, so one convolution computes them
all and its gradient is one input gradient and one kernel gradient.

A map is a frozen, hashable dataclass, so that it can be a static argument of a `custom_vjp`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Padding = str | tuple[tuple[int, int], ...]


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The type of products and sums of numbers of this type: float32, or float64 for its own."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def fuse(parts: Sequence[Array], groups: int = 1) -> Array:
    """Concatenates B arrays `(..., C)` to `(..., B*C)`, interleaved by group.

    Group g of the result is (a_g, b_g, ...), which is what a grouped convolution needs: its output
    channels are cut into `groups` contiguous runs, and run g may read input group g only.
    """
    if len(parts) == 1:
        return parts[0]
    if groups == 1:
        return jnp.concatenate(parts, axis=-1)
    lead, channels = parts[0].shape[:-1], parts[0].shape[-1]
    runs = [part.reshape(*lead, groups, channels // groups) for part in parts]
    return jnp.stack(runs, axis=-2).reshape(*lead, len(parts) * channels)


def split(z: Array, branches: int, groups: int = 1) -> list[Array]:
    """Undoes `fuse`: `(..., B*C)` to B arrays `(..., C)`."""
    if branches == 1:
        return [z]
    if groups == 1:
        return jnp.split(z, branches, axis=-1)
    lead, width = z.shape[:-1], z.shape[-1] // branches
    runs = z.reshape(*lead, groups, branches, width // groups)
    return [runs[..., branch, :].reshape(*lead, width) for branch in range(branches)]


@dataclasses.dataclass(frozen=True)
class DenseMap:
    """Matrix product. x `(..., in)`, each kernel `(in, out)`, result `(..., B*out)`.

    `out` is the type of the result and of its sums, x's if not given.
    """

    groups: int = 1

    def __call__(
        self, x: Array, kernels: Sequence[Array], *, out: jnp.dtype | None = None
    ) -> Array:
        return jnp.matmul(x, fuse(kernels).astype(x.dtype), preferred_element_type=out)

    def padded(self, x: Array) -> "tuple[Array, DenseMap]":
        """x with its padding, which is none, and the map of that."""
        return x, self

    def window_mean(self, x: Array) -> Array:
        """The mean of the positions that each output reads: one here."""
        return x

    def windows(self, x: Array) -> Array:
        """The inputs of each output value: `(..., in)` to `(..., 1, in)`."""
        return jnp.expand_dims(x, -2)


@dataclasses.dataclass(frozen=True)
class ConvMap:
    """Direct convolution over 1, 2 or 3 spatial axes.

    x `(N, *spatial, in)`, each kernel `(*kernel_size, in/groups, out)`, result
    `(N, *spatial', B*out)`. `kernel_size` is not asked for by the map itself.
    """

    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int = 1
    kernel_size: tuple[int, ...] = ()

    def __call__(
        self, x: Array, kernels: Sequence[Array], *, out: jnp.dtype | None = None
    ) -> Array:
        kernel = fuse(kernels, self.groups).astype(x.dtype)
        if kernel.shape[-2] > 1 or self.groups == 1 or not jnp.issubdtype(x.dtype, jnp.floating):
            return self._convolved(x, kernel, out)
        return self._depthwise(x, kernel, out)

    @functools.partial(jax.jit, static_argnums=(0, 3))  # or each eager call would compile again
    def _depthwise(self, x: Array, kernel: Array, out: jnp.dtype | None) -> Array:
        # XLA:CPU takes about ten times as long for a depthwise convolution of its own.
        tap_by_tap, convolved = (
            functools.partial(way, out=out) for way in (self._tap_by_tap, self._convolved)
        )
        return lax.platform_dependent(x, kernel, cpu=tap_by_tap, default=convolved)

    def _convolved(self, x: Array, kernel: Array, out: jnp.dtype | None) -> Array:
        spatial = "DHW"[-len(self.strides) :]
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=self.strides,
            padding=self.padding,
            rhs_dilation=self.dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=self.groups,
            preferred_element_type=out,
        )

    def _tap_by_tap(self, x: Array, kernel: Array, out: jnp.dtype | None) -> Array:
        """The same of a depthwise kernel `(*kernel_size, 1, C)`: x moved and multiplied, added up.

        A scan, and products that are made again in the backward pass: all taps at once would keep
        an array of x's size for each.
        """
        kernel_size, features = kernel.shape[:-2], kernel.shape[-1]
        exact = dataclasses.replace(self, kernel_size=kernel_size)
        moved = np.stack(np.unravel_index(np.arange(math.prod(kernel_size)), kernel_size), axis=-1)
        starts = np.pad(moved * np.asarray(self.dilation, np.int32), [(0, 0), (1, 1)])
        taps = kernel.reshape(-1, features).astype(wide(x.dtype))
        size = exact.output_size(x)
        reach = [max((n - 1) * stride + 1, 0) for n, stride in zip(size, self.strides, strict=True)]
        x = exact.padded(x)[0]

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def product(x, start, tap):
            part = lax.dynamic_slice(x, tuple(start), (x.shape[0], *reach, x.shape[-1]))
            part = part[(slice(None), *(slice(None, None, stride) for stride in self.strides))]
            part = jnp.repeat(part.astype(tap.dtype), features // x.shape[-1], axis=-1)
            return part * tap.reshape(*(1,) * (part.ndim - 1), -1)

        def add(total, start_tap):
            return total + product(x, *start_tap), None

        starts = jnp.asarray(starts, jnp.int32)
        total = product(x, starts[0], taps[0])
        return lax.scan(add, total, (starts[1:], taps[1:]))[0].astype(out or x.dtype)

    def padded(self, x: Array) -> "tuple[Array, ConvMap]":
        """x with its padding of zeros, and the map of that, which pads no more."""
        x = jnp.pad(x, ((0, 0), *self.pads(x), (0, 0)))
        return x, dataclasses.replace(self, padding="VALID")

    def window_mean(self, x: Array) -> Array:
        """The mean over each window, zeros of the padding included: `(N, *spatial, 1)` to
        `(N, *spatial', 1)`."""
        ones = jnp.full((*self.kernel_size, 1, 1), 1 / math.prod(self.kernel_size), x.dtype)
        return dataclasses.replace(self, groups=1)(x, [ones])

    def output_size(self, x: Array) -> tuple[int, ...]:
        """`spatial'` for this x."""
        sizes = zip(x.shape[1:-1], self.pads(x), self._extents, self.strides, strict=True)
        return tuple(max((n + sum(pads) - e) // s + 1, 0) for n, pads, e, s in sizes)

    def windows(self, x: Array) -> Array:
        """The inputs of each output value: `(N, *spatial, in)` to `(N, *spatial', groups, n)`.

        The n = prod(kernel_size) * in / groups are in the order of a kernel's rows.
        """
        extents = self._extents
        x = jnp.pad(x, ((0, 0), *self.pads(x), (0, 0)))
        x = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        slices = []
        for position in np.ndindex(*self.kernel_size):
            starts = [i * d for i, d in zip(position, self.dilation, strict=True)]
            stops = [  # no window fits where the input is smaller
                max(size - extent + 1, 0) + start
                for size, extent, start in zip(x.shape[1:-2], extents, starts, strict=True)
            ]
            window = map(slice, starts, stops, self.strides)
            slices.append(x[(slice(None), *window)])
        return jnp.concatenate(slices, axis=-1)

    @property
    def _extents(self) -> list[int]:
        return [(k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    def pads(self, x: Array) -> Sequence[tuple[int, int]]:
        """The zeros in front of and behind each spatial axis of this x."""
        if not isinstance(self.padding, str):
            return self.padding
        return lax.padtype_to_pads(x.shape[1:-1], self._extents, self.strides, self.padding)
