"""A window of an image at another size, on the device."""

import jax
import jax.numpy as jnp
from jax import Array


def resample(image: Array, window: Array, size: tuple[int, int]) -> Array:
    """The part of an image that a window shows, bilinear and antialiased, 0 outside of the image.

    Args:
      image: `(H, W, C)`, of a float type.
      window: `[ymin, xmin, ymax, xmax]` in shares of the image; may reach beyond it.
      size: `(height, width)` of the result.
    """
    shape = jnp.array(image.shape[:2], image.dtype)
    extent, target = window[2:] - window[:2], jnp.array(size, image.dtype)
    return jax.image.scale_and_translate(
        image,
        (*size, image.shape[-1]),
        (0, 1),
        target / (shape * extent),
        -window[:2] * target / extent,
        method="linear",
        antialias=True,
    )


def resized(image: Array, size: tuple[int, int]) -> Array:
    """All of each image `(..., H, W, C)`, of a float type, at another size, as `resample`."""
    shape = (*image.shape[:-3], *size, image.shape[-1])
    return jax.image.resize(image, shape, method="linear", antialias=True)
