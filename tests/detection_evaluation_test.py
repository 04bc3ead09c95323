"""Evaluation of a detector that says what it is told, without a net."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets import config as configs
from efficient_nets import data, detection_evaluation
from efficient_nets.tasks.detection import Detections

BOX = [0.25, 0.25, 0.75, 0.75]


def test_every_image_counts_once_and_the_first_ones_are_drawn(monkeypatch):
    """Of two batches of two images the last image is padding."""
    info = data.Info("two", 2, (8, 8, 3), (0.5,) * 3, (0.5,) * 3, ("cat", "dog"))
    config = configs.defaults()
    config.detection.drawn = 2
    run = types.SimpleNamespace(dataset=types.SimpleNamespace(info=info), config=config)
    labels = np.array([[[0, -1], [1, 0]], [[1, -1], [1, -1]]], np.int32)
    batches = [
        dict(
            boxes=jnp.asarray(np.tile(np.float32(BOX), (2, 2, 1))),
            label=jnp.asarray(label),
            difficult=jnp.zeros((2, 2), bool),
            weight=jnp.asarray(weight, jnp.float32),
        )
        for label, weight in zip(labels, ([1, 1], [1, 0]), strict=True)
    ]
    monkeypatch.setattr(detection_evaluation, "put_resident", lambda run, split: None)
    monkeypatch.setattr(detection_evaluation, "eval_batches", lambda run, split: iter(batches))

    def step(net, batch, resident):
        """The first object of each image, but a dog for every cat."""
        label = jnp.where(batch["label"][:, :1] == 0, 1, batch["label"][:, :1])
        found = Detections(batch["boxes"][:, :1], jnp.full((2, 1), 0.9), label)
        return found, batch, jnp.zeros((2, 8, 16, 3), jnp.uint8)

    evaluator = detection_evaluation.Evaluator(run, "test", step)
    scores = evaluator(types.SimpleNamespace(net=None))
    # No cat is found. Three dogs are, of which there are two: wrong, right, right by falling score.
    assert scores["test/ap50_cat"] == 0.0
    assert scores["test/ap50_dog"] == pytest.approx(2 / 3)
    assert scores["test/ap50"] == pytest.approx(1 / 3)
    ((name, picture),) = evaluator.pictures().items()
    assert name == "test_boxes" and picture.shape == (160, 640, 3)  # two, of twice the width
    assert picture.any(axis=(0, 2))[:320].any() and picture.any(axis=(0, 2))[320:].any()
