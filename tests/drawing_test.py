"""Boxes in pictures: where they are, and what is left out."""

import numpy as np
from PIL import Image

from efficient_nets import drawing
from efficient_nets.tasks.average_precision import Found, Truth

GREY = Image.new("RGB", (80, 40), (90, 90, 90))
BOXES = np.array([[0.25, 0.5, 0.75, 0.75], [0.0, 0.0, 0.9, 0.4]])


def where(picture, colour):
    rows, columns = np.nonzero(np.all(np.asarray(picture) == colour, -1))
    return (rows.min(), columns.min(), rows.max(), columns.max()) if len(rows) else None


def test_a_box_is_drawn_where_it_is():
    truth = Truth(BOXES[:1], np.array([0]), np.array([False]))
    nothing = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    picture = drawing.draw(GREY, nothing, ("cat",), truth=truth)
    assert where(picture, drawing.TRUTH) == (10, 40, 30, 60)
    assert where(GREY, drawing.TRUTH) is None  # a copy


def test_weak_detections_are_left_out_and_classes_have_colours():
    found = Found(BOXES, np.array([0.9, 0.3]), np.array([1, 0]))
    picture = drawing.draw(GREY, found, ("cat", "dog"), least=0.5)
    box = where(picture, drawing.COLOURS[1])
    assert box[2] == 30 and box[1] <= 40 and box[3] >= 60  # its name stands above it
    assert where(picture, drawing.COLOURS[0]) is None
    unnamed = drawing.draw(GREY.convert("L"), found, ())
    assert where(unnamed, drawing.COLOURS[0]) is not None and unnamed.mode == "RGB"


def test_a_grid_is_about_square():
    images = [Image.new("RGB", (4, 3), (i, i, i)) for i in range(1, 6)]
    grid = drawing.grid(images)
    assert grid.shape == (6, 12, 3) and grid.dtype == np.uint8
    assert grid[::3, ::4, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
