"""Average precision against values worked out by hand, and against COCO's own program."""

import numpy as np
import pytest
from pycocotools import coco, cocoeval

from efficient_nets.tasks import average_precision as ap
from efficient_nets.tasks.average_precision import Found, Truth

# Three objects of one class in two images, the last one difficult, and detections in order of their
# scores: right, wrong (a second one of the first object), on the difficult one, right, wrong.
OBJECTS = [[[0, 0, 10, 10], [20, 20, 30, 30]], [[0, 0, 10, 10]]]
DETECTIONS = [
    [([0, 0, 10, 9], 0.9), ([0, 0, 10, 8], 0.8), ([20, 20, 30, 28], 0.6)],
    [([0, 0, 10, 10], 0.7), ([50, 50, 60, 60], 0.5)],
]
# At IoU 0.5: right at ranks 1 and 3 of the four that count, 2 objects: recall 0.5 at precision 1,
# recall 1 at precision 2/3. At 0.75 alike, as the IoUs are 0.9 and 0.8; at 0.85 and 0.9 the second
# object is missed, beyond that both are.
HALF = (51 * 1 + 50 * 2 / 3) / 101
BY_HAND = {
    "ap50": HALF,
    "ap75": HALF,
    "ap": (7 * HALF + 2 * 51 / 101) / 10,
    "ap50_voc07": (6 * 1 + 5 * 2 / 3) / 11,
    "ap50_voc10": 0.5 * 1 + 0.5 * 2 / 3,
}


def by_hand():
    found = [
        Found(
            np.array([box for box, _ in own], float),
            np.array([score for _, score in own]),
            np.zeros(len(own), int),
        )
        for own in DETECTIONS
    ]
    truth = [
        Truth(np.array(own, float), np.zeros(len(own), int), np.full(len(own), i == 1))
        for i, own in enumerate(OBJECTS)
    ]
    return found, truth


def test_what_is_worked_out_by_hand():
    scores = ap.average_precisions(*by_hand(), classes=2)
    for name, expected in BY_HAND.items():
        assert scores[name][0] == pytest.approx(expected, abs=1e-12), name
        assert np.isnan(scores[name][1])  # no image has an object of that class


def test_without_detections():
    _, truth = by_hand()
    none = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    scores = ap.average_precisions([none, none], truth, classes=1)
    assert all(values.tolist() == [0.0] for values in scores.values())


def test_a_detection_of_voc_is_for_the_object_it_overlaps_most():
    """Where COCO gives it another one that is free."""
    objects = np.array([[0, 0, 10, 10], [0, 2, 10, 12.0]])
    truth = [Truth(objects, np.zeros(2, int), np.zeros(2, bool))]
    boxes = np.array([[0, 0, 10, 10], [0, 0.5, 10, 10.5]])
    found = [Found(boxes, np.array([0.9, 0.8]), np.zeros(2, int))]
    assert ap.voc_hits(found, truth, 0).right.tolist() == [[True, False]]
    assert ap.coco_hits(found, truth, 0).right[0].tolist() == [True, True]


def random_boxes(rng, count):
    centre, side = rng.uniform(0, 1, (count, 2)), rng.uniform(0.02, 0.5, (count, 2))
    return np.concatenate([centre - side / 2, centre + side / 2], -1)


def random_set(seed, images=12, classes=3, *, ties):
    """Objects, some difficult, and detections of which most are near one."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        objects = rng.integers(0, 10)
        boxes, label = random_boxes(rng, objects), rng.integers(0, classes, objects)
        count = rng.integers(0, 24) if objects else 3
        source = rng.integers(0, max(objects, 1), count)
        near = boxes[source] + rng.normal(0, 0.03, (count, 4)) if objects else 0
        near = np.where(rng.random((count, 1)) < 0.7, near, random_boxes(rng, count))
        low, high = np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:])
        own = rng.integers(0, classes, count)
        own = np.where(rng.random(count) < 0.8, label[source], own) if objects else own
        scores = np.sort(np.round(rng.random(count), 1 if ties else 9))[::-1]
        found.append(Found(np.concatenate([low, high], -1), scores, own))
        truth.append(Truth(boxes, label, rng.random(objects) < 0.2))
    return found, truth


def coco_precisions(found, truth, classes):
    """`(thresholds, recalls, classes)` of pycocotools, whose boxes are `[x, y, width, height]`."""

    def as_coco(box):
        return [box[1], box[0], box[3] - box[1], box[2] - box[0]]

    objects, detections = [], []
    for image, (own, there) in enumerate(zip(found, truth, strict=True), start=1):
        for box, label, difficult in zip(*there, strict=True):
            box, number = as_coco(box), len(objects) + 1
            objects.append(dict(id=number, image_id=image, bbox=box, area=box[2] * box[3]))
            objects[-1] |= dict(category_id=int(label), iscrowd=int(difficult))
        for box, score, label in zip(*own, strict=True):
            detections.append(dict(image_id=image, category_id=int(label), bbox=as_coco(box)))
            detections[-1]["score"] = float(score)
    dataset = coco.COCO()
    dataset.dataset = dict(
        images=[dict(id=image) for image in range(1, len(found) + 1)],
        annotations=objects,
        categories=[dict(id=label) for label in range(classes)],
    )
    dataset.createIndex()
    evaluation = cocoeval.COCOeval(dataset, dataset.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 2]


def test_a_recall_of_three_tenths_is_one_of_voc_s():
    """Ten objects, three of them found, all right: precision 1 at recalls 0, 0.1, 0.2 and 0.3."""
    recall = np.arange(1, 4) / 10
    assert ap.voc07_ap(recall, np.ones(3)) == pytest.approx(4 / 11)


@pytest.mark.every_case
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_coco_s_program_says_the_same(seed, ties):
    found, truth = random_set(seed, ties=ties)
    precisions = coco_precisions(found, truth, 3).mean(1)
    scores = ap.average_precisions(found, truth, 3)
    for name, expected in (
        ("ap", precisions.mean(0)),
        ("ap50", precisions[0]),
        ("ap75", precisions[5]),
    ):
        np.testing.assert_allclose(scores[name], expected, rtol=0, atol=1e-12)
