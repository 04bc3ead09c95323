"""What every kind of data set offers before a split of it is chosen, and before it is decoded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import tensorflow_datasets as tfds
from PIL import Image

from efficient_nets.data.splits import Part


class Examples(Protocol):
    """Encoded examples at random access. Can be pickled and read from several threads."""

    def __len__(self) -> int: ...

    def read(self, positions: Sequence[int]) -> list[tuple[Image.Image, int]]:
        """Decodes the images at these positions; each with its label."""


@dataclasses.dataclass(frozen=True)
class Collection:
    """A data set of labelled images.

    Attributes:
      name: without version or path, to find its statistics by.
      num_classes: labels are 0 .. num_classes - 1.
      class_names: by label; may be empty.
      image_shape: (H, W, C); H and W are None where sizes vary.
      splits: by name.
      open: gives the examples of some parts of the splits.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]
    splits: Mapping[str, tfds.core.SplitInfo]
    open: Callable[[Sequence[Part]], Examples]
