"""ResNet (arXiv 1512.03385) in its two forms: for CIFAR, and for ImageNet."""

import abc

from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, layer_norm_act
from efficient_nets.models import parts

# Channels of the stages; the stem has as many as the first.
CHANNELS = {"cifar": (16, 32, 64), "imagenet": (64, 128, 256, 512)}
IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Block(nnx.Module, abc.ABC):
    """`activation(main path + shortcut)`.

    The shortcut is a 1x1 convolution and norm where shapes differ. Subclasses make the main path:
    `conv1`, `norm1`, `conv2`, ...
    """

    expansion = 1

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
        self.projects = strides > 1 or in_features != features
        if self.projects:
            self.shortcut = parts.conv(in_features, features, 1, strides=strides, rngs=rngs)
            self.shortcut_norm = BatchNorm(features, rngs=rngs)

    @abc.abstractmethod
    def main(self, x: Array) -> Array:
        """The main path, up to its last norm."""

    @property
    @abc.abstractmethod
    def last_norm(self) -> BatchNorm:
        """The main path's last norm."""

    def __call__(self, x: Array) -> Array:
        carried = x
        if self.projects:
            carried = layer_norm_act(x, self.shortcut, self.shortcut_norm)
        return self.activation(self.main(x) + carried)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    def __init__(
        self,
        in_features: int,
        width: int,
        strides: int,
        *,
        activation: parts.Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, width, strides, activation=activation, rngs=rngs)
        self.conv1 = parts.conv(in_features, width, 3, strides=strides, rngs=rngs)
        self.norm1 = BatchNorm(width, rngs=rngs)
        self.conv2 = parts.conv(width, width, 3, rngs=rngs)
        self.norm2 = BatchNorm(width, rngs=rngs)

    @property
    def last_norm(self) -> BatchNorm:
        return self.norm2

    def main(self, x: Array) -> Array:
        x = layer_norm_act(x, self.conv1, self.norm1, self.activation)
        return layer_norm_act(x, self.conv2, self.norm2)


class Bottleneck(Block):
    """1x1 to `width`, 3x3 with the stride, 1x1 to `4 * width`."""

    expansion = 4

    def __init__(
        self,
        in_features: int,
        width: int,
        strides: int,
        *,
        activation: parts.Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        features = self.expansion * width
        super().__init__(in_features, features, strides, activation=activation, rngs=rngs)
        self.conv1 = parts.conv(in_features, width, 1, rngs=rngs)
        self.norm1 = BatchNorm(width, rngs=rngs)
        self.conv2 = parts.conv(width, width, 3, strides=strides, rngs=rngs)
        self.norm2 = BatchNorm(width, rngs=rngs)
        self.conv3 = parts.conv(width, features, 1, rngs=rngs)
        self.norm3 = BatchNorm(features, rngs=rngs)

    @property
    def last_norm(self) -> BatchNorm:
        return self.norm3

    def main(self, x: Array) -> Array:
        x = layer_norm_act(x, self.conv1, self.norm1, self.activation)
        x = layer_norm_act(x, self.conv2, self.norm2, self.activation)
        return layer_norm_act(x, self.conv3, self.norm3)


class ResNet(nnx.Module):
    """`stem`, stages `stage1`, `stage2`, ... of blocks, a global mean, `head`; no conv has a bias.

    Layout 'cifar': 3x3 stem, three stages of basic blocks. Layout 'imagenet': 7x7 stem at stride 2,
    3x3 max pooling, four stages. A stage after the first starts with stride 2. 466,906 parameters
    for depth 32 and 10 classes, 25,557,032 for depth 50 and 1000 classes.

    Args:
      image_shape: `(H, W, C)`, any size.
      num_classes: Number of logits.
      layout: 'cifar' or 'imagenet'.
      depth: 6n + 2 for 'cifar'; 18, 34, 50 or 101 for 'imagenet'. 50 and 101 have bottlenecks.
      blocks: In place of depth, the number of basic blocks of each stage, as (2, 2, 2).
      width: Multiplies all channel numbers but the image's.
      zero_init_gamma: Starts the scale of each block's last norm at 0, so that every block starts
        as its shortcut.
      activation: What stands in for ReLU, also behind a block's sum; a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        layout: str = "cifar",
        depth: int = 0,
        blocks: tuple[int, ...] = (),
        width: float = 1.0,
        zero_init_gamma: bool = False,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        widths = names.pick("model.layout", layout, CHANNELS)
        widths = [parts.scaled(features, width) for features in widths]
        blocks = _blocks(layout, depth, tuple(blocks))
        make = Bottleneck if depth in (50, 101) and layout == "imagenet" else BasicBlock
        self.layout, self.stages = layout, len(blocks)
        self.activation = parts.activation(activation)

        kernel, strides = (3, 1) if layout == "cifar" else (7, 2)
        self.stem = parts.conv(image_shape[-1], widths[0], kernel, strides=strides, rngs=rngs)
        self.stem_norm = BatchNorm(widths[0], rngs=rngs)
        channels = widths[0]
        for number, (count, features) in enumerate(zip(blocks, widths, strict=True), start=1):
            stage = nnx.List([])
            for index in range(count):
                strides = 2 if number > 1 and index == 0 else 1
                block = make(channels, features, strides, activation=self.activation, rngs=rngs)
                stage.append(block)
                channels = features * make.expansion
                if zero_init_gamma:
                    scale = block.last_norm.scale
                    scale[...] = 0 * scale[...]
            setattr(self, f"stage{number}", stage)
        self.head = parts.head(channels, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = layer_norm_act(images, self.stem, self.stem_norm, self.activation)
        if self.layout == "imagenet":
            x = parts.max_pool3(x)
        for number in range(1, self.stages + 1):
            for block in getattr(self, f"stage{number}"):
                x = block(x)
        return self.head(parts.global_mean(x))


def _blocks(layout: str, depth: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of each stage, from exactly one of depth and blocks."""
    if bool(depth) == bool(blocks):
        raise UserError(f"model.depth={depth} and model.blocks={blocks}: give one of the two")
    stages = len(CHANNELS[layout])
    if blocks:
        if len(blocks) != stages or min(blocks) < 1:
            raise UserError(
                f"model.blocks={blocks}: layout {layout!r} needs {stages} numbers, each at least 1"
            )
        return blocks
    if layout == "imagenet":
        if depth not in IMAGENET_BLOCKS:
            allowed = ", ".join(map(str, IMAGENET_BLOCKS))
            raise UserError(f"model.depth={depth}: allowed for layout 'imagenet': {allowed}")
        return IMAGENET_BLOCKS[depth]
    if depth < 8 or depth % 6 != 2:
        raise UserError(
            f"model.depth={depth}: allowed for layout 'cifar': 8, 14, 20, ..., that is 6n + 2"
        )
    return (depth // 6,) * stages
