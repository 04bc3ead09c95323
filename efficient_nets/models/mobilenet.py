"""MobileNet v1 (arXiv 1704.04861), and the layout of QuadraLib's QMobileNet (arXiv 2204.01701)."""

from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, layer_norm_act
from efficient_nets.models import parts

STEM = 32
# (channels, stride) of the depthwise-separable blocks.
START = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2))
LAYOUTS = {
    "v1": (*START, *((512, 1),) * 5, (1024, 2), (1024, 1)),
    "q8": (*START, (512, 1), (1024, 2)),
}
SMALL_IMAGE = 64


class SeparableBlock(nnx.Module):
    """3x3 depthwise convolution, then 1x1 pointwise, each with batch norm and activation."""

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int,
        *,
        activation: parts.Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.depthwise = parts.conv(
            in_features, in_features, 3, strides=strides, groups=in_features, rngs=rngs
        )
        self.depthwise_norm = BatchNorm(in_features, rngs=rngs)
        self.pointwise = parts.conv(in_features, features, 1, rngs=rngs)
        self.pointwise_norm = BatchNorm(features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = layer_norm_act(x, self.depthwise, self.depthwise_norm, self.activation)
        return layer_norm_act(x, self.pointwise, self.pointwise_norm, self.activation)


class MobileNet(nnx.Module):
    """`stem`, `blocks`, a global mean, the head; no conv has a bias.

    4,231,976 parameters for layout v1, 3 channels and 1000 classes.

    Args:
      image_shape: `(H, W, C)`, any size.
      num_classes: Number of logits.
      layout: 'v1' (13 blocks), or 'q8' (8 blocks), which QMobileNet is converted from.
      width: Multiplies all channel numbers but the image's.
      stem_strides: Stride of the stem, 1 or 2; 0 takes 1 for images of up to 64 pixels, else 2.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.

    Attributes:
      levels: Static, `(stride, channels)` of each map of `maps`.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        layout: str = "v1",
        width: float = 1.0,
        stem_strides: int = 0,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        if stem_strides not in (0, 1, 2):
            raise UserError(f"model.stem_strides={stem_strides}: allowed 0 (by image size), 1, 2")
        self.activation = parts.activation(activation)
        small = max(image_shape[:2]) <= SMALL_IMAGE
        strides = stem_strides or (1 if small else 2)
        channels = parts.scaled(STEM, width)
        self.stem = parts.conv(image_shape[-1], channels, 3, strides=strides, rngs=rngs)
        self.stem_norm = BatchNorm(channels, rngs=rngs)
        self.blocks = nnx.List([])
        levels = {strides: channels}
        stride = strides
        for base, strides in names.pick("model.layout", layout, LAYOUTS):
            features = parts.scaled(base, width)
            block = SeparableBlock(
                channels, features, strides, activation=self.activation, rngs=rngs
            )
            self.blocks.append(block)
            channels = features
            stride *= strides
            levels[stride] = channels  # the last one of each stride stays
        self.levels = tuple(levels.items())
        self.head = parts.head(channels, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        return self.head(parts.global_mean(self.maps(images)[-1]))

    def maps(self, images: Array) -> list[Array]:
        """The last map of each size, of `(N, H, W, C)`; `levels` says how large they are."""
        x = layer_norm_act(images, self.stem, self.stem_norm, self.activation)
        found = [x]
        for block in self.blocks:
            x = block(x)
            if x.shape[1:3] == found[-1].shape[1:3]:
                found.pop()
            found.append(x)
        return found
