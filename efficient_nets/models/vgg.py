"""VGG with batch norm (arXiv 1409.1556), QuadraLib's shallow Q7 (arXiv 2204.01701), VGG-small.

VGG-small is the net of LQ-Nets (arXiv 1807.10029) and other quantizers for CIFAR-10: that of
BinaryConnect (arXiv 1511.00363) with one dense layer in place of three.
"""

from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.layers import BatchNorm, layer_norm_act
from efficient_nets.models import parts

# Channels of the convolutions of each stage; a 2x2 max pooling ends a stage.
LAYOUTS = {
    "A": ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    "B": ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    "D": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    "E": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
    "Q7": ((64,) * 2, (128,) * 2, (256,), (512,), (512,)),
    "small": ((128,) * 2, (256,) * 2, (512,) * 2),
}
# Layouts without biases in front of norms, whose head reads every pixel in place of their mean.
FLAT = ("small",)


class ConvBlock(nnx.Module):
    """Convolution, batch norm, activation; 3x3 with bias by default, else as of `parts.conv`."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel: int = 3,
        *,
        use_bias: bool = True,
        activation: parts.Activation = nnx.relu,
        rngs: nnx.Rngs,
        **geometry: int,
    ):
        self.activation = activation
        self.conv = parts.conv(
            in_features, features, kernel, use_bias=use_bias, rngs=rngs, **geometry
        )
        self.norm = BatchNorm(features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return layer_norm_act(x, self.conv, self.norm, self.activation)


class VGG(nnx.Module):
    """Stages `stage1`, `stage2`, ... of convolutions, each halving the image; the head.

    The head reads the mean over all pixels, for layout 'small' every pixel. 14,728,266 parameters
    for layout D (VGG-16), 4,660,106 for 'small', with 3 channels and 10 classes.

    Args:
      image_shape: `(H, W, C)`, at least 32 pixels high and wide; 8 for layout 'small', which takes
        no other size later on.
      num_classes: Number of logits.
      layout: A (VGG-11), B (13), D (16), E (19), Q7, which QVGG-7 is converted from, or small.
      width: Multiplies all channel numbers.
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
        layout: str = "D",
        width: float = 1.0,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        stages = names.pick("model.layout", layout, LAYOUTS)
        widths = [[parts.scaled(features, width) for features in stage] for stage in stages]
        parts.check_size(image_shape, halvings=len(stages))
        self.stages, self.flat = len(stages), layout in FLAT
        follows = parts.activation(activation)
        channels = image_shape[-1]
        for number, stage in enumerate(widths, start=1):
            blocks = nnx.List([])
            for features in stage:
                block = ConvBlock(
                    channels, features, use_bias=not self.flat, activation=follows, rngs=rngs
                )
                blocks.append(block)
                channels = features
            setattr(self, f"stage{number}", blocks)
        self.levels = tuple((2**i, stage[-1]) for i, stage in enumerate(widths))
        if self.flat:
            height, width = (side // 2**self.stages for side in image_shape[:2])
            channels *= height * width
        self.head = parts.head(channels, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = parts.max_pool2(self.maps(images)[-1])
        return self.head(x.reshape(len(x), -1) if self.flat else parts.global_mean(x))

    def maps(self, images: Array, *, whole: bool = False) -> list[Array]:
        """What each stage gives, in front of the pooling that ends it; `levels` says how large.

        Args:
          images: `(N, H, W, C)`.
          whole: As of `parts.max_pool2`.
        """
        x, found = images, []
        for number in range(1, self.stages + 1):
            if found:
                x = parts.max_pool2(x, whole=whole)
            for block in getattr(self, f"stage{number}"):
                x = block(x)
            found.append(x)
        return found
