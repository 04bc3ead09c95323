"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8, without a download."""

import dataclasses

import numpy as np
from PIL import Image

from efficient_nets.data.collection import Collection
from efficient_nets.data.splits import split_info, take

TRAIN, TEST = 1437, 360


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayExamples:
    """Images (N, H, W) of uint8 and labels (N,) of int."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, positions):
        return [(Image.fromarray(self.images[i]), int(self.labels[i])) for i in positions]


def collection() -> Collection:
    """The digits, grey levels scaled from 0..16 to 0..255, split at random but always alike."""
    from sklearn.datasets import load_digits  # here, as scikit-learn takes seconds to import

    digits = load_digits()
    # RandomState, as NumPy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(TRAIN + TEST)
    images = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    labels = digits.target[order]
    image_of = {"train": images[:TRAIN], "test": images[TRAIN:]}
    label_of = {"train": labels[:TRAIN], "test": labels[TRAIN:]}
    return Collection(
        name="digits",
        num_classes=10,
        class_names=tuple(str(name) for name in digits.target_names),
        image_shape=(8, 8, 1),
        splits={name: split_info(name, len(values)) for name, values in label_of.items()},
        open=lambda parts: ArrayExamples(take(image_of, parts), take(label_of, parts)),
    )
