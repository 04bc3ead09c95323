"""SNGAN (Miyato et al. 2018, arXiv 1802.05957): a generator of images and its discriminator.

Table 4 there, for 32x32: a generator of residual blocks that double the sides, and a discriminator
of residual blocks, the first two of which halve them, with spectrally normed kernels. Without
classes. The net is written in plain layers; the rules

    dict(match=r"generator/blocks/.*/conv", neuron="ours", norm="branch")
    dict(match=r"discriminator/blocks/.*/conv", neuron="ours")

make both quadratic. A norm of branches in the discriminator would tell an image by the others of
its batch.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, LayerSpec, layer_norm_act
from efficient_nets.models import parts
from efficient_nets.ops import linear_maps

LEAST = 4  # side of the map that the generator starts from, or up to twice that

SPECTRAL = LayerSpec(kernel_norm="spectral")
# Glorot's, sqrt(2) times as large in front of an activation, as the paper's code has it.
wide_glorot = nnx.initializers.variance_scaling(2.0, "fan_avg", "uniform")
glorot = nnx.initializers.glorot_uniform()


def doubled(x: Array) -> Array:
    """Each pixel as 2x2 of them: `(N, H, W, C)` to `(N, 2H, 2W, C)`."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def halved(x: Array) -> Array:
    """Means of 2x2 pixels: `(N, H, W, C)` to `(N, H // 2, W // 2, C)`."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def _conv(in_features, features, kernel, spec=None, kernel_init=wide_glorot, *, rngs) -> Conv:
    return Conv(
        in_features, features, (kernel, kernel), spec=spec, kernel_init=kernel_init, rngs=rngs
    )


class UpBlock(nnx.Module):
    """`conv2(act(norm1(conv1(double(act(norm0(x))))))) + double(shortcut(x))`.

    `(N, H, W, in_features)` to `(N, 2H, 2W, features)`. A 1x1 shortcut in front of the doubling
    gives what one behind it does.
    """

    def __init__(
        self, in_features: int, features: int, activation: parts.Activation, *, rngs: nnx.Rngs
    ):
        self.activation = activation
        self.norm0 = BatchNorm(in_features, rngs=rngs)
        self.conv1 = _conv(in_features, features, 3, rngs=rngs)
        self.norm1 = BatchNorm(features, rngs=rngs)
        self.conv2 = _conv(features, features, 3, rngs=rngs)
        self.shortcut = _conv(in_features, features, 1, kernel_init=glorot, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = doubled(self.activation(self.norm0(x)))
        y = layer_norm_act(y, self.conv1, self.norm1, self.activation)
        return self.conv2(y) + doubled(self.shortcut(x))


class DownBlock(nnx.Module):
    """`conv2(act(conv1(act(x)))) + shortcut(x)`, halved if `halves`; no norms.

    The first block of a net has no activation in front, and halves x before its shortcut, as the
    paper's code does. The shortcut is x itself where its shape stays.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: parts.Activation,
        *,
        halves: bool,
        first: bool = False,
        rngs: nnx.Rngs,
    ):
        self.activation, self.halves, self.first = activation, halves, first
        self.conv1 = _conv(in_features, features, 3, SPECTRAL, rngs=rngs)
        self.conv2 = _conv(features, features, 3, SPECTRAL, rngs=rngs)
        keeps = in_features == features and not halves
        self.shortcut = (
            None if keeps else _conv(in_features, features, 1, SPECTRAL, glorot, rngs=rngs)
        )

    def __call__(self, x: Array) -> Array:
        y = x if self.first else self.activation(x)
        y = self.conv2(layer_norm_act(y, self.conv1, activation=self.activation))
        if self.first and self.halves:
            x = halved(x)
        x = x if self.shortcut is None else self.shortcut(x)
        if not self.halves:
            return y + x
        return halved(y) + x if self.first else halved(y + x)


