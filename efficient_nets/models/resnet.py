"""ResNet (arXiv 1512.03385) for CIFAR and for ImageNet, and variants of papers."""

import jax
from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.models import parts
from efficient_nets.models.group_net import Group
from efficient_nets.models.residual import BasicBlock, Bottleneck, Scalars, Style

# Channels of the stages.
CHANNELS = {"cifar": (16, 32, 64), **dict.fromkeys(("cifar4", "imagenet"), (64, 128, 256, 512))}
IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Kernel and stride of the first convolution, the squares of pixels that it reads as one, and
# whether a max pooling follows. 's2d' is TResNet's, arXiv 2003.13630.
STEMS = {
    **dict.fromkeys(("cifar", "cifar4"), (3, 1, 1, False)),
    "imagenet": (7, 2, 1, True),
    "s2d": (3, 1, 4, False),
}
DOWNSAMPLES = {
    "stride": "the first block of a stage has stride 2",
    "maxpool": "2x2 maxima in front of it, so that every convolution of a block has stride 1",
}

# Options by the name of what they come from. What is rounded is not in them: `recipes.quantized`.
PRESETS = {
    "torchvision": dict(order="cbsa", skip="block", shortcut="conv", activation="relu"),
    # arXiv 1603.05279. The sign that its convolutions read is the nonlinearity.
    "xnor": dict(order="cbsa", skip="block", shortcut="conv", activation="none"),
    # arXiv 1808.00278, figure 3: average pooling in front of the shortcut's convolution.
    "bireal": dict(order="cbsa", skip="conv", shortcut="pool", activation="none"),
    # DoReFa-Net arXiv 1606.06160, PACT 1805.06085, LQ-Nets 1807.10029: pre-activation nets.
    **dict.fromkeys(
        ("dorefa", "pact", "lq"),
        dict(order="bacs", skip="block", shortcut="conv", activation="relu", pre_norm=True),
    ),
    # arXiv 1811.10413, K = 5.
    "groupnet": dict(order="cabs", skip="block", bases=5, soft_gates=True),
    # arXiv 1901.09321.
    "fixup": dict(order="cbsa", skip="block", shortcut="conv", norm="fixup"),
    # arXiv 2002.10711, at depth 18: the 3x3 convolutions of its blocks have stride 1.
    "winograd": dict(layout="cifar4", stem_features=32, downsample="maxpool"),
}


