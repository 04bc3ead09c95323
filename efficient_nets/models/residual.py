"""Residual blocks whose parts stand in any order, and the shortcut beside them.

The parts around each convolution are letters: c the convolution, b its norm, a an activation, s the
sum with the shortcut. In `Style.order` 'cbsa' they make the block of He et al.,

    x -> conv1 -> norm1 -> act -> conv2 -> norm2 -> + shortcut(x) -> act

where all convolutions but the last leave s out, if `Style.skip` is 'block'.
"""

import dataclasses
import re

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import (
    BatchNorm,
    FrozenBatchNorm,
    GroupNorm,
    InstanceNorm,
    kaiming_normal,
    layer_norm_act,
)
from efficient_nets.models import parts

ORDERS = {
    "cbsa": "arXiv 1512.03385, and torchvision",
    "cbas": "the sum is not activated",
    "cabs": "Group-Net, arXiv 1811.10413: the norm last",
    "bacs": "pre-activation, arXiv 1603.05027",
    "bcas": "norm in front of the convolution, activation behind it",
}
SKIPS = {
    "block": "one shortcut around the block",
    "conv": "one around each convolution, Bi-Real Net, arXiv 1808.00278",
}
SHORTCUTS = {
    "conv": "1x1 convolution with the block's stride, norm",
    "pool": "2x2 mean where the block has stride 2, 1x1 convolution, norm",
    "pad": "option A of arXiv 1512.03385: every other pixel, channels filled up with zeros",
}


class Scalars(nnx.Module):
    """`scale * x + bias`, one number each, where Fixup has no norm; without scale if told so."""

    def __init__(self, *, scale: bool = True):
        self.scale = nnx.data(nnx.Param(jnp.ones(())) if scale else None)
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array) -> Array:
        if self.scale is not None:
            x = self.scale[...].astype(x.dtype) * x
        return x + self.bias[...].astype(x.dtype)


NORMS = {
    "batch": BatchNorm,
    "group": GroupNorm,
    "instance": InstanceNorm,
    "frozen": FrozenBatchNorm,
    "fixup": Scalars,
}


@dataclasses.dataclass(frozen=True)
class Style:
    """What the blocks of a net have in common, each field an option `model.NAME`.

    Attributes:
      order: Of the parts around each convolution, a key of `ORDERS`.
      skip: A key of `SKIPS`.
      shortcut: What it is where the shapes differ, a key of `SHORTCUTS`. It has no norm in an order
        that starts with b, where that of the next block is behind it (arXiv 1603.05027).
      activation: A key of `parts.ACTIVATIONS` or `parts.LEARNED_ACTIVATIONS`.
      norm: A key of `NORMS`. 'fixup' (arXiv 1901.09321) has none: of a block's m convolutions all
        but the last start `L^(-1/(2m - 2))` times as large, the last one at 0. A number is added
        before and behind each; the last one's output is multiplied by one.
      depth: L, the number of blocks of the net; heeded by 'fixup' alone.
    """

    order: str = "cbsa"
    skip: str = "block"
    shortcut: str = "conv"
    activation: str = "relu"
    norm: str = "batch"
    depth: int = 1

    def __post_init__(self):
        for field, table in (
            ("order", ORDERS),
            ("skip", SKIPS),
            ("shortcut", SHORTCUTS),
            ("activation", parts.ACTIVATIONS | parts.LEARNED_ACTIVATIONS),
            ("norm", NORMS),
        ):
            names.pick(f"model.{field}", getattr(self, field), table)
        if self.fixup and self.order != "cbsa":
            raise UserError(f"model.order={self.order!r}: with norm 'fixup' allowed 'cbsa'")

    @property
    def fixup(self) -> bool:
        return self.norm == "fixup"

    @property
    def ends_in_norm(self) -> bool:
        """A norm is the last thing before the sum, so that its scale can take the block out."""
        return "bs" in self.order and not self.fixup

    def features(self, part: str, before: int, after: int) -> int:
        """Channels where a part stands, around a convolution from `before` to `after`."""
        return before if self.order.index(part) < self.order.index("c") else after

    def make_norm(self, features: int, *, last: bool = False, rngs: nnx.Rngs) -> nnx.Module:
        if self.fixup:
            return Scalars(scale=last)
        return NORMS[self.norm](features, rngs=rngs)

    def kernel_init(self, convs: int, last: bool) -> nnx.Initializer:
        """Of one of a block's convolutions."""
        if not self.fixup:
            return kaiming_normal
        if last:
            return nnx.initializers.zeros
        variance = 2.0 * self.depth ** (-1 / (convs - 1))
        return nnx.initializers.variance_scaling(variance, "fan_in", "normal")

    def steps(self, sums: bool) -> list[str]:
        """The order with what stands right behind the convolution joined to it: 'cb', 's', 'a'."""
        return re.findall("cb?a?|[bas]", self.order if sums else self.order.replace("s", ""))


