"""SqueezeNet v1.1 (arXiv 1602.07360 and its authors' code), for ImageNet and for small images."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.layers import BatchNorm, layer_norm_act
from efficient_nets.models import parts

STEM = 64
# Channels of the fire modules: squeezed, and of each of the two expansions.
FIRES = (
    *((16, 64), (16, 64), (32, 128), (32, 128)),
    *((48, 192), (48, 192), (64, 256), (64, 256)),
)
# By layout the stem's stride, and how many modules stand in front of each 3x3 pooling at stride 2.
# Small images are halved twice less: 32 pixels end as 8.
LAYOUTS = {"cifar": (1, (2, 4)), "imagenet": (2, (0, 2, 4))}
NORMS = {"none": "none, and biases, as there", "batch": "a batch norm behind each convolution"}


class Fire(nnx.Module):
    """1x1 `squeeze`, then 1x1 `expand1` and 3x3 `expand3` side by side, their outputs joined."""

    def __init__(
        self,
        in_features: int,
        squeezed: int,
        expanded: int,
        *,
        norm: bool = False,
        activation: parts.Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        for name, before, after, kernel in (
            ("squeeze", in_features, squeezed, 1),
            ("expand1", squeezed, expanded, 1),
            ("expand3", squeezed, expanded, 3),
        ):
            conv = parts.conv(before, after, kernel, use_bias=not norm, rngs=rngs)
            setattr(self, name, conv)
            setattr(self, f"{name}_norm", nnx.data(BatchNorm(after, rngs=rngs) if norm else None))

    def __call__(self, x: Array) -> Array:
        """`(N, H, W, in_features)` to `(N, H, W, 2 * expanded)`."""
        x = layer_norm_act(x, self.squeeze, self.squeeze_norm, self.activation)
        narrow = layer_norm_act(x, self.expand1, self.expand1_norm, self.activation)
        wide = layer_norm_act(x, self.expand3, self.expand3_norm, self.activation)
        return jnp.concatenate([narrow, wide], axis=-1)


class SqueezeNet(nnx.Module):
    """`stem`, eight `blocks`, a 1x1 convolution `head` with its activation, a global mean.

    1,235,496 parameters for layout 'imagenet' without norms, 3 channels and 1000 classes, as
    published. Unlike there the stem and the poolings pad by one, and there is no dropout.

    Args:
      image_shape: `(H, W, C)`, any size.
      num_classes: Number of logits.
      layout: 'imagenet', or 'cifar' with stride 1 in the stem and no pooling behind it.
      width: Multiplies all channel numbers but the image's.
      norm: 'none' or 'batch', see `NORMS`.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        layout: str = "cifar",
        width: float = 1.0,
        norm: str = "none",
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        strides, self.pools = names.pick("model.layout", layout, LAYOUTS)
        names.pick("model.norm", norm, NORMS)
        normed = norm == "batch"
        self.activation = parts.activation(activation)
        channels = parts.scaled(STEM, width)
        self.stem = parts.conv(
            image_shape[-1], channels, 3, strides=strides, use_bias=not normed, rngs=rngs
        )
        self.stem_norm = nnx.data(BatchNorm(channels, rngs=rngs) if normed else None)
        self.blocks = nnx.List([])
        for bases in FIRES:
            squeezed, expanded = (parts.scaled(base, width) for base in bases)
            shape = (channels, squeezed, expanded)
            block = Fire(*shape, norm=normed, activation=self.activation, rngs=rngs)
            self.blocks.append(block)
            channels = 2 * expanded
        self.head = parts.conv(
            channels, num_classes, 1, use_bias=True, kernel_init=parts.head_init, rngs=rngs
        )

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = layer_norm_act(images, self.stem, self.stem_norm, self.activation)
        for index, block in enumerate(self.blocks):
            if index in self.pools:
                x = parts.max_pool3(x)
            x = block(x)
        return parts.global_mean(layer_norm_act(x, self.head, activation=self.activation))
