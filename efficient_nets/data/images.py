"""Images on the host: decoding, and fitting images of any size to a square (Pillow)."""

import io
import math
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from efficient_nets.errors import UserError

# What Pillow and its plugins raise for a file that is damaged, not an image, or far too large.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for uint8 images of that many channels


def decode(data: bytes, channels: int, name: str, *, upright: bool = False) -> Image.Image:
    """Decodes an image file to 1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits.

    Args:
      data: The file.
      channels: How many.
      name: Of the image, for the error.
      upright: Whether to turn it as its EXIF data say, as a camera's pictures are to be shown. The
        boxes of data sets are of the pixels as they are stored.

    Raises:
      UserError: the image is damaged or has more than 8 bits a channel; says `name`.
    """
    mode = MODES[channels]
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":  # Pillow would clip these to 255, not scale them
                raise ValueError(f"its mode is {image.mode}, more than 8 bits a channel")
            return (ImageOps.exif_transpose(image) if upright else image).convert(mode)
    except UNREADABLE as error:
        raise UserError(f"{name} is not a readable image: {error}") from error


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre of the image resized so that its short side is size * 256 / 224."""
    side = min(image.size) * 224 / 256
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return resize(image, (size, size), (left, top, left + side, top + side))


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random part of the image, resized to a square.

    Its area is 8 to 100% of the image's, its aspect ratio 3/4 to 4/3 before resizing (Szegedy et
    al. 2015, https://arxiv.org/abs/1409.4842). If ten draws do not fit into the image, the largest
    central part of an allowed ratio.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = rng.integers(width - w, endpoint=True)
            top = rng.integers(height - h, endpoint=True)
            return resize(image, (size, size), (left, top, left + w, top + h))
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    left, top = (width - w) / 2, (height - h) / 2
    return resize(image, (size, size), (left, top, left + w, top + h))


def resize(image: Image.Image, size: tuple[int, int], box=None) -> Image.Image:
    """Bilinear, antialiased; `size` is (width, height), `box` the part to take."""
    return image.resize(size, Image.Resampling.BILINEAR, box=box)
