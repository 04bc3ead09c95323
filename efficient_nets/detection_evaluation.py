"""Average precision of a train state over a whole split, and pictures of what it sees."""

import functools
import itertools

import jax
import numpy as np
from flax import nnx
from PIL import Image

from efficient_nets import data, drawing, sharding
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.feeding import eval_batches, put_resident
from efficient_nets.prediction import found_of
from efficient_nets.tasks import average_precision
from efficient_nets.tasks.average_precision import Truth

PICTURE = 320  # pixels of the longer side of an image that is drawn


class Evaluator:
    """Evaluates a detector on one split.

    Args:
      run: The experiment.
      split: Its name.
      step: `Evaluator.compiled(run)`, which several evaluators may share.
    """

    def __init__(self, run: Experiment, split: str, step=None):
        self.split, self._run = split, run
        self._resident = put_resident(run, split)
        self._step = step or self.compiled(run)
        self._pictures: list[Image.Image] = []

    @staticmethod
    def compiled(run: Experiment):
        """What detects in one batch: one program for batches of all splits."""
        return jax.jit(functools.partial(_step, run))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`{'<split>/ap50': x, ...}`: means over the classes, and ap50 of each class.

        Measures are those of `average_precisions`; classes that no image has are left out.
        """
        info, drawn = self._run.dataset.info, self._run.config.detection.drawn
        found, truth, self._pictures = [], [], []
        for batch in eval_batches(self._run, self.split):
            *arrays, images = self._step(state.net, batch, self._resident)
            detections, there = sharding.fetch(arrays)
            first = len(found)
            found += [
                own for own, x in zip(found_of(detections), there["weight"], strict=True) if x
            ]
            truth += truth_of(there)
            if len(self._pictures) < drawn:
                new = zip(sharding.fetch(images), found[first:], truth[first:], strict=False)
                new = itertools.islice(new, drawn - len(self._pictures))
                self._pictures += [self._drawn(*own) for own in new]
        scores = average_precision.average_precisions(found, truth, info.num_classes)
        means = {name: _mean(values) for name, values in scores.items()}
        names = info.class_names or map(str, range(info.num_classes))
        classes = dict(zip(names, scores["ap50"], strict=True))
        of_class = {f"ap50_{name}": float(x) for name, x in classes.items() if np.isfinite(x)}
        return {f"{self.split}/{name}": x for name, x in (means | of_class).items()}

    def pictures(self) -> dict[str, np.ndarray]:
        """Of the last call, `{name: uint8 (H, W, 3)}`: objects in white, detections in colours."""
        return {f"{self.split}_boxes": drawing.grid(self._pictures)} if self._pictures else {}

    def _drawn(self, image: np.ndarray, own, truth) -> Image.Image:
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        scale = PICTURE / max(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size])
        run = self._run
        return drawing.draw(
            picture,
            own,
            run.dataset.info.class_names,
            least=run.config.detection.drawn_score,
            truth=truth,
        )


def truth_of(batch: dict[str, np.ndarray]) -> list[Truth]:
    """The objects of a batch, image by image, without padding of either kind."""
    arrays = (batch[name] for name in ("boxes", "label", "difficult", "weight"))
    return [
        Truth(boxes[label >= 0], label[label >= 0], difficult[label >= 0])
        for boxes, label, difficult, weight in zip(*arrays, strict=True)
        if weight
    ]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def _step(run: Experiment, net, batch, resident):
    batch = data.gather(resident, batch)
    images = batch.pop("image")
    model = nnx.merge(run.graph, net["params"], net["stats"])
    model.eval()
    found = run.task.detect(model(data.normalise(images, run.dataset.info)))
    return found, batch, images
