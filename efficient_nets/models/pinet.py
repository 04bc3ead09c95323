"""Pi-nets, whose logits are polynomials of the image (Chrysos et al., arXiv 2006.13026).

`PiNet` is one polynomial of the flattened image; `PiResNet` is a chain of quadratic ones, made of
convolutions. Products of linear maps make them nonlinear: there are no activation functions.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Dense, layer_norm_act
from efficient_nets.models import parts

FORMS = {"ccp": "coupled CP decomposition", "ncp": "nested coupled CP decomposition"}
FIRST_CHANNELS = 64


class PiNet(nnx.Module):
    """A polynomial of degree N of the flattened image z `(d,)`, by hidden values x_n `(k,)`.

    'ccp', where all degrees share the factors U_n, and 'ncp', where maps S_n nest them:

        x_1 = U_1 z            x_n = (U_n z) * x_{n-1} + x_{n-1}        y = C x_N + beta
        x_1 = (A_1 z) * b_1    x_n = (A_n z) * (S_n x_{n-1} + b_n)      y = C x_N + beta

    The paper's b_n is a product B_n' b_n of parameters; here it is one vector, which is as general.
    It starts at 1, so that every degree is there from the start. U_n and A_n are `factors/{n-1}`,
    S_n is `states/{n-2}`, with b_n as its bias, b_1 is `scale`, C is `head`. There are N d k +
    (k + 1) classes parameters in 'ccp', and N k + (N - 1) k^2 more in 'ncp'.

    Args:
      image_shape: `(H, W, C)`, d = H W C; the net takes images of this size only.
      num_classes: Number of logits.
      form: 'ccp' or 'ncp'.
      degree: N, at least 1.
      hidden: k, at least 1.
      width: Multiplies k.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        form: str = "ccp",
        degree: int = 4,
        hidden: int = 256,
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        names.pick("model.form", form, FORMS)
        for field, value in (("degree", degree), ("hidden", hidden)):
            if value < 1:
                raise UserError(f"model.{field}={value}: must be at least 1")
        height, image_width, channels = image_shape
        flat, hidden = height * image_width * channels, parts.scaled(hidden, width)
        self.nested = form == "ncp"
        self.factors = nnx.List(
            [Dense(flat, hidden, use_bias=False, rngs=rngs) for _ in range(degree)]
        )
        if self.nested:
            ones = nnx.initializers.ones
            self.scale = nnx.Param(ones(rngs.params(), (hidden,), jnp.float32))
            self.states = nnx.List(
                [Dense(hidden, hidden, bias_init=ones, rngs=rngs) for _ in range(degree - 1)]
            )
        self.head = parts.head(hidden, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        z = images.reshape(images.shape[0], -1)
        first, *others = self.factors
        x = first(z)
        if self.nested:
            x = parts.scale_channels(x, self.scale[...])
            for factor, state in zip(others, self.states, strict=True):
                x = factor(z) * state(x)
        else:
            for factor in others:
                x = factor(z) * x + x
        return self.head(x)


class PiBlock(nnx.Module):
    """`alpha * m * s + s`; m is `norm2(conv2(norm1(conv1(x))))`, s `shortcut_norm(shortcut(x))`.

    An NCP of degree 2 made of convolutions, two of 3x3 and one of 1x1. alpha is one number, learned
    from 0, so the block starts as s. In evaluation mode its output is of degree 2 in x.
    """

    def __init__(self, in_features: int, features: int, strides: int, *, rngs: nnx.Rngs):
        self.conv1 = parts.conv(in_features, features, 3, strides=strides, rngs=rngs)
        self.norm1 = BatchNorm(features, rngs=rngs)
        self.conv2 = parts.conv(features, features, 3, rngs=rngs)
        self.norm2 = BatchNorm(features, rngs=rngs)
        self.shortcut = parts.conv(in_features, features, 1, strides=strides, rngs=rngs)
        self.shortcut_norm = BatchNorm(features, rngs=rngs)
        self.alpha = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array) -> Array:
        main = layer_norm_act(x, self.conv1, self.norm1)
        main = layer_norm_act(main, self.conv2, self.norm2)
        shortcut = layer_norm_act(x, self.shortcut, self.shortcut_norm)
        return self.alpha[...].astype(x.dtype) * main * shortcut + shortcut


class PiResNet(nnx.Module):
    """`stem`, stages `stage1`, `stage2`, ... of `PiBlock`s, a global mean, `head`; no activations.

    3x3 stem with norm and 64 channels; each stage after the first has twice the channels of the one
    before and starts with stride 2; no conv has a bias. In evaluation mode the logits are
    polynomials of degree 2^blocks of the image. 11,528,274 parameters for blocks (2, 2, 2, 2), 3
    channels and 10 classes.

    Args:
      image_shape: `(H, W, C)`, any size.
      num_classes: Number of logits.
      blocks: Number of blocks of each stage, one stage or more.
      width: Multiplies all channel numbers but the image's.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if not blocks or min(blocks) < 1:
            raise UserError(f"model.blocks={blocks}: give a number of at least 1 for each stage")
        self.stages = len(blocks)
        channels = parts.scaled(FIRST_CHANNELS, width)
        self.stem = parts.conv(image_shape[-1], channels, 3, rngs=rngs)
        self.stem_norm = BatchNorm(channels, rngs=rngs)
        for number, count in enumerate(blocks, start=1):
            features = parts.scaled(FIRST_CHANNELS * 2 ** (number - 1), width)
            stage = nnx.List([])
            for index in range(count):
                strides = 2 if number > 1 and index == 0 else 1
                stage.append(PiBlock(channels, features, strides, rngs=rngs))
                channels = features
            setattr(self, f"stage{number}", stage)
        self.head = parts.head(channels, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = layer_norm_act(images, self.stem, self.stem_norm)
        for number in range(1, self.stages + 1):
            for block in getattr(self, f"stage{number}"):
                x = block(x)
        return self.head(parts.global_mean(x))
