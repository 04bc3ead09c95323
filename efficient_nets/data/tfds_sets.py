"""Any image classification set of TensorFlow Datasets, read at random and without TensorFlow."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from efficient_nets import names
from efficient_nets.data import images
from efficient_nets.data.collection import Collection
from efficient_nets.data.splits import Part
from efficient_nets.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsExamples:
    """A `tfds.data_source` whose images are still encoded."""

    source: Sequence[dict]
    channels: int
    name: str

    def __len__(self) -> int:
        return len(self.source)

    def read(self, positions):
        # One call for many records is five times faster than a call each.
        records = self.source.__getitems__([int(i) for i in positions])
        return [
            (images.decode(r["image"], self.channels, f"{self.name}, image {i}"), int(r["label"]))
            for i, r in zip(positions, records, strict=True)
        ]


def collection(name: str, data_dir: str, *, prepared: bool = True) -> Collection:
    """The set of that TFDS name in a data_dir; '' is TFDS's default folder.

    With `prepared=False` it need not be there: shapes and classes are known, `open` is of no use.

    Raises:
      UserError: the folder cannot be reached; the name is unknown; the set has no image and label;
        it is not prepared, or in a format without random access (says the command to run).
    """
    check_reachable(data_dir)
    builder = open_builder(name, data_dir)
    image, label = _image_and_label(name, builder.info.features)
    if prepared:
        check_prepared(name, data_dir, builder)
    height, width, channels = image.shape

    def open_parts(parts: Sequence[Part]) -> TfdsExamples:
        first, *rest = (tfds.core.ReadInstruction(name, start, stop) for name, start, stop in parts)
        source = builder.as_data_source(
            split=sum(rest, start=first), decoders={"image": tfds.decode.SkipDecoding()}
        )
        return TfdsExamples(source, channels or 3, f"{builder.info.full_name} {parts}")

    return Collection(
        name=builder.name,
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        image_shape=(height, width, channels or 3),
        splits=builder.info.splits,
        open=open_parts,
    )


def check_prepared(name: str, data_dir: str, builder: tfds.core.DatasetBuilder) -> None:
    """Raises a UserError, with the command to run, if a set cannot be read at random from there."""
    command = f"python -m efficient_nets.data.prepare {name}"
    if not builder.is_prepared():
        raise UserError(
            f"data.name={name!r} is not prepared in {builder.data_path}; prepare it once "
            f"with: {command}{f' --dir {data_dir}' if data_dir else ''}"
        )
    if not has_random_access(builder):
        raise UserError(
            f"data.name={name!r} is prepared in {builder.data_path}, in a format that "
            "cannot be read at random; prepare it into another folder, to be data.dir: "
            f"{command} --dir FOLDER"
        )


def check_reachable(data_dir: str) -> None:
    """Raises a UserError if there is no such folder."""
    try:
        found = not data_dir or tfds.core.Path(data_dir).expanduser().is_dir()
    except Exception as error:  # gs:// and s3:// paths each have exceptions of their own
        raise UserError(f"data.dir={data_dir!r} cannot be reached: {error}") from error
    if not found:
        raise UserError(
            f"data.dir={data_dir!r} does not exist; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets"
        )


def has_random_access(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the set is prepared in a format that `data_source` can read."""
    formats = builder.info.available_file_formats()
    return bool(formats & tfds.core.FileFormat.with_random_access())


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """`tfds.builder`, with an error that gives the nearest names."""
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", "folder:PATH", *tfds.list_builders(with_community_datasets=False)]
        raise UserError(
            f"data.name={name!r} is not a data set of TFDS, nor prepared in data.dir"
            + names.nearest(name, known)
        ) from error
    except Exception as error:  # a wrong config or version, or whatever the set's own code raises
        raise UserError(f"data.name={name!r} cannot be opened: {error}") from error


def _image_and_label(name: str, features) -> tuple[tfds.features.Image, tfds.features.ClassLabel]:
    features = features if isinstance(features, tfds.features.FeaturesDict) else {}
    image = features["image"] if "image" in features else None
    label = features["label"] if "label" in features else None
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
        or not isinstance(label, tfds.features.ClassLabel)
        or not label.num_classes
    ):
        needs = "image (Image of uint8) and label (ClassLabel)"
        raise wrong_kind(name, features, "image classification", needs)
    return image, label


def wrong_kind(name: str, features: Mapping, kind: str, needs: str) -> UserError:
    """What says that a set with these features is none of the kind that has those it needs."""
    has = ", ".join(f"{key}: {type(value).__name__}" for key, value in sorted(features.items()))
    return UserError(
        f"data.name={name!r} is no {kind} set: it needs the features {needs}, and has "
        f"{has or 'none by name'}"
    )
