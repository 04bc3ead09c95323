"""SSD's loss against loops in Python's floats, and detections of made-up outputs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets import config as configs
from efficient_nets import data, tasks
from efficient_nets.errors import UserError
from efficient_nets.models.ssd import Boxes
from efficient_nets.tasks.detection import Detection
from tests.ops.boxes_test import random_boxes, scalar_iou

CLASSES, PRIORS = 3, 20


def corners(prior):
    cy, cx, h, w = prior
    return [cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2]


def made_up():
    """Two images' outputs and targets; the second image has one object, the first three."""
    rng = np.random.default_rng(0)
    low_high = random_boxes(1, PRIORS)
    priors = np.concatenate(
        [(low_high[:, :2] + low_high[:, 2:]) / 2, low_high[:, 2:] - low_high[:, :2]], -1
    )
    boxes = np.zeros((2, 4, 4), np.float32)
    boxes[0, :3], boxes[1, 0] = random_boxes(2, 3), low_high[5]
    label = np.array([[0, 2, 1, -1], [1, -1, -1, -1]], np.int32)
    logits = rng.normal(size=(2, PRIORS, CLASSES + 1)).astype(np.float32)
    offsets = rng.normal(size=(2, PRIORS, 4)).astype(np.float32)
    return Boxes(logits, offsets, priors), (boxes, label)


def scalar_loss(outputs, boxes, label, *, threshold, negatives, weight):
    """Sums over one image: of the classes' loss, of the boxes', and the positives."""
    logits, offsets, priors = (np.asarray(x, np.float64).tolist() for x in outputs)
    objects = [i for i, own in enumerate(label) if own >= 0]
    overlap = {i: [scalar_iou(boxes[i], corners(p)) for p in priors] for i in objects}
    matched = {}
    for p in range(len(priors)):
        best = max(objects, key=lambda i: overlap[i][p])
        if overlap[best][p] >= threshold:
            matched[p] = best
    for i in objects:
        matched[max(range(len(priors)), key=lambda p: overlap[i][p])] = i

    def cross_entropy(p, kind):
        return math.log(sum(map(math.exp, logits[p]))) - logits[p][kind]

    class_loss = sum(cross_entropy(p, label[i] + 1) for p, i in matched.items())
    rest = sorted(cross_entropy(p, 0) for p in range(len(priors)) if p not in matched)
    class_loss += sum(rest[::-1][: round(negatives * len(matched))])
    box_loss = 0.0
    for p, i in matched.items():
        (y0, x0, y1, x1), (cy, cx, h, w) = boxes[i], priors[p]
        goal = [((y0 + y1) / 2 - cy) / h / 0.1, ((x0 + x1) / 2 - cx) / w / 0.1]
        goal += [math.log((y1 - y0) / h) / 0.2, math.log((x1 - x0) / w) / 0.2]
        for found, wanted in zip(offsets[p], goal, strict=True):
            error = abs(found - wanted)
            box_loss += error**2 / 2 if error < 1 else error - 0.5
    return class_loss, box_loss, len(matched)


def test_the_loss_is_that_of_the_paper():
    outputs, (boxes, label) = made_up()
    task = Detection(match_iou=0.3, negatives=2.0, box_weight=0.7)
    sums = np.sum(
        [
            scalar_loss(
                (outputs.logits[n], outputs.offsets[n], outputs.priors),
                boxes[n].tolist(),
                label[n].tolist(),
                threshold=0.3,
                negatives=2.0,
                weight=0.7,
            )
            for n in range(2)
        ],
        axis=0,
    )
    classes, of_boxes, positives = sums

    def loss(logits, offsets):
        return task.loss(outputs._replace(logits=logits, offsets=offsets), (boxes, label))

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        outputs.logits, outputs.offsets
    )
    tolerance = 1e-5  # float32, sums of about a hundred numbers
    np.testing.assert_allclose(metrics["class_loss"], classes / positives, rtol=tolerance)
    np.testing.assert_allclose(metrics["box_loss"], of_boxes / positives, rtol=tolerance)
    np.testing.assert_allclose(value, (classes + 0.7 * of_boxes) / positives, rtol=tolerance)
    assert metrics["positives"] == positives / 2
    of_logits = np.abs(gradient[0]).sum(-1) > 0
    assert of_logits.sum() == 3 * positives  # two negatives for each
    assert (np.abs(gradient[1]).sum(-1) > 0).sum() == positives


