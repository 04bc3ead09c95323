"""From a config to data sets: opening, decoding into memory where they fit, statistics."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from efficient_nets.data import digits, folder, images, splits, tfds_objects, tfds_sets
from efficient_nets.data.collection import Collection, Examples
from efficient_nets.errors import UserError

STORAGE = ("auto", "memory", "stream")
SPLITS = ("train", "validation", "test")
DETECTION = "detection"  # the task whose images have labelled boxes

# Mean and standard deviation by channel of the training images in [0, 1].
STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "bccd": ((0.7373, 0.6962, 0.7149), (0.0599, 0.1012, 0.0748)),
    # Of photographs, for nets that start from one of ImageNet.
    **dict.fromkeys(
        ("imagenet2012", "voc", "coco"), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ),
}


@dataclasses.dataclass(frozen=True)
class Info:
    """What a model and an augmentation need to know of a data set; hashable.

    Attributes:
      name: of the set.
      num_classes: labels are 0 .. num_classes - 1.
      image_shape: (H, W, C) of every image as it comes out of here.
      mean, std: C floats each, of images in [0, 1].
      class_names: by label; may be empty.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The labelled images of one split, in a fixed order.

    Attributes:
      name: of set and split, for messages.
      examples: the encoded images.
      image_shape: (H, W, C) that `read` gives.
      num_classes: bound of the labels.
      varied: whether images come in many sizes, and are cropped rather than resized.
      workers: processes that decode a stream; 0 is threads.
      resident: {"image": uint8 (N, H, W, C), "label": int32 (N,)}, or None where it streams.
    """

    name: str
    examples: Examples
    image_shape: tuple[int, int, int]
    num_classes: int
    varied: bool
    workers: int
    resident: Mapping[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        return len(self) * math.prod(self.image_shape)

    def read(
        self, positions: Sequence[int], rngs: Sequence[np.random.Generator] | None = None
    ) -> dict[str, np.ndarray]:
        """Decodes {"image": uint8 (B, H, W, C), "label": int32 (B,)}.

        Images of varied size are cropped at random where there is a generator for each of them,
        else at the centre.
        """
        height, width, _ = self.image_shape
        batch = self._blank(len(positions))
        for row, (image, label) in enumerate(self.examples.read(positions)):
            if self.varied and rngs is not None:
                image = images.random_resized_crop(image, height, rngs[row])
            elif self.varied:
                image = images.centre_crop(image, height)
            elif image.size != (width, height):
                image = images.resize(image, (width, height))
            batch["image"][row] = np.asarray(image).reshape(self.image_shape)
            self._annotate(batch, row, label, positions[row])
        return batch

    def _blank(self, count: int) -> dict[str, np.ndarray]:
        """Arrays for that many images."""
        return {
            "image": np.empty((count, *self.image_shape), np.uint8),
            "label": np.empty(count, np.int32),
        }

    def _annotate(self, batch: dict[str, np.ndarray], row: int, label, position: int) -> None:
        """Writes the label of the image at that position into a row."""
        self._check_label(label, position)
        batch["label"][row] = label

    def _check_label(self, label: int, position: int) -> None:
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{self.name}: image {position} has label {label}, "
                f"not in 0..{self.num_classes - 1}; is this split labelled?"
            )

    def decoded(self) -> "Source":
        """The same source with all its images in memory."""
        resident = self._blank(len(self))
        bar = tqdm(total=len(self), desc=f"decoding {self.name}", delay=1, disable=None)

        def fill(start: int) -> int:
            positions = range(start, min(start + 512, len(self)))
            for key, values in self.read(positions).items():
                resident[key][positions] = values
            return len(positions)

        with ThreadPoolExecutor() as pool, bar:
            for done in pool.map(fill, range(0, len(self), 512)):
                bar.update(done)
        return dataclasses.replace(self, resident=resident)


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectSource(Source):
    """Images with labelled boxes; `resident` and `read` have these for each image, M of them.

    {"image": uint8 (N, H, W, C), "boxes": float32 (N, M, 4), [ymin, xmin, ymax, xmax] in shares of
    the image, "label": int32 (N, M), -1 where there is no object, "difficult": bool (N, M)}.

    Attributes:
      max_boxes: M.
    """

    max_boxes: int = 100

    def _blank(self, count: int) -> dict[str, np.ndarray]:
        shape = count, self.max_boxes
        return {
            "image": np.empty((count, *self.image_shape), np.uint8),
            "boxes": np.zeros((*shape, 4), np.float32),
            "label": np.full(shape, -1, np.int32),
            "difficult": np.zeros(shape, bool),
        }

    def _annotate(
        self, batch: dict[str, np.ndarray], row: int, label: tfds_objects.Objects, position: int
    ) -> None:
        if (count := len(label.label)) > self.max_boxes:
            raise UserError(
                f"data.max_boxes={self.max_boxes}: image {position} of {self.name} has {count}"
            )
        for own in label.label:
            self._check_label(own, position)
        for name, values in label._asdict().items():
            batch[name][row, :count] = values


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set and its splits; a split that the config leaves empty is None."""

    info: Info
    train: Source | None
    validation: Source | None
    test: Source | None


