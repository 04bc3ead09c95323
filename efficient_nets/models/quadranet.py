"""QuadraNet (arXiv 2311.17956): ConvNeXt (arXiv 2201.03545) with quadratic depthwise convolutions.

The net is written in plain layers; the rule

    dict(match="depthwise", neuron="ours")

makes its 7x7 depthwise convolutions (a x) * (b x) + c x. Without it, it is ConvNeXt.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, LayerNorm, layer_norm_act
from efficient_nets.models import parts

CHANNELS = (96, 192, 384, 768)
EXPANSION = 4
LAYER_SCALE = 1e-6
SMALL_IMAGE = 64

normal = nnx.initializers.normal(0.02)


def patches(in_features: int, features: int, size: int, *, rngs: nnx.Rngs) -> Conv:
    """A convolution of windows that do not overlap; zeros fill up those at the right and bottom."""
    window = (size, size)
    return Conv(in_features, features, window, strides=size, kernel_init=normal, rngs=rngs)


class QuadraBlock(nnx.Module):
    """`x + scale * project(activation(expand(norm(depthwise(x)))))`, `(N, H, W, C)` to the same.

    A 7x7 depthwise convolution, layer norm, an MLP with 4C hidden values for each pixel, and a
    factor for each channel that starts at 1e-6 (layer scale): the block starts as the identity.
    """

    def __init__(self, features: int, *, activation: parts.Activation, rngs: nnx.Rngs):
        self.activation = activation
        hidden = EXPANSION * features
        self.depthwise = Conv(
            features, features, (7, 7), padding=3, groups=features, kernel_init=normal, rngs=rngs
        )
        self.depthwise_norm = LayerNorm(features, rngs=rngs)
        self.expand = Dense(features, hidden, kernel_init=normal, rngs=rngs)
        self.project = Dense(hidden, features, kernel_init=normal, rngs=rngs)
        self.scale = nnx.Param(jnp.full(features, LAYER_SCALE))

    def __call__(self, x: Array) -> Array:
        y = layer_norm_act(x, self.depthwise, self.depthwise_norm)
        y = layer_norm_act(y, self.expand, activation=self.activation)
        return x + parts.scale_channels(self.project(y), self.scale[...])


class QuadraNet(nnx.Module):
    """`stem`, four stages `stage1` to `stage4` of blocks, a global mean, norm, `head`.

    The stem cuts the image into patches; before each stage but the first, a layer norm and a 2x2
    convolution at stride 2, `down2` to `down4`, halve the map. 28,589,128 parameters for depths
    (3, 3, 9, 3), 3 channels and 1000 classes (ConvNeXt-T); the quadratic depthwise convolutions add
    100 for each channel of a block. The authors' code gives the depthwise convolution a residual
    connection of its own; here, as in ConvNeXt, it shares the MLP's.

    Args:
      image_shape: `(H, W, C)`, any size.
      num_classes: Number of logits.
      depths: Number of blocks of the four stages.
      stem: Side of a patch, 1 to 4; 0 takes 2 for images of up to 64 pixels, else 4.
      width: Multiplies the channels, 96, 192, 384, 768.
      activation: What the MLPs take, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        depths: tuple[int, ...] = (3, 3, 27, 3),
        stem: int = 0,
        width: float = 1.0,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ):
        if len(depths) != len(CHANNELS) or min(depths) < 1:
            raise UserError(f"model.depths={depths}: give four numbers, each at least 1")
        if stem not in range(5):
            raise UserError(f"model.stem={stem}: allowed 0 (by image size), 1, 2, 3, 4")
        follows = parts.activation(activation)
        small = max(image_shape[:2]) <= SMALL_IMAGE
        channels = parts.scaled(CHANNELS[0], width)
        self.stem = patches(image_shape[-1], channels, stem or (2 if small else 4), rngs=rngs)
        self.stem_norm = LayerNorm(channels, rngs=rngs)
        for number, (depth, base) in enumerate(zip(depths, CHANNELS, strict=True), start=1):
            features = parts.scaled(base, width)
            if number > 1:
                setattr(self, f"down{number}_norm", LayerNorm(channels, rngs=rngs))
                setattr(self, f"down{number}", patches(channels, features, 2, rngs=rngs))
            blocks = [QuadraBlock(features, activation=follows, rngs=rngs) for _ in range(depth)]
            setattr(self, f"stage{number}", nnx.List(blocks))
            channels = features
        self.head_norm = LayerNorm(channels, rngs=rngs)
        self.head = parts.head(channels, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = layer_norm_act(images, self.stem, self.stem_norm)
        for number in range(1, len(CHANNELS) + 1):
            if number > 1:
                x = getattr(self, f"down{number}")(getattr(self, f"down{number}_norm")(x))
            for block in getattr(self, f"stage{number}"):
                x = block(x)
        return self.head(self.head_norm(parts.global_mean(x)))
