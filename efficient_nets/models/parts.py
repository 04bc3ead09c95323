"""What the architectures share: padded convolutions, the head, pooling, activations."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense

Activation = Callable[[Array], Array]


def _same(x: Array) -> Array:
    return x


def _gelu(x: Array) -> Array:
    """x Phi(x), Phi the normal distribution function, and not its approximation by tanh."""
    return nnx.gelu(x, approximate=False)


# 'none' is the activation-free net, whose neurons and pooling alone are not linear.
ACTIVATIONS = {
    "relu": nnx.relu,
    "none": _same,
    "silu": nnx.silu,
    "gelu": _gelu,
    "tanh": nnx.tanh,
    "hard_tanh": nnx.hard_tanh,  # cut off at -1 and 1
}


def activation(name: str) -> Activation:
    """The elementwise function of the option `model.activation`, a key of `ACTIVATIONS`."""
    return names.pick("model.activation", name, ACTIVATIONS)


def conv(
    in_features: int,
    features: int,
    kernel: int,
    *,
    strides: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    rngs: nnx.Rngs,
) -> Conv:
    """A square convolution with `kernel // 2` zeros on both sides, kernel from `kaiming_normal`.

    No bias by default: a batch norm that follows takes it away again.
    """
    return Conv(
        in_features,
        features,
        (kernel, kernel),
        strides=strides,
        padding=kernel // 2,
        groups=groups,
        use_bias=use_bias,
        rngs=rngs,
    )


def head(in_features: int, num_classes: int, *, rngs: nnx.Rngs) -> Dense:
    """The linear classifier, kernel from N(0, 0.01^2)."""
    return Dense(in_features, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)


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


def max_pool2(x: Array) -> Array:
    """Maximum over 2x2 windows that do not overlap: `(N, H, W, C)` to `(N, H//2, W//2, C)`.

    As the maximum of four strided slices: the gradient of `reduce_window` is a slow scatter on CPU.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:height:2], x[:, 1:height:2])
    return jnp.maximum(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


def max_pool3(x: Array) -> Array:
    """Maximum over 3x3 windows at stride 2, edges padded by one: ResNet's pooling for ImageNet."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def global_mean(x: Array) -> Array:
    """`(N, H, W, C)` to `(N, C)`."""
    return jnp.mean(x, axis=(1, 2))
