"""Object detection: SSD's loss (Liu et al. 2016, arXiv 1512.02325, section 2.2), detections."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from efficient_nets import data
from efficient_nets.errors import UserError
from efficient_nets.ops import boxes as box_ops


class Detections(NamedTuple):
    """Of N images, at most K each, by falling score.

    Attributes:
      boxes: float32 `(N, K, 4)`, `[ymin, xmin, ymax, xmax]` in shares of the image.
      scores: float32 `(N, K)`.
      label: int32 `(N, K)`; -1 where there is none.
    """

    boxes: Array
    scores: Array
    label: Array


def defaults() -> dict[str, Any]:
    """The fields of `config.detection`."""
    return dict(
        photometric=True,  # changes brightness, contrast, saturation and hue
        expand=4.0,  # training images shrink onto a canvas of up to that many sides; 1: none
        crop=True,  # to parts that an object lies in
        difficult=True,  # objects marked as difficult are trained on
        match_iou=0.5,  # of a prior and the object that it is for, at least
        negatives=3.0,  # priors without an object for each one with one, those of greatest loss
        box_weight=1.0,  # of the boxes' loss beside the classes'
        score=0.01,  # detections below it are none
        nms_iou=0.45,  # of two detections of a class that overlap by more the weaker goes
        candidates=400,  # of each class before that
        most=200,  # detections an image
        drawn=16,  # images of the first split that are evaluated, drawn with their detections
        drawn_score=0.4,  # detections below it are not drawn
    )


@dataclasses.dataclass(frozen=True)
class Detection:
    """The task; attributes are the fields of `config.detection` and `data.flip`."""

    name: ClassVar[str] = "detection"
    best_metric: ClassVar[str] = "ap50"
    best_mode: ClassVar[str] = "max"
    updates: ClassVar[Mapping[str, int]] = {}
    fields: ClassVar[tuple[str, ...]] = ("detection", "data.stored_size", "data.max_boxes")
    modes: ClassVar[tuple[str, ...]] = ("predict",)

    augmentation: data.DetectionAugmentation = data.DetectionAugmentation()
    difficult: bool = True
    match_iou: float = 0.5
    negatives: float = 3.0
    box_weight: float = 1.0
    score: float = 0.01
    nms_iou: float = 0.45
    candidates: int = 400
    most: int = 200

    def __post_init__(self):
        for field in ("match_iou", "nms_iou", "score"):
            if not 0 < getattr(self, field) < 1:
                raise UserError(
                    f"detection.{field}={getattr(self, field)}: must be above 0 and below 1"
                )
        for field in ("candidates", "most"):
            if getattr(self, field) < 1:
                raise UserError(f"detection.{field}={getattr(self, field)}: must be at least 1")

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Detection":
        given = config.detection
        if config.data.crop:
            raise UserError(
                f"data.crop={config.data.crop}: it would leave the boxes where they are; "
                "detection.crop crops images of objects"
            )
        own = {field.name for field in dataclasses.fields(cls)} - {"augmentation"}
        parts = (given.photometric, given.expand, given.crop, config.data.flip)
        return cls(data.DetectionAugmentation(*parts), **{name: given[name] for name in own})

    def inputs(
        self, key: Array, batch: dict[str, Array], *, config_data: ConfigDict, info: data.Info
    ) -> tuple[Array, tuple[Array, Array]]:
        """Augmented images `(N, H, W, C)`, and boxes `(N, M, 4)` with their labels `(N, M)`."""
        label = batch["label"]
        if not self.difficult:
            label = jnp.where(batch["difficult"], -1, label)
        images, boxes, label = data.augment_detection(
            key, batch["image"], batch["boxes"], label, spec=self.augmentation, info=info
        )
        return images, (boxes, label)

    def loss(self, outputs: Any, targets: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
        """`(sum of cross-entropies + box_weight * sum of smooth L1) / positives`, and its parts.

        Cross-entropy over priors with an object and, image by image, the hardest without; smooth L1
        over the offsets of the former. Positives are counted over the batch, and at least 1.

        Args:
          outputs: `logits (N, P, classes + 1)`, `offsets (N, P, 4)` and `priors (P, 4)`.
          targets: Boxes `(N, M, 4)` and labels `(N, M)`, -1 where there is none.
        """
        boxes, label = targets
        classes, goals = jax.vmap(self._goals, in_axes=(0, 0, None))(boxes, label, outputs.priors)
        positive = classes > 0
        log_p = jax.nn.log_softmax(outputs.logits)
        own = jnp.take_along_axis(log_p, classes[..., None], -1, mode="clip")[..., 0]
        negative = jax.vmap(lambda loss, mask: box_ops.hard_negatives(loss, mask, self.negatives))(
            jax.lax.stop_gradient(-log_p[..., 0]), positive
        )
        count = jnp.maximum(jnp.sum(positive.astype(jnp.float32)), 1)
        class_loss = jnp.sum(jnp.where(positive | negative, -own, 0)) / count
        errors = jnp.sum(box_ops.smooth_l1(outputs.offsets - goals), -1)
        box_loss = jnp.sum(jnp.where(positive, errors, 0)) / count
        loss = class_loss + self.box_weight * box_loss
        return loss, {
            "loss": loss,
            "class_loss": class_loss,
            "box_loss": box_loss,
            "positives": count / len(boxes),
        }

    def _goals(self, boxes: Array, label: Array, priors: Array) -> tuple[Array, Array]:
        """Class of each prior, 0 for background, `(P,)`, and the offsets of its object `(P, 4)`."""
        valid = label >= 0
        matched = box_ops.match(
            box_ops.iou(boxes, box_ops.to_corners(priors)), valid, self.match_iou
        )
        of = jnp.maximum(matched, 0)
        classes = jnp.where(matched >= 0, label[of] + 1, 0)
        return classes, box_ops.encode(boxes[of], priors)

    def detect(self, outputs: Any) -> Detections:
        """What a net sees on each image, `detection.most` at most."""

        def of_image(logits, offsets):
            boxes = box_ops.decode(offsets, outputs.priors)
            return box_ops.detect(
                boxes,
                jax.nn.softmax(logits)[:, 1:],
                score=self.score,
                overlap=self.nms_iou,
                candidates=self.candidates,
                most=self.most,
            )

        return Detections(*jax.vmap(of_image)(outputs.logits, outputs.offsets))
