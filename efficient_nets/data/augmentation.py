"""Augmentation on the device: pure functions of a key, to be used inside jit.

Each image has its own key, split from the one of the batch, so the result does not depend on how
many devices share the batch; and switching one part on or off leaves the draws of the others.
"""

import dataclasses

import jax
import jax.numpy as jnp

from efficient_nets.data.sources import Info
from efficient_nets.data.windows import resized
from efficient_nets.errors import UserError


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to training images, in this order; hashable.

    Attributes:
      crop: the image is shifted by -crop .. crop pixels each way. What comes in from outside is 0
        after normalising, that is the mean colour, as in He et al. 2015
        (https://arxiv.org/abs/1512.03385); torchvision's padding is black instead.
      flip: mirrored left-right with probability 1/2.
      cutout: side of a square set to 0 after normalising. Its centre is any pixel, so that it may
        be cut off at the border (https://arxiv.org/abs/1708.04552). 0 is off.
      mixup: alpha > 0 mixes each image and its label with those of the image before it in the
        batch, with a weight drawn for each from Beta(alpha, alpha)
        (https://arxiv.org/abs/1710.09412). 0 is off.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0

    def __post_init__(self):
        for field in ("crop", "cutout", "mixup"):
            if getattr(self, field) < 0:
                raise UserError(f"data.{field}={getattr(self, field)} must be at least 0")

    @classmethod
    def from_config(cls, config) -> "Augmentation":
        """Takes the fields of these names from `config.data`."""
        return cls(config.crop, config.flip, config.cutout, config.mixup)


def normalise(image: jax.Array, info: Info) -> jax.Array:
    """(image / 255 - mean) / std by channel: uint8 (..., H, W, C) to float32.

    Images that are stored at another size than the net's, as those of detection are, are resized.
    """
    pixels, size = image.astype(jnp.float32) / 255, info.image_shape[:2]
    if image.shape[-3:-1] != size:
        pixels = resized(pixels, size)
    return standardised(pixels, info)


def standardised(image: jax.Array, info: Info) -> jax.Array:
    """(image - mean) / std by channel, of values in [0, 1]: float32 (..., C)."""
    shape = (1,) * (image.ndim - 1) + (-1,)
    mean = jnp.array(info.mean, jnp.float32).reshape(shape)
    std = jnp.array(info.std, jnp.float32).reshape(shape)
    return (image - mean) / std


def augment(
    key: jax.Array, image: jax.Array, label: jax.Array, *, spec: Augmentation, info: Info
) -> tuple[jax.Array, jax.Array]:
    """Augments and normalises a batch.

    Args:
      key: a random key, another for each batch.
      image: uint8 (N, H, W, C).
      label: int32 (N,).
      spec: what to do.
      info: of the data set.

    Returns:
      Images float32 (N, H, W, C) and soft labels float32 (N, classes), whose rows sum to 1.

    Raises:
      UserError: crop or cutout is not smaller than the image.
    """
    side = min(image.shape[1:3])
    for field in ("crop", "cutout"):
        if getattr(spec, field) >= side:
            raise UserError(
                f"data.{field}={getattr(spec, field)} must be smaller than the image, {side}"
            )
    keys = jax.vmap(lambda k: jax.random.split(k, 4))(jax.random.split(key, len(image)))
    soft = jax.nn.one_hot(label, info.num_classes, dtype=jnp.float32)
    out = jax.vmap(lambda k, x: _window(k, x, spec, info))(keys[:, :3], image)
    if spec.mixup:
        weight = jax.vmap(lambda k: jax.random.beta(k, spec.mixup, spec.mixup))(keys[:, 3])
        out = _mix(out, weight[:, None, None, None])
        soft = _mix(soft, weight[:, None])
    return out, soft


def _mix(x: jax.Array, weight: jax.Array) -> jax.Array:
    return weight * x + (1 - weight) * jnp.roll(x, 1, axis=0)


def _window(keys: jax.Array, image: jax.Array, spec: Augmentation, info: Info) -> jax.Array:
    """Crop, flip, normalise and cutout of one image (H, W, C).

    A shifted or mirrored image is a list of rows and one of columns: a single gather.
    """
    height, width, _ = image.shape
    rows, columns = jnp.arange(height), jnp.arange(width)
    keep = jnp.ones((height, width), bool)
    if spec.crop:
        shift = jax.random.randint(keys[0], (2,), -spec.crop, spec.crop + 1, jnp.int32)
        rows, columns = rows + shift[0], columns + shift[1]
        keep &= _within(rows, 0, height)[:, None] & _within(columns, 0, width)[None, :]
    if spec.flip:
        mirror = jax.random.bernoulli(keys[1])
        columns, keep = (jnp.where(mirror, jnp.flip(v, -1), v) for v in (columns, keep))
    if spec.cutout:
        centre = jax.random.randint(keys[2], (2,), 0, jnp.array([height, width]), jnp.int32)
        top, left = centre - spec.cutout // 2
        inside_rows = _within(jnp.arange(height), top, top + spec.cutout)
        inside_columns = _within(jnp.arange(width), left, left + spec.cutout)
        keep &= ~(inside_rows[:, None] & inside_columns[None, :])
    if spec.crop or spec.flip:
        image = image.at[rows[:, None], columns[None, :]].get(mode="clip")
    return jnp.where(keep[..., None], normalise(image, info), 0.0)


def _within(values: jax.Array, start: int | jax.Array, stop: int | jax.Array) -> jax.Array:
    return (values >= start) & (values < stop)
