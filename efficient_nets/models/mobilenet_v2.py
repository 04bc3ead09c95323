"""MobileNetV2 (arXiv 1801.04381): inverted residual blocks with linear bottlenecks."""

from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.layers import BatchNorm, layer_norm_act
from efficient_nets.models import parts

STEM, LAST = 32, 1280
# Table 2: (expansion, channels, number of blocks, stride of the first one).
IMAGENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# Stride of the stem, and the blocks. For CIFAR two strides less: 32 pixels end as 4.
LAYOUTS = {
    "imagenet": (2, IMAGENET),
    "cifar": (1, (IMAGENET[0], (6, 24, 2, 1), *IMAGENET[2:])),
}


class InvertedResidual(nnx.Module):
    """`x + project(depthwise(expand(x)))`: 1x1, 3x3 depthwise with the stride, 1x1.

    Each with a norm, the last one without activation. The sum is there if the shapes agree,
    `expand` if the expansion is not 1.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int,
        *,
        expansion: int,
        activation: parts.Activation = nnx.relu6,
        rngs: nnx.Rngs,
    ):
        hidden = expansion * in_features
        self.activation, self.expands = activation, expansion > 1
        self.sums = strides == 1 and in_features == features
        if self.expands:
            self.expand = parts.conv(in_features, hidden, 1, rngs=rngs)
            self.expand_norm = BatchNorm(hidden, rngs=rngs)
        self.depthwise = parts.conv(hidden, hidden, 3, strides=strides, groups=hidden, rngs=rngs)
        self.depthwise_norm = BatchNorm(hidden, rngs=rngs)
        self.project = parts.conv(hidden, features, 1, rngs=rngs)
        self.project_norm = BatchNorm(features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = x
        if self.expands:
            y = layer_norm_act(y, self.expand, self.expand_norm, self.activation)
        y = layer_norm_act(y, self.depthwise, self.depthwise_norm, self.activation)
        y = layer_norm_act(y, self.project, self.project_norm)
        return x + y if self.sums else y


class MobileNetV2(nnx.Module):
    """`stem`, `blocks`, a 1x1 convolution `last`, a global mean, the head; no conv has a bias.

    3,504,872 parameters for 3 channels and 1000 classes. No dropout before the head.

    Args:
      image_shape: `(H, W, C)`, any size.
      num_classes: Number of logits.
      layout: 'imagenet', or 'cifar' with stride 1 in the stem and the first blocks of 24 channels.
      width: Multiplies all channel numbers but the image's, `last`'s only if above 1, as there.
      activation: What stands in for ReLU6, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        layout: str = "imagenet",
        width: float = 1.0,
        activation: str = "relu6",
        rngs: nnx.Rngs,
    ):
        stem_strides, table = names.pick("model.layout", layout, LAYOUTS)
        self.activation = parts.activation(activation)
        channels = parts.scaled(STEM, width)
        self.stem = parts.conv(image_shape[-1], channels, 3, strides=stem_strides, rngs=rngs)
        self.stem_norm = BatchNorm(channels, rngs=rngs)
        self.blocks = nnx.List([])
        for expansion, base, count, first_strides in table:
            features = parts.scaled(base, width)
            for index in range(count):
                strides = first_strides if index == 0 else 1
                shape = (channels, features, strides)
                block = InvertedResidual(
                    *shape, expansion=expansion, activation=self.activation, rngs=rngs
                )
                self.blocks.append(block)
                channels = features
        features = parts.scaled(LAST, max(width, 1.0))
        self.last = parts.conv(channels, features, 1, rngs=rngs)
        self.last_norm = BatchNorm(features, rngs=rngs)
        self.head = parts.head(features, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = layer_norm_act(images, self.stem, self.stem_norm, self.activation)
        for block in self.blocks:
            x = block(x)
        x = layer_norm_act(x, self.last, self.last_norm, self.activation)
        return self.head(parts.global_mean(x))
