"""What the architectures share: padded convolutions, the head, pooling, activations."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, Layer, kaiming_normal, layer_norm_act
from efficient_nets.ops import linear_maps

Activation = Callable[[Array], Array]
head_init = nnx.initializers.normal(0.01)


def _same(x: Array) -> Array:
    return x


def _gelu(x: Array) -> Array:
    """x Phi(x), Phi the normal distribution function, and not its approximation by tanh."""
    return nnx.gelu(x, approximate=False)


def _leaky(x: Array) -> Array:
    """x where positive, else x / 100."""
    return nnx.leaky_relu(x, 0.01)


class PReLU(nnx.Module):
    """`max(x, 0) + slope * min(x, 0)`, a slope a channel, learned from 1/4 (arXiv 1502.01852)."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.slope = nnx.Param(jnp.full((features,), 0.25))

    def __call__(self, x: Array) -> Array:
        return jnp.maximum(x, 0) + scale_channels(jnp.minimum(x, 0), self.slope[...])


# 'none' is the activation-free net, whose neurons and pooling alone are not linear.
ACTIVATIONS = {
    "relu": nnx.relu,
    "relu6": nnx.relu6,  # cut off at 0 and 6
    "leaky": _leaky,
    "none": _same,
    "silu": nnx.silu,
    "gelu": _gelu,
    "tanh": nnx.tanh,
    "hard_tanh": nnx.hard_tanh,  # cut off at -1 and 1
}
# Those that have parameters: classes of `features, rngs`.
LEARNED_ACTIVATIONS = {"prelu": PReLU}


def activation(name: str) -> Activation:
    """The elementwise function of the option `model.activation`, a key of `ACTIVATIONS`."""
    return names.pick("model.activation", name, ACTIVATIONS)


def channel_activation(name: str, features: int, *, rngs: nnx.Rngs) -> Activation:
    """The same, or for a key of `LEARNED_ACTIVATIONS` a module with its own parameters."""
    found = names.pick("model.activation", name, ACTIVATIONS | LEARNED_ACTIVATIONS)
    return found(features, rngs=rngs) if name in LEARNED_ACTIVATIONS else found


def unit(x: Array, layer: Layer, norm: nnx.Module | None, follows: Activation | None) -> Array:
    """`layer_norm_act`, whose activation may be a module: it is then applied to the unit's output.

    A unit takes in functions alone, since what it applies is static.
    """
    if not isinstance(follows, nnx.Module):
        return layer_norm_act(x, layer, norm, follows)
    y = layer_norm_act(x, layer, norm)
    return y if layer.removed else follows(y)


def conv(
    in_features: int,
    features: int,
    kernel: int,
    *,
    strides: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    kernel_init: nnx.Initializer = kaiming_normal,
    rngs: nnx.Rngs,
) -> Conv:
    """A square convolution with `padding` zeros on both sides, as many as keep the size by default.

    No bias by default: a batch norm that follows takes it away again.
    """
    return Conv(
        in_features,
        features,
        (kernel, kernel),
        strides=strides,
        padding=kernel // 2 * dilation if padding is None else padding,
        dilation=dilation,
        groups=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        rngs=rngs,
    )


def head(
    in_features: int,
    num_classes: int,
    *,
    kernel_init: nnx.Initializer = head_init,
    rngs: nnx.Rngs,
) -> Dense:
    """The linear classifier, kernel from N(0, 0.01^2) by default."""
    return Dense(in_features, num_classes, kernel_init=kernel_init, rngs=rngs)


def scaled(features: int, width: float) -> int:
    """A channel number under the multiplier `model.width`.

    Raises:
      UserError: if the multiplier is not positive.
    """
    if not width > 0:
        raise UserError(f"model.width={width}: must be above 0")
    return max(round(features * width), 1)


def check_size(image_shape: tuple[int, int, int], halvings: int) -> None:
    """Raises a UserError if the image does not survive that many poolings by two."""
    if min(image_shape[:2]) < 2**halvings:
        raise UserError(
            f"image_shape={image_shape}: this net halves images {halvings} times, so height and "
            f"width must be at least {2**halvings}"
        )


def scale_channels(x: Array, scale: Array) -> Array:
    """`(..., C)` times a factor for each channel, `(C,)`, in the type of x."""
    return x * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


def max_pool2(x: Array, *, whole: bool = False) -> Array:
    """Maximum over 2x2 windows that do not overlap: `(N, H, W, C)` to `(N, H//2, W//2, C)`.

    As the maximum of four strided slices: the gradient of `reduce_window` is a slow scatter on CPU.

    Args:
      x: Images.
      whole: An odd last row or column is a window too, of which there is a half: `ceil(H / 2)`.
    """
    if whole:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge")
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:height:2], x[:, 1:height:2])
    return jnp.maximum(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


def max_pool3(x: Array) -> Array:
    """Maximum over 3x3 windows at stride 2, edges padded by one: ResNet's pooling for ImageNet."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def mean_pool(x: Array, window: int) -> Array:
    """Mean over square windows at stride 2, of what there is of those at the edge.

    `(N, H, W, C)` to `(N, ceil(H / 2), ceil(W / 2), C)`, of x's type; the sums are in float32.
    """

    def sums(x):
        zero = np.zeros((), x.dtype)  # known while JAX traces, or there is no gradient
        return lax.reduce_window(x, zero, lax.add, (1, window, window, 1), (1, 2, 2, 1), "SAME")

    exact = x.astype(linear_maps.wide(x.dtype))
    return (sums(exact) / sums(jnp.ones_like(exact[:1, ..., :1]))).astype(x.dtype)


def space_to_depth(x: Array, size: int) -> Array:
    """`(N, H, W, C)` to `(N, H / size, W / size, size * size * C)`: each square as one pixel.

    Raises:
      UserError: if size does not divide height and width.
    """
    batch, height, width, channels = x.shape
    if height % size or width % size:
        raise UserError(
            f"image_shape={x.shape[1:]}: height and width must be multiples of {size} here"
        )
    squares = x.reshape(batch, height // size, size, width // size, size, channels)
    squares = squares.transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(batch, height // size, width // size, -1)


def global_mean(x: Array) -> Array:
    """`(N, H, W, C)` to `(N, C)`."""
    return jnp.mean(x, axis=(1, 2))