class Generator(nnx.Module):
    """`project`, `blocks`, `norm`, `image`: latents `(N, latent)` to images in [-1, 1]."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent: int,
        features: int,
        activation: parts.Activation,
        *,
        rngs: nnx.Rngs,
    ):
        self.start, doublings = _start(image_shape)
        self.activation, self.latent, self.features = activation, latent, features
        self.project = Dense(
            latent, self.start[0] * self.start[1] * features, kernel_init=glorot, rngs=rngs
        )
        blocks = [UpBlock(features, features, activation, rngs=rngs) for _ in range(doublings)]
        self.blocks = nnx.List(blocks)
        self.norm = BatchNorm(features, rngs=rngs)
        self.image = _conv(features, image_shape[-1], 3, kernel_init=glorot, rngs=rngs)

    def __call__(self, latents: Array) -> Array:
        """Latents, of a standard normal distribution, to images `(N, H, W, C)`."""
        x = self.project(latents).reshape(-1, *self.start, self.features)
        for block in self.blocks:
            x = block(x)
        x = self.image(self.activation(self.norm(x)))
        return jnp.tanh(x.astype(linear_maps.wide(x.dtype)))  # bfloat16 has too few levels


class Discriminator(nnx.Module):
    """`blocks`, `head`: images in [-1, 1] to scores `(N,)`, high for real ones."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        features: int,
        blocks: int,
        activation: parts.Activation,
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        channels = (image_shape[-1], *[features] * blocks)
        self.blocks = nnx.List(
            [
                DownBlock(*pair, activation, halves=number < 2, first=not number, rngs=rngs)
                for number, pair in enumerate(zip(channels, channels[1:], strict=False))
            ]
        )
        self.head = Dense(features, 1, spec=SPECTRAL, kernel_init=glorot, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        x = images
        for block in self.blocks:
            x = block(x)
        x = jnp.sum(self.activation(x), axis=(1, 2))
        return self.head(x)[:, 0]


class SNGAN(nnx.Module):
    """`generator` and `discriminator`, see the module; 5,330,564 parameters by default for 32x32x3.

    Args:
      image_shape: `(H, W, C)`; sides are 4 to 7 times a power of two, and both the same one.
      num_classes: Is not heeded: the net knows of no classes.
      latent: Size of the vectors that images are made of.
      generator_features: Channels of the generator.
      discriminator_features: Channels of the discriminator.
      discriminator_blocks: At least 2; these halve the sides, the others leave them.
      width: Multiplies all channel numbers.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.

    Raises:
      UserError: on sizes or numbers that do not fit.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        latent: int = 128,
        generator_features: int = 256,
        discriminator_features: int = 128,
        discriminator_blocks: int = 4,
        width: float = 1.0,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        follows = parts.activation(activation)
        for name, value, least in (
            ("latent", latent, 1),
            ("generator_features", generator_features, 1),
            ("discriminator_features", discriminator_features, 1),
            ("discriminator_blocks", discriminator_blocks, 2),
        ):
            if value < least:
                raise UserError(f"model.{name}={value}: must be at least {least}")
        of_generator, of_discriminator = (
            parts.scaled(features, width)
            for features in (generator_features, discriminator_features)
        )
        self.generator = Generator(image_shape, latent, of_generator, follows, rngs=rngs)
        self.discriminator = Discriminator(
            image_shape, of_discriminator, discriminator_blocks, follows, rngs=rngs
        )

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Both once, as tables and calibration ask for: scores of images, and as many made ones.

        The latents are drawn from a key that is always the same.
        """
        shape = (images.shape[0], self.generator.latent)
        latents = jax.random.normal(jax.random.key(0), shape, images.dtype)
        return self.discriminator(images), self.generator(latents)


def _start(image_shape: tuple[int, int, int]) -> tuple[tuple[int, int], int]:
    """Sides of the smallest map, and how often they double."""
    doublings, sides = 0, image_shape[:2]
    while all(side % 2 == 0 and side // 2 >= LEAST for side in sides):
        doublings, sides = doublings + 1, tuple(side // 2 for side in sides)
    if not doublings or max(sides) >= 2 * LEAST:
        raise UserError(
            f"image_shape={image_shape}: the generator starts from sides of {LEAST} to "
            f"{2 * LEAST - 1} and doubles them, so that 28 and 32 are possible; give a "
            "data.image_size such as 32"
        )
    return sides, doublings