class ResNet(nnx.Module):
    """`stem`, stages `stage1`, `stage2`, ... of blocks, a global mean, `head`; no conv has a bias.

    Layout 'cifar': 3x3 stem, three stages of basic blocks. Layout 'imagenet': 7x7 stem at stride 2,
    3x3 max pooling, four stages. Layout 'cifar4' has the stem of the first and the stages of the
    second. A stage after the first starts with stride 2. 466,906 parameters for depth 32 and 10
    classes, 25,557,032 for depth 50 and 1000 classes; preset 'winograd' at depth 18 and width 0.5
    has 2,797,610.

    Args:
      image_shape: `(H, W, C)`, any size; multiples of 4 for stem 's2d', and with downsample
        'maxpool' no less than what its poolings leave a pixel of.
      num_classes: Number of logits.
      layout: 'cifar', 'cifar4' or 'imagenet'.
      depth: 6n + 2 for 'cifar'; 18, 34, 50 or 101 for the others, where 50 and 101 have
        bottlenecks.
      blocks: In place of depth, the number of basic blocks of each stage, as (2, 2, 2).
      width: Multiplies all channel numbers but the image's and `stem_features`.
      zero_init_gamma: Starts the scale of each block's last norm at 0, so that every block starts
        as its shortcut.
      activation: What stands in for ReLU, also behind a block's sum; a key of `parts.ACTIVATIONS`,
        or 'prelu'.
      order: Of convolution, norm, activation and sum, see `residual.ORDERS`.
      skip: 'block', or 'conv' for a shortcut around each convolution of basic blocks.
      shortcut: 'conv', 'pool' or 'pad', see `residual.SHORTCUTS`.
      norm: 'batch', 'group', 'instance', 'frozen' (batch norms that stay as they are), or 'fixup',
        see `residual.Style`; with it the head starts at 0.
      pre_norm: Norm and activation stand before the global mean, and not behind the stem.
      stem: The stem of a layout, or 's2d', where 4x4 pixels are one; 'layout' for the net's own.
      stem_features: Channels of the stem, whatever the width; 0: as many as the first stage.
      downsample: What halves the image between stages, a key of `DOWNSAMPLES`.
      bases: Blocks side by side in place of each one, see `group_net.Group`.
      soft_gates: Gates between these.
      rngs: Source of the initial values.

    Attributes:
      levels: Static, `(stride, channels)` of each map of `maps`.
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
        order: str = "cbsa",
        skip: str = "block",
        shortcut: str = "conv",
        norm: str = "batch",
        pre_norm: bool = False,
        stem: str = "layout",
        stem_features: int = 0,
        downsample: str = "stride",
        bases: int = 1,
        soft_gates: bool = False,
        rngs: nnx.Rngs,
    ):
        widths = names.pick("model.layout", layout, CHANNELS)
        widths = [parts.scaled(features, width) for features in widths]
        blocks = _blocks(layout, depth, tuple(blocks))
        make = Bottleneck if depth in (50, 101) and layout != "cifar" else BasicBlock
        style = Style(order, skip, shortcut, activation, norm, depth=sum(blocks))
        names.pick("model.downsample", downsample, DOWNSAMPLES)
        self.halves = downsample == "maxpool"
        if stem_features < 0:
            raise UserError(f"model.stem_features={stem_features}: must be at least 0")
        _check(style, make, zero_init_gamma, pre_norm, bases, soft_gates, self.halves)
        stems = STEMS | {"layout": STEMS[layout]}
        kernel, strides, self.square, self.pools = names.pick("model.stem", stem, stems)
        self.stages, self.bases = len(blocks), bases
        if self.halves:
            of_stem = (strides * self.square).bit_length() - 1 + self.pools
            parts.check_size(image_shape, of_stem + self.stages - 1)

        channels = stem_features or widths[0]
        self.stem = parts.conv(
            image_shape[-1] * self.square**2, channels, kernel, strides=strides, rngs=rngs
        )
        self.stem_norm = self.final_norm = nnx.data(None)
        if not pre_norm:
            self.stem_norm = style.make_norm(channels, rngs=rngs)
        follows, stride, levels = channels, strides * self.square * 2**self.pools, []
        for number, (count, features) in enumerate(zip(blocks, widths, strict=True), start=1):
            stage = nnx.List([])
            for index in range(count):
                strides = 2 if number > 1 and index == 0 and not self.halves else 1

                def block(rngs, shape=(channels, features, strides)):
                    made = make(*shape, style=style, rngs=rngs)
                    if zero_init_gamma:
                        made.last_norm.scale[...] = 0 * made.last_norm.scale[...]
                    return made

                is_last = number == len(blocks) and index == count - 1
                gated = soft_gates and not is_last
                grouped = bases > 1
                stage.append(
                    Group(block, bases, gated=gated, rngs=rngs) if grouped else block(rngs)
                )
                channels = features * make.expansion
            setattr(self, f"stage{number}", stage)
            levels.append((stride * 2 ** (number - 1), channels))
        self.levels = tuple(levels)
        if pre_norm:
            self.final_norm = style.make_norm(channels, rngs=rngs)
            follows = channels
        self.activation = parts.channel_activation(activation, follows, rngs=rngs)
        self.head_shift = nnx.data(Scalars(scale=False) if style.fixup else None)
        start = nnx.initializers.zeros if style.fixup else parts.head_init
        self.head = parts.head(channels, num_classes, kernel_init=start, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = self.maps(images)[-1]
        if self.bases > 1:
            x, *_ = x  # behind the last group all are the sum
        if self.final_norm is not None:
            x = self.activation(self.final_norm(x))
        x = parts.global_mean(x)
        return self.head(x if self.head_shift is None else self.head_shift(x))

    def maps(self, images: Array) -> list[Array]:
        """What each stage gives for `(N, H, W, C)`; `levels` says how large it is.

        With several bases, a tuple of as many.
        """
        x = images if self.square == 1 else parts.space_to_depth(images, self.square)
        pre_norm = self.final_norm is not None
        x = parts.unit(x, self.stem, self.stem_norm, None if pre_norm else self.activation)
        if self.pools:
            x = parts.max_pool3(x)
        if self.bases > 1:
            x = (x,) * self.bases
        found = []
        for number in range(1, self.stages + 1):
            if self.halves and number > 1:
                x = jax.tree.map(parts.max_pool2, x)  # of each base, where there are several
            for block in getattr(self, f"stage{number}"):
                x = block(x)
            found.append(x)
        return found


def _check(style, make, zero_init_gamma, pre_norm, bases, soft_gates, halves) -> None:
    """Raises a UserError on options that do not go together."""
    if style.skip == "conv" and make is not BasicBlock:
        raise UserError(
            "model.skip='conv': each convolution of a block must keep the shape, so it is for "
            "basic blocks; for depth 50 and 101 allowed 'block'"
        )
    if style.skip == "conv" and style.fixup:
        raise UserError(
            "model.skip='conv' with model.norm='fixup': its start is that of blocks of several "
            "convolutions; allowed 'block'"
        )
    if zero_init_gamma and (style.skip == "conv" or style.norm == "frozen"):
        raise UserError(
            f"model.zero_init_gamma=True with model.skip={style.skip!r} and model.norm="
            f"{style.norm!r}: allowed for skip 'block' and a norm that learns"
        )
    if zero_init_gamma and not style.ends_in_norm:
        raise UserError(
            f"model.zero_init_gamma=True with model.order={style.order!r} and model.norm="
            f"{style.norm!r}: allowed for orders cabs, cbsa with a norm"
        )
    if pre_norm and style.fixup:
        raise UserError("model.pre_norm=True: there is no norm with model.norm='fixup'; give False")
    if bases < 1:
        raise UserError(f"model.bases={bases}: must be at least 1")
    if soft_gates and bases == 1:
        raise UserError("model.soft_gates=True: with model.bases=1 there is nothing to choose from")
    if halves and style.shortcut == "pool":
        raise UserError(
            "model.shortcut='pool' with model.downsample='maxpool': no block has a stride that it "
            "could pool for; allowed 'conv', 'pad'"
        )


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
    if layout != "cifar":
        if depth not in IMAGENET_BLOCKS:
            allowed = ", ".join(map(str, IMAGENET_BLOCKS))
            raise UserError(f"model.depth={depth}: allowed for layout {layout!r}: {allowed}")
        return IMAGENET_BLOCKS[depth]
    if depth < 8 or depth % 6 != 2:
        raise UserError(
            f"model.depth={depth}: allowed for layout 'cifar': 8, 14, 20, ..., that is 6n + 2"
        )
    return (depth // 6,) * stages
