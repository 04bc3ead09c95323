"""Decoding and fitting on the host, against Pillow's pixels and plain geometry."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from efficient_nets.data import images
from efficient_nets.errors import UserError


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def coordinates(width, height):
    """An image whose pixels say where they are: red is x, green is y."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, x], -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_gives_the_channels_asked_for(mode, channels):
    image = Image.fromarray(np.full((4, 5), 255, np.uint8)).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    out = np.asarray(images.decode(encoded(image, kind), channels, "x"))
    assert out.shape == ((4, 5) if channels == 1 else (4, 5, channels))
    assert out.dtype == np.uint8 and (out == 255).all()


def test_decode_is_exact(pixels):
    np.testing.assert_array_equal(
        images.decode(encoded(Image.fromarray(pixels(0))), 3, "x"), pixels(0)
    )


def test_a_picture_is_turned_as_its_camera_was():
    """Orientation 6: the first row is the right side."""
    stored, exif, buffer = coordinates(8, 6), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    stored.save(buffer, "PNG", exif=exif)
    as_stored, upright = (
        np.asarray(images.decode(buffer.getvalue(), 3, "x", upright=upright))
        for upright in (False, True)
    )
    np.testing.assert_array_equal(as_stored, stored)
    np.testing.assert_array_equal(upright, np.rot90(stored, -1))


@pytest.mark.parametrize("error", [RuntimeError, EOFError, IndexError, zlib.error])
def test_whatever_a_decoder_raises_names_the_image(error, pixels, monkeypatch):
    def fails(*_):
        raise error("an item is missing")

    monkeypatch.setattr(images.Image.Image, "convert", fails)
    with pytest.raises(UserError, match="cat.avif is not a readable image: an item is missing"):
        images.decode(encoded(Image.fromarray(pixels(0))), 3, "cat.avif")


def test_decode_names_what_it_cannot_read(pixels):
    good = encoded(Image.fromarray(pixels(0, 64, 64, 3)))
    deep = encoded(Image.fromarray(np.full((4, 4), 60000, np.uint16)))
    for bad in (b"", b"not an image", good[: len(good) // 2], deep):
        with pytest.raises(UserError, match="cat.png is not a readable image"):
            images.decode(bad, 3, "cat.png")


@pytest.mark.parametrize("width, height", [(128, 64), (64, 128), (90, 90)])
def test_centre_crop_keeps_the_centre_and_the_aspect(width, height):
    out = np.asarray(images.centre_crop(coordinates(width, height), 28)).astype(float)
    assert out.shape == (28, 28, 3)
    # The short side becomes 32 pixels, of which 28 are kept: so far apart are the samples.
    step = min(width, height) / 32
    ramp = (np.arange(28) - 13.5) * step
    # Within a rounded pixel value.
    np.testing.assert_allclose(out[..., 0], np.tile((width - 1) / 2 + ramp, (28, 1)), atol=1)
    np.testing.assert_allclose(out[..., 1].T, np.tile((height - 1) / 2 + ramp, (28, 1)), atol=1)


def test_random_resized_crop_covers_the_range_of_areas_and_ratios(monkeypatch):
    boxes = []
    monkeypatch.setattr(images, "resize", lambda image, size, box: boxes.append(box))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        images.random_resized_crop(Image.new("RGB", (200, 160)), 8, rng)
    left, top, right, bottom = np.array(boxes).T
    assert left.min() == 0 and top.min() == 0 and right.max() == 200 and bottom.max() == 160
    area = (right - left) * (bottom - top) / (200 * 160)
    ratio = (right - left) / (bottom - top)
    # Sides are rounded to pixels, of which the smallest box has 44 each way.
    assert 0.078 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.37


def test_random_resized_crop_takes_the_pixels_of_its_box():
    rng = np.random.default_rng(1)
    out = np.asarray(images.random_resized_crop(coordinates(200, 160), 16, rng)).astype(int)
    assert out.shape == (16, 16, 3)
    assert (np.diff(out[..., 0], axis=1) > 0).all() and (np.diff(out[..., 1], axis=0) > 0).all()


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000)])
def test_random_resized_crop_of_a_strip_is_its_central_part(size, monkeypatch):
    monkeypatch.setattr(images, "resize", lambda image, size, box: box)
    left, top, right, bottom = images.random_resized_crop(
        Image.new("RGB", size), 8, np.random.default_rng(0)
    )
    assert (left + right, top + bottom) == size
    assert sorted([right - left, bottom - top]) == pytest.approx([10, 40 / 3])