def test_an_image_without_objects_has_no_loss_but_a_number():
    outputs, (boxes, label) = made_up()
    loss, metrics = jax.jit(Detection().loss)(outputs, (boxes, np.full_like(label, -1)))
    assert loss == 0 and metrics["positives"] == 0.5  # counted as one of two images


def test_detections_of_sure_outputs():
    outputs, _ = made_up()
    logits = np.zeros((2, PRIORS, CLASSES + 1), np.float32)
    logits[..., 0] = 20  # background
    logits[0, 7] = [0, 0, 30, 0]
    sure = Boxes(logits, np.zeros((2, PRIORS, 4), np.float32), outputs.priors)
    found = jax.jit(Detection(most=5).detect)(sure)
    assert found.label.tolist() == [[1, -1, -1, -1, -1], [-1] * 5]
    expected = np.clip(corners(outputs.priors[7].tolist()), 0, 1)
    np.testing.assert_allclose(found.boxes[0, 0], expected, atol=1e-6)


def detection_config(**fields):
    config = configs.defaults()
    config.task, config.model = "detection", configs.model("ssd")
    config.update_from_flattened_dict(fields)
    configs.check(config)
    return config


def test_the_config_s_fields_reach_the_task():
    config = detection_config(
        **{"detection.expand": 1.5, "detection.most": 7, "data.flip": True, "detection.crop": False}
    )
    task = tasks.create(config)
    assert task.most == 7 and hash(task) == hash(tasks.create(config))
    spec = task.augmentation
    assert (spec.photometric, spec.expand, spec.crop, spec.flip) == (True, 1.5, False, True)
    batch = dict(
        image=jnp.zeros((2, 8, 8, 3), jnp.uint8),
        boxes=jnp.full((2, 1, 4), 0.5).at[..., 2:].set(1),
        label=jnp.zeros((2, 1), jnp.int32),
        difficult=jnp.array([[True], [False]]),
    )
    info = data.Info("x", 1, (8, 8, 3), (0.5,) * 3, (0.5,) * 3)
    task = Detection(data.DetectionAugmentation(False, 1.0, False, False), difficult=False)
    inputs = jax.jit(lambda k, b: task.inputs(k, b, config_data=config.data, info=info))
    images, (_, label) = inputs(jax.random.key(0), batch)
    assert images.shape == (2, 8, 8, 3) and label.tolist() == [[-1], [0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"detection.nms_iou": 1.0}, r"detection\.nms_iou=1\.0: must be above 0 and below 1"),
        ({"detection.most": 0}, r"detection\.most=0: must be at least 1"),
        ({"detection.expand": 0.5}, r"detection\.expand=0\.5: must be at least 1"),
        ({"data.mixup": 0.2}, r"data\.mixup=0\.2: only task=classification heeds it"),
        ({"data.crop": 4}, r"data\.crop=4: .*detection\.crop crops"),
        ({"teacher.checkpoint": "x"}, r"teacher\.checkpoint='x': only task=classification"),
    ],
)
def test_bad_input_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        tasks.create(detection_config(**fields))


def test_fields_of_detection_are_for_no_other_task():
    config = configs.defaults()
    config.detection.score = 0.5
    with pytest.raises(UserError, match=r"detection\.score=0\.5: only task=detection heeds it"):
        configs.check(config)
    config = configs.defaults()
    config.model = configs.model("ssd")
    with pytest.raises(UserError, match=r"model\.name='ssd': it is for task='detection'"):
        configs.check(config)
