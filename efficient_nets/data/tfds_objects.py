"""Any detection set of TensorFlow Datasets, read at random and without TensorFlow."""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from efficient_nets.data import images, tfds_sets
from efficient_nets.data.collection import Collection
from efficient_nets.data.splits import Part
from efficient_nets.errors import UserError

# Where sets have their boxes, and what these are of: VOC, COCO and BCCD; KITTI; Open Images; COCO's
# panoptic configs.
FIELDS = (
    ("objects", "label"),
    ("objects", "type"),
    ("bobjects", "label"),
    ("panoptic_objects", "label"),
)
# Marks of objects that are not asked for in evaluation: VOC's, and crowds of COCO.
DIFFICULT = ("is_difficult", "is_crowd")


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
      boxes: float32 `(K, 4)`, `[ymin, xmin, ymax, xmax]` in shares of the image.
      label: int32 `(K,)`.
      difficult: bool `(K,)`.
    """

    boxes: np.ndarray
    label: np.ndarray
    difficult: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsObjects:
    """Parts of splits, one after the other, whose images are still encoded."""

    sources: Sequence[Sequence[dict]]
    channels: int
    name: str
    fields: tuple[str, str]  # of `FIELDS`

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def read(self, positions):
        ends = list(itertools.accumulate(map(len, self.sources)))
        found = []
        for position in map(int, positions):
            number = bisect.bisect_right(ends, position)
            source = self.sources[number]
            record = source[position - ends[number] + len(source)]
            name = f"{self.name}, image {position}"
            image = images.decode(record["image"], self.channels, name)
            found.append((image, _objects(record, *self.fields)))
        return found


def _objects(record: Mapping, group: str, kind: str) -> Objects:
    given = record[group]
    label = np.asarray(given[kind], np.int32).reshape(-1)
    difficult = np.zeros(len(label), bool)
    for name in DIFFICULT:
        if name in given:
            difficult |= np.asarray(given[name], bool).reshape(-1)
    return Objects(np.asarray(given["bbox"], np.float32).reshape(-1, 4), label, difficult)


def collection(name: str, data_dir: str, *, prepared: bool = True) -> Collection:
    """The set of that TFDS name; `voc/2007+2012` joins configs of one set.

    The splits of joined configs have their names behind them: `train_2007`, `test_2012`.

    Args:
      name, data_dir, prepared: As of `tfds_sets.collection`.

    Raises:
      UserError: as there, and where the set has no objects with boxes and labels.
    """
    tfds_sets.check_reachable(data_dir)
    base, _, configs = name.partition("/")
    names = [f"{base}/{config}" for config in configs.split("+")] if "+" in configs else [name]
    builders = {own: tfds_sets.open_builder(own, data_dir) for own in names}
    checked = [_image_and_label(own, builder.info.features) for own, builder in builders.items()]
    fields = checked[0][2]
    if len({(tuple(label.names), where) for _, label, where in checked}) > 1:
        raise UserError(f"data.name={name!r}: these sets have different classes or objects")
    splits, places = {}, {}
    for own, builder in builders.items():
        if prepared:
            tfds_sets.check_prepared(own, data_dir, builder)
        suffix = "_" + own.partition("/")[2] if len(names) > 1 else ""
        for split, info in builder.info.splits.items():
            splits[split + suffix] = info
            places[split + suffix] = builder, split
    (height, width, channels), label = checked[0][0].shape, checked[0][1]
    if any(image.shape != checked[0][0].shape for image, _, _ in checked):
        height = width = None

    def open_parts(parts: Sequence[Part]) -> TfdsObjects:
        sources = []
        for split, start, stop in parts:
            builder, own = places[split]
            part = tfds.core.ReadInstruction(own, start, stop)
            decoders = {"image": tfds.decode.SkipDecoding()}
            sources.append(builder.as_data_source(split=part, decoders=decoders))
        return TfdsObjects(sources, channels or 3, f"{name} {parts}", fields)

    return Collection(
        name=base,
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        image_shape=(height, width, channels or 3),
        splits=splits,
        open=open_parts,
    )


def _image_and_label(
    name: str, features
) -> tuple[tfds.features.Image, tfds.features.ClassLabel, tuple[str, str]]:
    """The features, and by which of `FIELDS` the objects are found."""
    features = features if isinstance(features, tfds.features.FeaturesDict) else {}
    image = features["image"] if "image" in features else None
    if isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8:
        for fields in FIELDS:
            group, kind = fields
            objects = features[group] if group in features else {}
            objects = getattr(objects, "feature", objects)
            if not isinstance(objects, Mapping | tfds.features.FeaturesDict):
                continue
            boxes, label = (objects[key] if key in objects else None for key in ("bbox", kind))
            if isinstance(boxes, tfds.features.BBoxFeature) and _has_classes(label):
                return image, label, fields
    groups = ", ".join(f"{group} (bbox and {kind})" for group, kind in FIELDS)
    needs = f"image (Image of uint8) and one of {groups}"
    raise tfds_sets.wrong_kind(name, features, "detection", needs)


def _has_classes(label) -> bool:
    return isinstance(label, tfds.features.ClassLabel) and bool(label.num_classes)
