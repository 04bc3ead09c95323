"""Network in Network (arXiv 1312.4400) for CIFAR, as XNOR-Net and its followers binarize it."""

import functools

from flax import nnx
from jax import Array

from efficient_nets.layers import BatchNorm, layer_norm_act
from efficient_nets.models import parts
from efficient_nets.models.vgg import ConvBlock

# (channels, kernel) of the convolutions of each stage; a 3x3 pooling at stride 2 ends the first
# two, the maximum and the mean. The last of all is the head, with a channel a class.
STAGES = (((192, 5), (160, 1), (96, 1)), ((192, 5), (192, 1), (192, 1)), ((192, 3), (192, 1)))
# By the number of convolutions before.
POOLS = {3: parts.max_pool3, 6: functools.partial(parts.mean_pool, window=3)}


class NiN(nnx.Module):
    """`stem`, `blocks` of a convolution, norm and activation, a 1x1 convolution `head`, its mean.

    The convolutions have biases, as there; batch norms stand in for dropout, as in the binarized
    versions. 969,802 parameters for 3 channels and 10 classes, of which 2,816 are the norms'.

    Args:
      image_shape: `(H, W, C)`, any size.
      num_classes: Number of logits.
      width: Multiplies all channel numbers.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        width: float = 1.0,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        follows = parts.activation(activation)
        (base, kernel), *others = (conv for stage in STAGES for conv in stage)
        self.activation, channels = follows, parts.scaled(base, width)
        self.stem = parts.conv(image_shape[-1], channels, kernel, use_bias=True, rngs=rngs)
        self.stem_norm = BatchNorm(channels, rngs=rngs)
        self.blocks = nnx.List([])
        for base, kernel in others:
            features = parts.scaled(base, width)
            block = ConvBlock(channels, features, kernel, activation=follows, rngs=rngs)
            self.blocks.append(block)
            channels = features
        self.head = parts.conv(
            channels, num_classes, 1, use_bias=True, kernel_init=parts.head_init, rngs=rngs
        )

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = layer_norm_act(images, self.stem, self.stem_norm, self.activation)
        for index, block in enumerate(self.blocks, start=1):
            if pool := POOLS.get(index):
                x = pool(x)
            x = block(x)
        return parts.global_mean(self.head(x))
