"""Boxes of detectors: overlap, priors, coding, matching, hard negatives, suppression.

A box is `[ymin, xmin, ymax, xmax]` in shares of the image, `(..., 4)`; a prior, being a box that a
detector starts from, `[cy, cx, height, width]`. All shapes are static, and all functions but
`priors` are for use inside jit. From SSD, Liu et al. 2016, arXiv 1512.02325.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

VARIANCES = (0.1, 0.2)  # of the centre and of the logarithm of the size, as offsets are coded


@dataclasses.dataclass(frozen=True)
class Priors:
    """What priors there are at each pixel of each map; hashable.

    Attributes:
      scales: One a map, in shares of the image's side, and one more behind the last.
      ratios: Of each map, the aspect ratios above 1: each stands for itself and its inverse.
    """

    scales: tuple[float, ...]
    ratios: tuple[tuple[float, ...], ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Priors a pixel, of each map."""
        return tuple(2 + 2 * len(ratios) for ratios in self.ratios)

    @classmethod
    def of_ssd(cls, maps: int, scales: Sequence[float] = ()) -> "Priors":
        """SSD300's for six maps, and likewise for any number.

        Scales are 0.1, then from 0.2 to 0.9 in equal steps, and 1 behind the last one. Ratios are 2
        and 3, of the first and the last two maps only 2.

        Args:
          maps: Number of maps, at least 2.
          scales: In place of these scales of the maps, one each.
        """
        scales = scales or (0.1, *np.linspace(0.2, 0.9, maps - 1).tolist())
        few = {0, maps - 2, maps - 1} if maps > 3 else {0, maps - 1}
        ratios = tuple((2.0,) if i in few else (2.0, 3.0) for i in range(maps))
        return cls((*map(float, scales), 1.0), ratios)

    def boxes(self, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
        """All priors, map by map, row by row: float32 `(P, 4)`, centre form.

        At each pixel's centre a square of the map's scale s_k, one of sqrt(s_k s_k+1), and for each
        ratio r boxes of height s / sqrt(r), width s sqrt(r), and the other way around; sides are at
        most 1.

        Args:
          shapes: `(height, width)` of each map.
        """
        found = []
        for (height, width), scale, following, ratios in zip(
            shapes, self.scales[:-1], self.scales[1:], self.ratios, strict=True
        ):
            sizes = [(scale, scale), (math.sqrt(scale * following),) * 2]
            for ratio in ratios:
                short, long = scale / math.sqrt(ratio), scale * math.sqrt(ratio)
                sizes += [(short, long), (long, short)]
            y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
            centres = np.stack(np.meshgrid(y, x, indexing="ij"), -1)[:, :, None]
            centres = np.broadcast_to(centres, (height, width, len(sizes), 2))
            sizes = np.broadcast_to(np.minimum(sizes, 1.0), centres.shape)
            found.append(np.concatenate([centres, sizes], -1).reshape(-1, 4))
        return np.concatenate(found).astype(np.float32)


def to_corners(boxes: Array) -> Array:
    """`[cy, cx, h, w]` to `[ymin, xmin, ymax, xmax]`."""
    centres, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centres - half, centres + half], -1)


