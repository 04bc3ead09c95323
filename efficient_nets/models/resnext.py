"""ResNeXt (arXiv 1611.05431) for CIFAR: bottleneck blocks whose 3x3 convolution has groups."""

import functools

from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, layer_norm_act
from efficient_nets.models import parts
from efficient_nets.models.residual import Bottleneck, Style
from efficient_nets.models.resnet import DOWNSAMPLES

BASE = 64  # of the first stage, which the stem has too; `base_width` is for so many
STAGES = 3


class ResNeXt(nnx.Module):
    """3x3 `stem`, `stage1` to `stage3` of bottleneck blocks, a global mean, `head`; no biases.

    As its section 5.3 has it: the stages are 256, 512 and 1024 channels wide, the 3x3 convolutions
    of C groups have `C * base_width` times 1, 2 and 4. Projecting shortcuts where shapes change, as
    in the paper's code; the stride is in the 3x3 convolution. ResNeXt-29, 8x64d, has 34,426,698
    parameters for 10 classes, 34.4 M as published. The default, ResNeXt-20 (8x16) as in arXiv
    2002.10711, has 3,876,170: two blocks a stage, where 29 has three, and d = 16.

    Args:
      image_shape: `(H, W, C)`, any size; at least 4 pixels with downsample 'maxpool'.
      num_classes: Number of logits.
      depth: 9n + 2, with n blocks a stage.
      cardinality: C, groups of the 3x3 convolutions.
      base_width: d, channels of a group in the first stage.
      width: Multiplies all channel numbers but the image's. A group keeps one at least.
      downsample: What halves the image between stages, a key of `resnet.DOWNSAMPLES`.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        depth: int = 20,
        cardinality: int = 8,
        base_width: int = 16,
        width: float = 1.0,
        downsample: str = "stride",
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        if depth < 11 or depth % 9 != 2:
            raise UserError(f"model.depth={depth}: allowed 11, 20, 29, ..., that is 9n + 2")
        for field, value in (("cardinality", cardinality), ("base_width", base_width)):
            if value < 1:
                raise UserError(f"model.{field}={value}: must be at least 1")
        names.pick("model.downsample", downsample, DOWNSAMPLES)
        self.halves = downsample == "maxpool"
        if self.halves:
            parts.check_size(image_shape, halvings=STAGES - 1)
        style = Style(activation=activation)
        make = functools.partial(Bottleneck, style=style, groups=cardinality, rngs=rngs)
        channels = parts.scaled(BASE, width)
        self.stem = parts.conv(image_shape[-1], channels, 3, rngs=rngs)
        self.stem_norm = BatchNorm(channels, rngs=rngs)
        self.activation = parts.activation(activation)
        for number in range(1, STAGES + 1):
            base = parts.scaled(BASE * 2 ** (number - 1), width)
            inner = cardinality * max(base * base_width // BASE, 1)
            stage = nnx.List([])
            for index in range(depth // 9):
                strides = 2 if number > 1 and index == 0 and not self.halves else 1
                stage.append(make(channels, base, strides, inner=inner))
                channels = Bottleneck.expansion * base
            setattr(self, f"stage{number}", stage)
        self.head = parts.head(channels, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = layer_norm_act(images, self.stem, self.stem_norm, self.activation)
        for number in range(1, STAGES + 1):
            if self.halves and number > 1:
                x = parts.max_pool2(x)
            for block in getattr(self, f"stage{number}"):
                x = block(x)
        return self.head(parts.global_mean(x))