def _convolve(block: "Block", number: int, step: str, x: Array, _: Array) -> Array:
    """The unit that `layer_norm_act` takes in, which the hybrid backward depends on."""
    norm = getattr(block, f"norm{number}") if "b" in step else None
    follows = getattr(block, f"activation{number}") if "a" in step else None
    if block.style.fixup and (number > 1 or not block.projects):
        x = getattr(block, f"shift{number}")(x)
    return parts.unit(x, getattr(block, f"conv{number}"), norm, follows)


def _normalise(block: "Block", number: int, step: str, x: Array, _: Array) -> Array:
    norm = getattr(block, f"norm{number}")
    return x if norm is None else norm(x)  # it went with a convolution that was removed


def _activate(block: "Block", number: int, step: str, x: Array, _: Array) -> Array:
    return getattr(block, f"activation{number}")(x)


def _add(block: "Block", number: int, step: str, x: Array, carried: Array) -> Array:
    return x + carried


# By the first letter of a step.
STEPS = {"c": _convolve, "b": _normalise, "a": _activate, "s": _add}


class Block(nnx.Module):
    """Convolutions `conv1`, `norm1`, ... and, where shapes differ, `shortcut`, `shortcut_norm`.

    Subclasses list in `CONVS` their convolutions: channels as a multiple of the width, kernel, and
    whether it has the block's stride. The last one's multiple is the block's `expansion`.

    Args:
      in_features: Channels of the input.
      width: The block's width.
      strides: Of one of its convolutions.
      style: What the blocks of a net have in common.
      inner: Channels between its convolutions, where `CONVS` is not to say them.
      groups: Of its convolutions of more than one tap.
      rngs: Source of the initial values.
    """

    CONVS: tuple[tuple[int, int, bool], ...]
    expansion = 1

    def __init__(
        self,
        in_features: int,
        width: int,
        strides: int,
        *,
        style: Style = Style(),
        inner: int = 0,
        groups: int = 1,
        rngs: nnx.Rngs,
    ):
        features = self.expansion * width
        self.style, self.strides, self.features = style, strides, features
        self.projects = strides > 1 or in_features != features
        if self.projects and style.shortcut != "pad":
            moves = 1 if style.shortcut == "pool" else strides
            self.shortcut = parts.conv(in_features, features, 1, strides=moves, rngs=rngs)
            self.shortcut_norm = nnx.data(None)
            if style.order[0] != "b" and not style.fixup:
                self.shortcut_norm = style.make_norm(features, rngs=rngs)
        before = in_features
        for number, (times, kernel, strided) in enumerate(self.CONVS, start=1):
            last = number == len(self.CONVS)
            after = inner if inner and not last else times * width
            conv = parts.conv(
                before,
                after,
                kernel,
                strides=strides if strided else 1,
                groups=groups if kernel > 1 else 1,
                kernel_init=style.kernel_init(len(self.CONVS), last),
                rngs=rngs,
            )
            norm = style.make_norm(style.features("b", before, after), last=last, rngs=rngs)
            follows = parts.channel_activation(
                style.activation, style.features("a", before, after), rngs=rngs
            )
            if style.fixup:
                setattr(self, f"shift{number}", Scalars(scale=False))
            setattr(self, f"conv{number}", conv)
            setattr(self, f"norm{number}", norm)
            setattr(self, f"activation{number}", follows)
            before = after

    @property
    def last_norm(self) -> nnx.Module:
        """The last convolution's norm."""
        return getattr(self, f"norm{len(self.CONVS)}")

    def carry(self, x: Array) -> Array:
        """What the sum takes beside the convolutions' output."""
        if not self.projects:
            return x
        if self.style.shortcut == "pad":
            x = x[:, :: self.strides, :: self.strides]
            missing = self.features - x.shape[-1]
            return jnp.pad(x, ((0, 0),) * 3 + ((missing // 2, missing - missing // 2),))
        if self.style.shortcut == "pool" and self.strides == 2:
            x = parts.mean_pool(x, 2)
        return layer_norm_act(x, self.shortcut, self.shortcut_norm)

    def __call__(self, x: Array) -> Array:
        """`(N, H, W, in_features)` to `(N, ceil(H / strides), ceil(W / strides), features)`."""
        if self.style.fixup and self.projects:
            x = self.shift1(x)  # of a shortcut with parameters too
        carried, each = self.carry(x), self.style.skip == "conv"
        for number in range(1, len(self.CONVS) + 1):
            for step in self.style.steps(each or number == len(self.CONVS)):
                x = STEPS[step[0]](self, number, step, x, carried)
            if each:
                carried = x
        return x


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    CONVS = ((1, 3, True), (1, 3, False))


class Bottleneck(Block):
    """1x1 to `width`, 3x3 with the stride, 1x1 to `4 * width`."""

    CONVS = ((1, 1, False), (1, 3, True), (4, 1, False))
    expansion = 4