def to_centres(boxes: Array) -> Array:
    """`[ymin, xmin, ymax, xmax]` to `[cy, cx, h, w]`."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], -1)


def area(boxes: Array) -> Array:
    """`(..., 4)` to `(...)`; 0 where a box is inside out."""
    return jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0), -1)


def intersection(a: Array, b: Array) -> Array:
    """Areas that boxes share: `(A, 4)`, `(B, 4)` to `(A, B)`."""
    a, b = a[:, None], b[None]
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    return jnp.prod(jnp.maximum(high - low, 0), -1)


def iou(a: Array, b: Array) -> Array:
    """Intersection over union: `(A, 4)`, `(B, 4)` to `(A, B)`; 0 where both boxes are empty."""
    shared = intersection(a, b)
    union = area(a)[:, None] + area(b)[None] - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def encode(boxes: Array, priors: Array) -> Array:
    """Offsets of boxes to priors: `((c - c_p) / s_p / 0.1, log(s / s_p) / 0.2)`.

    Args:
      boxes: Corners, `(P, 4)`; sides of less than 1e-6 count as that.
      priors: Centre form, `(P, 4)`.
    """
    boxes, (centre, size) = to_centres(boxes), VARIANCES
    sides = jnp.maximum(boxes[..., 2:], 1e-6)
    return jnp.concatenate(
        [
            (boxes[..., :2] - priors[..., :2]) / priors[..., 2:] / centre,
            jnp.log(sides / priors[..., 2:]) / size,
        ],
        -1,
    )


def decode(offsets: Array, priors: Array) -> Array:
    """Undoes `encode`: corners, `(P, 4)`, not cut off at the image's edge.

    A logarithm above log(1000) counts as that, so that no offset overflows.
    """
    centre, size = VARIANCES
    sides = jnp.exp(jnp.minimum(offsets[..., 2:] * size, math.log(1000.0))) * priors[..., 2:]
    middle = priors[..., :2] + offsets[..., :2] * centre * priors[..., 2:]
    return to_corners(jnp.concatenate([middle, sides], -1))


def match(overlap: Array, valid: Array, threshold: float = 0.5) -> Array:
    """The object that each prior is for, or -1 for background: int32 `(P,)`.

    It is the one it overlaps most, if by `threshold` or more; and an object has the prior that
    overlaps it most, whatever the overlap, unless that is the best one of a later object too.

    Args:
      overlap: IoU of objects and priors, `(M, P)`.
      valid: Which of the objects are there, bool `(M,)`.
    """
    overlap = jnp.where(valid[:, None], overlap, -1)
    best = jnp.argmax(overlap, 0).astype(jnp.int32)
    matched = jnp.where(jnp.max(overlap, 0) >= threshold, best, -1)
    objects, priors = overlap.shape
    # Objects that are not there choose a prior behind the last one, which is dropped.
    own = jnp.where(valid, jnp.argmax(overlap, 1).astype(jnp.int32), priors)
    numbers = jnp.arange(objects, dtype=jnp.int32)
    forced = jnp.full((priors,), -1, jnp.int32).at[own].max(numbers, mode="drop")
    return jnp.where(forced >= 0, forced, matched)


def hard_negatives(loss: Array, positive: Array, ratio: float = 3.0) -> Array:
    """The negatives of greatest loss, `ratio` for each positive: bool `(P,)`.

    By rank, so that shapes are static: two sorts. Of equal losses the earlier prior is first.

    Args:
      loss: Of each prior as background, `(P,)`.
      positive: bool `(P,)`.
    """
    wanted = ratio * jnp.sum(positive.astype(loss.dtype))
    order = jnp.argsort(jnp.where(positive, jnp.inf, -loss), stable=True)
    rank = jnp.argsort(order, stable=True).astype(loss.dtype)
    return (rank < wanted) & ~positive


def smooth_l1(x: Array) -> Array:
    """`x^2 / 2` where |x| < 1, else `|x| - 1/2` (Girshick 2015, arXiv 1504.08083, equation 3)."""
    size = jnp.abs(x)
    return jnp.where(size < 1, x * x / 2, size - 0.5)


def suppress(boxes: Array, scores: Array, threshold: float = 0.45) -> Array:
    """Greedy non-maximum suppression: which boxes stay, bool `(K,)`.

    A box stays if its score is above 0 and no box that stays and has a greater score overlaps it by
    more than `threshold`.

    Args:
      boxes: Corners, `(K, 4)`, by falling score.
      scores: `(K,)`; 0 for none.
    """
    numbers = jnp.arange(len(boxes))

    def step(i, stays):
        overlap = iou(boxes[i][None], boxes)[0]
        return stays & ~(stays[i] & (overlap > threshold) & (numbers > i))

    # No further than the last box that has a score: mostly few have.
    return lax.fori_loop(0, jnp.sum((scores > 0).astype(jnp.int32)), step, scores > 0)


def detect(
    boxes: Array,
    probabilities: Array,
    *,
    score: float = 0.01,
    overlap: float = 0.45,
    candidates: int = 400,
    most: int = 200,
) -> tuple[Array, Array, Array]:
    """Detections of one image, by falling score.

    Args:
      boxes: Corners, `(P, 4)`, of all classes.
      probabilities: `(P, C)`, the background left out.
      score: Those below are no detections.
      overlap: Above it, of two boxes of a class the weaker goes.
      candidates: Of each class, boxes that suppression sees.
      most: Detections, of all classes.

    Returns:
      `(boxes (most, 4), scores (most,), classes int32 (most,))`; -1 is the class where there is
      none, and the score 0. Boxes are cut off at the image's edge.
    """
    count, classes = probabilities.shape

    def of_class(scores):
        top, where = lax.top_k(jnp.where(scores >= score, scores, 0), min(candidates, count))
        found = jnp.clip(boxes[where], 0, 1)
        return found, jnp.where(suppress(found, top, overlap), top, 0)

    found, scores = jax.vmap(of_class, in_axes=1)(probabilities)
    kept = scores.shape[1]
    scores, where = lax.top_k(scores.reshape(-1), min(most, scores.size))
    labels = jnp.where(scores > 0, where.astype(jnp.int32) // kept, -1)
    found = found.reshape(-1, 4)[where]
    missing = most - len(scores)
    return (
        jnp.pad(found, ((0, missing), (0, 0))),
        jnp.pad(scores, (0, missing)),
        jnp.pad(labels, (0, missing), constant_values=-1),
    )
