"""Average precision of detections: VOC's of 2007 and 2010, and COCO's. NumPy, on the host.

Boxes are `[ymin, xmin, ymax, xmax]` in any unit, such as shares of the image; VOC's own program
adds a pixel to each side, which this does not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_MOST = 100  # detections an image, of a class


class Found(NamedTuple):
    """What a detector says of one image, by falling score: `(K, 4)`, `(K,)`, int `(K,)`."""

    boxes: np.ndarray
    scores: np.ndarray
    label: np.ndarray


class Truth(NamedTuple):
    """The objects of one image: `(G, 4)`, int `(G,)`, bool `(G,)`; difficult ones count nowhere."""

    boxes: np.ndarray
    label: np.ndarray
    difficult: np.ndarray


class Hits(NamedTuple):
    """Of one class and all images, by falling score.

    Attributes:
      right: bool `(thresholds, D)`, which detections are right.
      ignored: bool `(thresholds, D)`, which ones count neither way.
      objects: Number of objects that are not difficult.
    """

    right: np.ndarray
    ignored: np.ndarray
    objects: int


def average_precisions(
    found: Sequence[Found], truth: Sequence[Truth], classes: int
) -> dict[str, np.ndarray]:
    """Each measure for each class, `(classes,)`; NaN where no image has an object of it.

    Args:
      found: Of each image.
      truth: Of each image, in the same order.
      classes: Their number.

    Returns:
      'ap': COCO's, the mean over IoU thresholds 0.5, 0.55, ... 0.95; 'ap50' and 'ap75' at one of
      them; 'ap50_voc07', of 11 recalls, and 'ap50_voc10', the area under the curve.
    """
    names = ("ap", "ap50", "ap75", "ap50_voc07", "ap50_voc10")
    scores = np.full((len(names), classes), np.nan)
    for label in range(classes):
        hits = coco_hits(found, truth, label)
        if hits.objects:
            of_threshold = [coco_ap(*curve(hits, t)) for t in range(len(COCO_THRESHOLDS))]
            voc = curve(voc_hits(found, truth, label), 0)
            scores[:, label] = (
                np.mean(of_threshold),
                of_threshold[0],
                of_threshold[5],
                voc07_ap(*voc),
                voc10_ap(*voc),
            )
    return dict(zip(names, scores, strict=True))


def curve(hits: Hits, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at the score of each detection that counts."""
    counts = ~hits.ignored[threshold]
    right = np.cumsum(hits.right[threshold][counts])
    return right / hits.objects, right / np.arange(1, len(right) + 1)


def voc07_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean over recalls 0, 0.1, ... 1 of the greatest precision at that recall or above it."""
    steps = [precision[recall >= level] for level in np.arange(11) / 10]
    return float(np.mean([values.max(initial=0) for values in steps]))


def voc10_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """The area under the curve of the greatest precision at each recall or above it."""
    recall = np.concatenate([[0], recall])
    return float(np.sum(np.diff(recall) * _envelope(precision)))


def coco_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean over 101 recalls of the greatest precision at that recall or above it."""
    at = np.searchsorted(recall, COCO_RECALLS, side="left")
    return float(np.mean(np.append(_envelope(precision), 0)[np.minimum(at, len(precision))]))


def _envelope(precision: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(precision[::-1])[::-1]


def voc_hits(
    found: Sequence[Found], truth: Sequence[Truth], label: int, threshold: float = 0.5
) -> Hits:
    """As the VOC challenge: a detection is for the object that it overlaps most.

    It is right if by `threshold` or more, and the first for that object; a later one is wrong, and
    one for a difficult object counts neither way.
    """

    def of_image(boxes, objects, difficult):
        right, ignored = (np.zeros((1, len(boxes)), bool) for _ in range(2))
        overlap, taken = iou(boxes, objects), set()
        for row, best in enumerate(overlap.argmax(1)):
            if overlap[row, best] < threshold:
                continue
            if difficult[best]:
                ignored[0, row] = True
            elif best not in taken:
                right[0, row] = True
                taken.add(best)
        return right, ignored

    return _hits(found, truth, label, of_image, 1)


def coco_hits(found: Sequence[Found], truth: Sequence[Truth], label: int) -> Hits:
    """As COCO's program, for all its thresholds: the best object that no detection has yet.

    The best 100 detections an image count. An object is matched before a difficult one, which is
    what COCO calls a crowd: the overlap is that share of the detection, it matches any number of
    detections, and these count neither way.
    """

    def of_image(boxes, objects, difficult):
        shape = len(COCO_THRESHOLDS), len(boxes)
        right, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
        overlap = np.where(difficult, _share(boxes, objects), iou(boxes, objects))
        free = np.ones((len(COCO_THRESHOLDS), len(objects)), bool)
        least, every = np.minimum(COCO_THRESHOLDS, 1 - 1e-10), np.arange(len(COCO_THRESHOLDS))
        for row, own in enumerate(overlap):
            for kind in (~difficult, difficult):
                open_ = free & kind & (own >= least[:, None]) & ~(right | ignored)[:, row, None]
                values = np.where(open_, own, -1)
                # Of equal overlaps COCO's program takes the last object.
                best = values.shape[1] - 1 - values[:, ::-1].argmax(1)
                hit = open_[every, best]
                (ignored if kind is difficult else right)[:, row] |= hit
                if kind is not difficult:
                    free[every[hit], best[hit]] = False
        return right, ignored

    return _hits(found, truth, label, of_image, len(COCO_THRESHOLDS), COCO_MOST)


def _hits(found, truth, label, of_image, thresholds, most=None) -> Hits:
    scores, right, ignored, objects = [np.zeros(0)], [], [], 0
    empty = np.zeros((thresholds, 0), bool)
    for own, there in zip(found, truth, strict=True):
        mine, asked = own.label == label, there.label == label
        boxes, difficult = own.boxes[mine][:most], there.difficult[asked]
        scores.append(own.scores[mine][:most])
        objects += int(np.sum(~difficult))
        if len(boxes) and len(difficult):
            hits = of_image(boxes, there.boxes[asked], difficult)
        else:
            hits = (np.zeros((thresholds, len(boxes)), bool),) * 2
        right.append(hits[0])
        ignored.append(hits[1])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Hits(*(np.concatenate([empty, *x], 1)[:, order] for x in (right, ignored)), objects)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union, `(A, 4)`, `(B, 4)` to `(A, B)`, in float64."""
    shared = _intersection(a, b)
    union = _area(a)[:, None] + _area(b) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The intersection's share of a."""
    shared, own = _intersection(a, b), _area(a)[:, None]
    return np.divide(shared, own, out=np.zeros_like(shared), where=own > 0)


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.prod(np.maximum(sides, 0), -1)


def _area(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, np.float64)
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), -1)
