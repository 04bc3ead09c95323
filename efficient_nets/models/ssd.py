"""SSD (Liu et al. 2016, arXiv 1512.02325): a detector on the maps of a classifier's net."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.models import parts
from efficient_nets.models.mobilenet import MobileNet
from efficient_nets.models.resnet import ResNet
from efficient_nets.models.vgg import VGG, ConvBlock
from efficient_nets.ops.boxes import Priors

# The net, the layout that '' means, and the options of a detector that it has too.
BACKBONES: dict[str, tuple[type[nnx.Module], str, tuple[str, ...]]] = {
    "vgg": (VGG, "D", ()),
    "resnet": (ResNet, "imagenet", ("depth", "blocks")),
    "mobilenet": (MobileNet, "v1", ()),
}
# Channels of the convolutions that VGG's dense layers become, and of the last ones of the levels
# behind the backbone, up to stride 32 and behind it.
DENSE, NEAR, FAR = 1024, 512, 256
LEAST_HALVED = 6  # pixels of a map that a convolution of stride 2 follows, and not one unpadded


class Boxes(NamedTuple):
    """What a detector gives for N images, float32.

    Attributes:
      logits: `(N, P, classes + 1)` of each prior; 0 is the background.
      offsets: `(N, P, 4)`, as `ops.boxes.encode` gives them.
      priors: `(P, 4)`, centre form; a constant.
    """

    logits: Array
    offsets: Array
    priors: Array


class L2Norm(nnx.Module):
    """`scale * x / |x|` over the channels of each pixel (ParseNet, arXiv 1506.04579), in float32.

    The scale, one a channel, is learned from 20 on, as SSD's of conv4_3.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.full((features,), 20.0))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        length = lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-10)
        return parts.scale_channels(wide * length, self.scale[...]).astype(x.dtype)


class SSD(nnx.Module):
    """`backbone`, further `levels` that halve, and on each map two 3x3 convolutions, the heads.

    Maps are the backbone's from `first_stride` on, behind VGG `dense` (conv6, of dilation 6, and
    conv7), and a 1x1 and a 3x3 convolution for each further one, down to 1 or 2 pixels: 38, 19, 10,
    5, 3 and 1 at 300 pixels, which makes 8,732 priors. All convolutions but the heads have a batch
    norm, which SSD's have not.

    Args:
      image_shape: `(H, W, C)`.
      num_classes: Of objects; the background comes on top.
      backbone: A key of `BACKBONES`.
      layout: Of the backbone; '' is 'D', 'imagenet' or 'v1'.
      depth, blocks: Of a ResNet.
      width: Multiplies all channel numbers.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`.
      first_stride: Image pixels along a pixel of the first map.
      scales: Of each map's priors, in shares of the side; () for those of `Priors.of_ssd`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        backbone: str = "vgg",
        layout: str = "",
        depth: int = 0,
        blocks: tuple[int, ...] = (),
        width: float = 1.0,
        activation: str = "relu",
        first_stride: int = 8,
        scales: tuple[float, ...] = (),
        rngs: nnx.Rngs,
    ):
        make, usual, has = names.pick("model.backbone", backbone, BACKBONES)
        options: dict[str, Any] = dict(depth=depth, blocks=tuple(blocks))
        for name in options.keys() - set(has):
            if options[name]:
                raise UserError(f"model.{name}={options[name]}: {backbone!r} has no such option")
        self.backbone = make(
            image_shape=image_shape,
            num_classes=1,
            layout=layout or usual,
            width=width,
            activation=activation,
            rngs=rngs,
            **{name: options[name] for name in has},
        )
        del self.backbone.head
        strides, features = (list(x) for x in zip(*self.backbone.levels, strict=True))
        if first_stride not in strides:
            raise UserError(f"model.first_stride={first_stride}: {backbone!r} has {strides}")
        self.first = strides.index(first_stride)
        features = features[self.first :]

        def block(channels, base, kernel, **geometry):
            follows = parts.activation(activation)
            wide = parts.scaled(base, width)
            return ConvBlock(
                channels, wide, kernel, activation=follows, rngs=rngs, **geometry
            ), wide

        self.dense = nnx.List([])
        if isinstance(self.backbone, VGG):
            conv6, channels = block(features[-1], DENSE, 3, dilation=6)
            conv7, features[-1] = block(channels, DENSE, 1)
            self.dense = nnx.List([conv6, conv7])
        self.first_norm = L2Norm(features[0], rngs=rngs)
        side, stride = min(-(-side // strides[-1]) for side in image_shape[:2]), strides[-1]
        self.levels = nnx.List([])
        while side > 2:
            halves = side >= LEAST_HALVED
            stride *= 2
            last = NEAR if stride <= 32 else FAR
            squeeze, channels = block(features[-1], last // 2, 1)
            geometry = dict(strides=2, padding=1) if halves else dict(padding=0)
            reduce, channels = block(channels, last, 3, **geometry)
            self.levels.append(nnx.List([squeeze, reduce]))
            features.append(channels)
            side = -(-side // 2) if halves else side - 2
        if len(features) < 2:
            raise UserError(f"image_shape={image_shape}: too small for a detector's maps")
        if scales and (len(scales) != len(features) or not 0 < min(scales) <= max(scales) <= 1):
            raise UserError(
                f"model.scales={scales}: give one for each of the {len(features)} maps, above 0 "
                "and at most 1"
            )
        self.priors, self.classes = Priors.of_ssd(len(features), scales), num_classes + 1

        def heads(outputs):
            return nnx.List(
                parts.conv(
                    channels,
                    count * outputs,
                    3,
                    use_bias=True,
                    kernel_init=nnx.initializers.xavier_uniform(),
                    rngs=rngs,
                )
                for channels, count in zip(features, self.priors.counts, strict=True)
            )

        self.class_heads, self.box_heads = heads(self.classes), heads(4)

    def __call__(self, images: Array) -> Boxes:
        """Images `(N, H, W, C)` to what each prior says of them."""
        if isinstance(self.backbone, VGG):
            maps = self.backbone.maps(images, whole=True)
            maps[-1] = nnx.max_pool(maps[-1], (3, 3), strides=(1, 1), padding="SAME")
            for block in self.dense:
                maps[-1] = block(maps[-1])
        else:
            maps = self.backbone.maps(images)
        maps = maps[self.first :]
        for squeeze, reduce in self.levels:
            maps.append(reduce(squeeze(maps[-1])))
        maps[0] = self.first_norm(maps[0])
        priors = self.priors.boxes([x.shape[1:3] for x in maps])

        def joined(heads, outputs):
            found = [head(x) for head, x in zip(heads, maps, strict=True)]
            found = [x.reshape(len(x), -1, outputs).astype(jnp.float32) for x in found]
            return jnp.concatenate(found, axis=1)

        return Boxes(
            joined(self.class_heads, self.classes), joined(self.box_heads, 4), jnp.asarray(priors)
        )
