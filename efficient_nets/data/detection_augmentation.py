"""Augmentation for detectors on the device, as SSD's (arXiv 1512.02325, section 2.2).

Every image has its own key, and its boxes go where its pixels go. Expansion, crop, flip and the
net's size are one window of the stored image, resampled once.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.data.augmentation import standardised
from efficient_nets.data.sources import Info
from efficient_nets.data.windows import resample
from efficient_nets.errors import UserError
from efficient_nets.ops import boxes as box_ops

MINIMA = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # IoU of a crop and an object, one of which is asked for
CANDIDATES = 50  # crops that are drawn, of which the first that will do is taken
GREY = (0.299, 0.587, 0.114)
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclasses.dataclass(frozen=True)
class DetectionAugmentation:
    """What is done to training images; hashable. Each part to half of the images, but the crop.

    Attributes:
      photometric: Brightness by up to 32 of 255, contrast and saturation by 0.5 to 1.5, hue by up
        to 18 degrees.
      expand: Largest side of a canvas of mean colour that the image is put onto, in sides of the
        image, from 1 on.
      crop: A part with sides of 0.3 to 1 and an aspect ratio of 1/2 to 2, whose IoU with some
        object is at least one of 0, .1, .3, .5, .7, .9; one image in seven stays whole, and one
        for which no crop of 50 will do. Objects whose centre is outside are left out.
      flip: Mirrored left-right.
    """

    photometric: bool = True
    expand: float = 4.0
    crop: bool = True
    flip: bool = True

    def __post_init__(self):
        if not (math.isfinite(self.expand) and self.expand >= 1):
            raise UserError(f"detection.expand={self.expand}: must be at least 1, which is none")


def augment_detection(
    key: Array, image: Array, boxes: Array, label: Array, *, spec: DetectionAugmentation, info: Info
) -> tuple[Array, Array, Array]:
    """Augments, resizes and normalises a batch.

    Args:
      key: A random key, another for each batch.
      image: uint8 `(N, S, S, C)`.
      boxes: float32 `(N, M, 4)`, corners in shares of the image.
      label: int32 `(N, M)`; -1 where there is no object.
      spec: What to do.
      info: Of the data set.

    Returns:
      Images float32 `(N, H, W, C)` of `info.image_shape`, boxes and labels; objects that are left
      out have label -1.
    """
    keys = jax.random.split(key, len(image))
    return jax.vmap(lambda k, *x: _one(k, *x, spec, info))(keys, image, boxes, label)


def _one(key: Array, image: Array, boxes: Array, label: Array, spec, info: Info):
    colour, size, place, crop, mirror = jax.random.split(key, 5)
    window = jnp.array([0.0, 0.0, 1.0, 1.0], jnp.float32)
    if spec.expand > 1:
        window = expanded(size, place, spec.expand)
    if spec.crop:
        window = cropped(crop, window, boxes, label >= 0)
    boxes, label = into_window(window, boxes, label)
    pixels = image.astype(jnp.float32) / 255
    if spec.photometric:
        pixels = distorted(colour, pixels)
    # What comes in from outside is 0 behind this, the mean colour.
    pixels = resample(standardised(pixels, info), window, info.image_shape[:2])
    if spec.flip:
        flips = jax.random.bernoulli(mirror)
        pixels = jnp.where(flips, pixels[:, ::-1], pixels)
        ymin, xmin, ymax, xmax = jnp.moveaxis(boxes, -1, 0)
        boxes = jnp.where(flips, jnp.stack([ymin, 1 - xmax, ymax, 1 - xmin], -1), boxes)
    return pixels, boxes, label


def expanded(size_key: Array, place_key: Array, most: float) -> Array:
    """The canvas around an image, in its coordinates, `(4,)`; for half of the keys the image."""
    half, size_key = jax.random.split(size_key)
    side = jax.random.uniform(size_key, minval=1.0, maxval=most)
    side = jnp.where(jax.random.bernoulli(half), side, 1.0)
    corner = -jax.random.uniform(place_key, (2,)) * (side - 1)
    return jnp.concatenate([corner, corner + side])


def cropped(key: Array, window: Array, boxes: Array, valid: Array) -> Array:
    """A part of a window that leaves enough of some object, `(4,)`; or the window."""
    choice, sides, places = jax.random.split(key, 3)
    minimum = jax.random.choice(choice, jnp.array([*MINIMA, -1.0], jnp.float32))
    shape = (CANDIDATES, 2)
    side = jax.random.uniform(sides, shape, minval=0.3, maxval=1.0)
    low = jax.random.uniform(places, shape) * (1 - side)
    origin, extent = window[None, :2], (window[2:] - window[:2])[None]
    found = jnp.concatenate([origin + low * extent, origin + (low + side) * extent], -1)
    ratio = side[:, 0] / side[:, 1]
    overlap = jnp.where(valid[None], box_ops.iou(found, boxes), -1)
    inside = _has_centre(found, boxes) & valid[None]
    good = (ratio >= 0.5) & (ratio <= 2) & jnp.any(inside, 1)
    good &= jnp.max(overlap, 1) >= minimum
    taken = jnp.any(good) & (minimum >= 0)
    return jnp.where(taken, found[jnp.argmax(good)], window)


def _has_centre(windows: Array, boxes: Array) -> Array:
    """Which windows `(A, 4)` hold the centre of which boxes `(B, 4)`: bool `(A, B)`."""
    centre = (boxes[None, :, :2] + boxes[None, :, 2:]) / 2
    low, high = windows[:, None, :2], windows[:, None, 2:]
    return jnp.all((centre > low) & (centre < high), -1)


def into_window(window: Array, boxes: Array, label: Array) -> tuple[Array, Array]:
    """Boxes in shares of a window, cut off at its edge; label -1 where the centre is outside."""
    inside = _has_centre(window[None], boxes)[0]
    origin, extent = window[:2], window[2:] - window[:2]
    moved = (boxes.reshape(-1, 2, 2) - origin[None, None]) / extent[None, None]
    moved = jnp.clip(moved.reshape(-1, 4), 0, 1)
    keeps = inside & (box_ops.area(moved) > 0)
    return moved, jnp.where(keeps, label, -1)


def distorted(key: Array, image: Array) -> Array:
    """Another brightness, contrast, saturation and hue: `(H, W, C)` in [0, 1].

    Colours go through one matrix: saturation mixes with grey, hue turns in the plane of I and Q.
    Images that are not of three channels have brightness and contrast alone.
    """
    on_key, key = jax.random.split(key)
    on = jax.random.bernoulli(on_key, shape=(4,))
    low = jnp.array([-32 / 255, 0.5, 0.5, -math.pi / 10], jnp.float32)
    high = jnp.array([32 / 255, 1.5, 1.5, math.pi / 10], jnp.float32)
    drawn = low + (high - low) * jax.random.uniform(key, (4,))
    neutral = jnp.array([0.0, 1.0, 1.0, 0.0], jnp.float32)
    brightness, contrast, saturation, hue = jnp.where(on, drawn, neutral)
    image = contrast * (image + brightness)
    if image.shape[-1] == 3:
        turn = (
            jnp.eye(3)
            .at[1:, 1:]
            .set(jnp.array([[jnp.cos(hue), -jnp.sin(hue)], [jnp.sin(hue), jnp.cos(hue)]]))
        )
        yiq = jnp.array(YIQ, jnp.float32)
        grey = jnp.broadcast_to(jnp.array(GREY, jnp.float32), (3, 3))
        mix = saturation * jnp.eye(3) + (1 - saturation) * grey
        matrix = mix @ jnp.linalg.inv(yiq) @ turn @ yiq
        image = jnp.einsum("hwc,dc->hwd", image, matrix)
    return jnp.clip(image, 0, 1)
