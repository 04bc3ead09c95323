"""Detections drawn into images."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from efficient_nets.tasks.average_precision import Found, Truth

COLOURS = [tuple(round(255 * x) for x in rgb) for rgb in matplotlib.colormaps["tab20"].colors]
COLOURS = COLOURS[::2] + COLOURS[1::2]  # strong ones first
TRUTH = (255, 255, 255)


def draw(
    image: Image.Image,
    found: Found,
    class_names: Sequence[str],
    *,
    least: float = 0.0,
    truth: Truth | None = None,
) -> Image.Image:
    """A copy in RGB with a box, a name and a score for each detection; objects are white.

    Args:
      image: Of any size.
      found: Boxes in shares of the image.
      class_names: By label; where there are none, the label is written.
      least: Detections of a lower score are left out.
      truth: The objects that there are.
    """
    image = image.convert("RGB")
    canvas, (width, height) = ImageDraw.Draw(image), image.size
    line = max(round(min(width, height) / 200), 1)
    font = ImageFont.load_default(size=max(min(width, height) / 32, 10))

    def pixels(box):
        ymin, xmin, ymax, xmax = map(float, box)
        return xmin * width, ymin * height, xmax * width, ymax * height

    if truth is not None:
        for box in truth.boxes:
            canvas.rectangle(pixels(box), outline=TRUTH, width=line)
    for box, score, label in zip(*found, strict=True):
        if score < least:
            continue
        colour, corners = COLOURS[label % len(COLOURS)], pixels(box)
        canvas.rectangle(corners, outline=colour, width=2 * line)
        name = class_names[label] if class_names else str(label)
        text = f"{name} {100 * float(score):.0f}"
        left, top, right, bottom = canvas.textbbox(corners[:2], text, font=font)
        up = min(bottom - corners[1], corners[1])  # above the box, if the image goes on there
        canvas.rectangle((left - 1, top - up - 1, right + 1, bottom - up + 1), fill=colour)
        canvas.text((corners[0], corners[1] - up), text, font=font, fill=TRUTH)
    return image


def grid(images: Sequence[Image.Image]) -> np.ndarray:
    """Images of one size side by side in about a square: uint8 `(H, W, 3)`."""
    columns = int(np.ceil(np.sqrt(len(images))))
    arrays = [np.asarray(image) for image in images]
    arrays += [np.zeros_like(arrays[0])] * (-len(arrays) % columns)
    rows = [np.concatenate(arrays[i : i + columns], 1) for i in range(0, len(arrays), columns)]
    return np.concatenate(rows)