def load(config, task: str = "classification") -> Dataset:
    """Opens the data set of `config.data` (fields: `efficient_nets.data`).

    Args:
      config: That section.
      task: What it is for, as `config.task`; for detection its splits are `ObjectSource`s.

    Raises:
      UserError: a field has a value that is not allowed or does not fit the set, the set is
        unknown, not prepared or not reachable, or an image cannot be read.
    """
    _check(config)
    objects = task == DETECTION
    collection = _collection(config, objects)
    varied = None in collection.image_shape and not objects
    shape = _image_shape(config, collection)
    stored, make = shape, Source
    if objects:
        stored = stored_shape(config, shape)
        make = functools.partial(ObjectSource, max_boxes=config.max_boxes)
    known = _known_statistics(config, collection.name, shape[-1])
    sources = {}
    for split in SPLITS:
        if spec := config[split]:
            examples = collection.open(splits.parse(split, spec, collection.splits))
            name = f"{config.name} {spec}"
            sources[split] = make(
                name, examples, stored, collection.num_classes, varied, config.workers
            )
    # Random crops of varied images need the original: their train split cannot be kept decoded.
    static = {s: source for s, source in sources.items() if not (varied and s == "train")}
    if config.storage == "memory" and len(static) < len(sources):
        raise UserError(
            f"data.storage='memory': the images of {config.name} vary in size, so training "
            "crops them as they stream; use 'auto' or 'stream'"
        )
    fits = sum(source.nbytes for source in static.values()) <= config.memory_limit_gib * 2**30
    if config.storage == "memory" or (config.storage == "auto" and fits):
        sources |= {split: source.decoded() for split, source in static.items()}
    mean, std = known or _measured(config, sources.get("train"))
    info = Info(
        config.name, collection.num_classes, shape, mean, std, class_names=collection.class_names
    )
    return Dataset(info, *(sources.get(split) for split in SPLITS))


def stored_shape(config, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Of the images of a detection set as they are kept, for a net that takes that shape."""
    height, width = (config.stored_size or -(-side * 9 // 8) for side in shape[:2])
    return height, width, shape[-1]


def statistics_known(config, task: str = "classification") -> bool:
    """Whether mean and deviation are known or given, so that `describe` says what `load` does."""
    collection = _collection(config, task == DETECTION, prepared=False)
    return _known_statistics(config, collection.name, collection.image_shape[-1]) is not None


def describe(config, task: str = "classification") -> Info:
    """What `load(config).info` says of names and shapes, without the data: it need not be prepared.

    Mean and standard deviation are those known of the set, else 0 and 1.
    """
    _check(config)
    collection = _collection(config, task == DETECTION, prepared=False)
    shape = _image_shape(config, collection)
    channels = shape[-1]
    mean, std = _known_statistics(config, collection.name, channels) or (
        (0.0,) * channels,
        (1.0,) * channels,
    )
    return Info(config.name, collection.num_classes, shape, mean, std, collection.class_names)


def _check(config) -> None:
    if config.storage not in STORAGE:
        raise UserError(f"data.storage={config.storage!r} is not one of {STORAGE}")
    for field in ("image_size", "workers", "memory_limit_gib", "stored_size"):
        if config[field] < 0:
            raise UserError(f"data.{field}={config[field]} must be at least 0")
    if config.max_boxes < 1:
        raise UserError(f"data.max_boxes={config.max_boxes} must be at least 1")
    if not any(config[split] for split in SPLITS):
        raise UserError("data.train, validation and test are all '': there is no data")


def _collection(config, objects: bool = False, *, prepared: bool = True) -> Collection:
    if objects:
        return tfds_objects.collection(config.name, config.dir, prepared=prepared)
    kind, _, path = config.name.partition(":")
    if kind not in ("digits", "folder") or (kind == "digits" and path):
        return tfds_sets.collection(config.name, config.dir, prepared=prepared)
    if config.dir:
        raise UserError(
            f"data.dir={config.dir!r} is for TFDS sets; {kind} does not use it: leave it ''"
        )
    return digits.collection() if kind == "digits" else folder.collection(path)


def _image_shape(config, collection: Collection) -> tuple[int, int, int]:
    height, width, channels = collection.image_shape
    if config.image_size:
        return config.image_size, config.image_size, channels
    if height is None or width is None:
        raise UserError(
            f"data.image_size=0, but the images of {config.name} vary in size: "
            "give the side of the crops in pixels, such as 224"
        )
    return height, width, channels


def _known_statistics(config, name: str, channels: int):
    if not (config.mean or config.std):
        return STATISTICS.get(name)
    mean, std = tuple(map(float, config.mean)), tuple(map(float, config.std))
    if not len(mean) == len(std) == channels or not min(std) > 0:
        raise UserError(
            f"data.mean={mean} and std={std}: need {channels} floats each, one a channel, "
            "of images in [0, 1], and every std above 0"
        )
    return mean, std


def _measured(config, train: Source | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel of the train split, in [0, 1]."""
    if train is None or train.resident is None:
        raise UserError(
            f"data.mean and std must be given for {config.name}: its statistics are not "
            "known, and its train split is not in memory to compute them from"
        )
    image, values = train.resident["image"], np.arange(256) / 255
    mean, std = [], []
    for channel in range(image.shape[-1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(image), 4096):  # bincount makes 8-byte copies
            pixels = image[start : start + 4096, ..., channel].ravel()
            counts += np.bincount(pixels, minlength=256)
        share = counts / counts.sum()
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)))
    if not min(std) > 0:
        raise UserError(f"data.std must be given for {config.name}: a channel is constant")
    return tuple(mean), tuple(std)
