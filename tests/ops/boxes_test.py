"""Boxes against scalar references in Python's floats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.ops import boxes as box_ops
from efficient_nets.ops.boxes import Priors

# Eagerly each operation is a program of its own to compile.
iou, encode, decode, match, hard_negatives, suppress, smooth_l1 = map(
    jax.jit,
    (
        *(box_ops.iou, box_ops.encode, box_ops.decode, box_ops.match, box_ops.hard_negatives),
        *(box_ops.suppress, box_ops.smooth_l1),
    ),
)
F32 = 1e-5  # float32, of a dozen operations on values around 1


def random_boxes(seed, count):
    rng = np.random.default_rng(seed)
    centre, side = rng.uniform(0, 1, (count, 2)), rng.uniform(0.05, 0.6, (count, 2))
    return np.concatenate([centre - side / 2, centre + side / 2], -1).astype(np.float32)


def scalar_iou(a, b):
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(height, 0) * max(width, 0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


def test_iou():
    a, b = random_boxes(0, 6), random_boxes(1, 7)
    a[0] = 0.5  # an empty box
    b[0] = 0.5
    expected = [[scalar_iou(x, y) for y in b.tolist()] for x in a.tolist()]
    np.testing.assert_allclose(iou(a, b), expected, rtol=F32, atol=F32)


def test_offsets_are_those_of_the_paper_and_decode_undoes_them():
    boxes, priors = random_boxes(2, 5), np.abs(random_boxes(3, 5)) + np.float32(0.1)
    offsets = encode(boxes, priors)
    for (y0, x0, y1, x1), (cy, cx, h, w), found in zip(
        boxes.tolist(), priors.tolist(), offsets, strict=True
    ):
        expected = [
            ((y0 + y1) / 2 - cy) / h / 0.1,
            ((x0 + x1) / 2 - cx) / w / 0.1,
            math.log((y1 - y0) / h) / 0.2,
            math.log((x1 - x0) / w) / 0.2,
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # 10 / h times rounding
    np.testing.assert_allclose(decode(offsets, priors), boxes, rtol=F32, atol=F32)
    empty = encode(np.full((1, 4), 0.5, np.float32), priors[:1])
    huge = decode(np.full((1, 4), 1e9, np.float32), priors[:1])
    assert np.all(np.isfinite(empty)) and np.all(np.isfinite(huge))


def test_priors_of_ssd300():
    priors = Priors.of_ssd(6)
    np.testing.assert_allclose(priors.scales, [0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.0])
    assert priors.counts == (4, 6, 6, 6, 4, 4)
    boxes = priors.boxes([(side, side) for side in (38, 19, 10, 5, 3, 1)])
    assert boxes.shape == (8732, 4) and boxes.dtype == np.float32
    root2, between = math.sqrt(2), math.sqrt(0.02)
    first = [(0.1, 0.1), (between,) * 2, (0.1 / root2, 0.1 * root2), (0.1 * root2, 0.1 / root2)]
    np.testing.assert_allclose(boxes[:4, 2:], first, rtol=F32)
    np.testing.assert_allclose(boxes[:8, :2], [[0.5 / 38] * 2] * 4 + [[0.5 / 38, 1.5 / 38]] * 4)
    last = [(0.9, 0.9), (math.sqrt(0.9),) * 2, (0.9 / root2, 1.0), (1.0, 0.9 / root2)]
    np.testing.assert_allclose(boxes[-4:], [(0.5, 0.5, *size) for size in last], rtol=F32)


def test_match():
    overlap = jnp.array(
        [
            [0.6, 0.5, 0.0, 0.2],  # the first two are for it
            [0.0, 0.49, 0.0, 0.3],  # no prior is near: its best one is for it all the same
            [0.1, 0.0, 0.4, 0.3],
            [0.9, 0.9, 0.9, 0.9],  # is not there
            [0.55, 0.0, 0.0, 0.0],  # has the same best prior as the first, and comes later
        ]
    )
    valid = jnp.array([True, True, True, False, True])
    assert match(overlap, valid).tolist() == [4, 1, 2, -1]
    alone = jnp.array([True, False, False, False, False])
    assert match(overlap, alone).tolist() == [0, 0, -1, -1]
    assert match(overlap, jnp.zeros(5, bool)).tolist() == [-1] * 4


@pytest.mark.parametrize("positives", [0, 3, 9])
def test_hard_negatives_are_the_hardest(positives):
    rng = np.random.default_rng(positives)
    loss = np.round(rng.random(12), 1).astype(np.float32)  # with ties
    positive = np.zeros(12, bool)
    positive[rng.permutation(12)[:positives]] = True
    found = np.asarray(hard_negatives(jnp.asarray(loss), jnp.asarray(positive), 3.0))
    order = sorted(np.flatnonzero(~positive), key=lambda i: -loss[i])
    expected = np.zeros(12, bool)
    expected[order[: 3 * positives]] = True
    np.testing.assert_array_equal(found, expected)


def test_smooth_l1():
    x = jnp.array([-3.0, -0.5, 0.0, 1.0, 2.0])
    np.testing.assert_allclose(smooth_l1(x), [2.5, 0.125, 0.0, 0.5, 1.5])


def greedy(boxes, scores, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if scores[i] > 0 and all(scalar_iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def test_suppression_is_greedy():
    boxes = random_boxes(4, 40)
    scores = np.sort(np.random.default_rng(5).random(40).astype(np.float32))[::-1].copy()
    scores[30:] = 0
    stays = suppress(boxes, scores, 0.3)
    expected = greedy(boxes.tolist(), scores.tolist(), 0.3)
    assert np.flatnonzero(stays).tolist() == expected
    assert 3 < len(expected) < 25


def test_a_suppressed_box_suppresses_nothing():
    boxes = np.array([[0, x, 1, x + 0.4] for x in (0, 0.2, 0.4)], np.float32)  # IoUs 1/3, 0
    scores = np.array([0.9, 0.8, 0.7], np.float32)
    assert suppress(boxes, scores, 0.3).tolist() == [True, False, True]


def test_detections_of_an_image():
    boxes = random_boxes(6, 30)
    probabilities = np.random.default_rng(7).random((30, 2)).astype(np.float32)
    options = dict(score=0.2, overlap=0.4, candidates=20)
    many, few = jax.jit(lambda *x: [box_ops.detect(*x, **options, most=most) for most in (50, 3)])(
        boxes, probabilities
    )
    found, scores, label = many
    cut, expected = np.clip(boxes, 0, 1), []
    for kind in range(2):
        own = probabilities[:, kind].tolist()
        best = sorted(range(30), key=lambda i: -own[i])[:20]
        masked = [x if i in best and x >= 0.2 else 0 for i, x in enumerate(own)]
        kept = greedy(cut.tolist(), masked, 0.4)
        expected += [(own[i], kind, i) for i in kept]
    expected.sort(key=lambda x: -x[0])
    assert found.shape == (50, 4) and scores.shape == label.shape == (50,)
    count = len(expected)
    assert label.tolist() == [kind for _, kind, _ in expected] + [-1] * (50 - count)
    np.testing.assert_array_equal(scores[:count], [score for score, _, _ in expected])
    np.testing.assert_array_equal(found[:count], cut[[i for _, _, i in expected]])
    assert not np.any(scores[count:])
    np.testing.assert_array_equal(few[1], scores[:3])
