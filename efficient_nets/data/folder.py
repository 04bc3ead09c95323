"""Any folder of images: PATH/<split>/<class>/<image>, or PATH/<class>/<image>."""

import dataclasses
import itertools
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from efficient_nets.data import images
from efficient_nets.data.collection import Collection
from efficient_nets.data.splits import split_info, take
from efficient_nets.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclasses.dataclass(frozen=True, eq=False)
class FileExamples:
    """Image files (N,) and their labels (N,)."""

    paths: np.ndarray
    labels: np.ndarray
    channels: int

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, positions):
        return [(self._decode(self.paths[i]), int(self.labels[i])) for i in positions]

    def _decode(self, path: str) -> Image.Image:
        return images.decode(pathlib.Path(path).read_bytes(), self.channels, path)


def collection(path: str) -> Collection:
    """The images under a folder, each split in a random order that is always the same.

    Classes are the sorted names of the class folders of all splits together. Without split folders
    there is one split, 'train'. Images are RGB, or grey if all are and have one size.

    Raises:
      UserError: the folder does not exist, holds no images, or one of them cannot be read.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.name='folder:{path}': there is no folder {root}")
    files = _scan(root)
    if not files:
        raise UserError(
            f"data.name='folder:{path}': no images; they belong in {root}/<split>/<class>/ "
            f"or {root}/<class>/ and end in one of {' '.join(SUFFIXES)}"
        )
    names = sorted(set().union(*files.values()))
    label_of = {name: label for label, name in enumerate(names)}
    paths, labels = {}, {}
    for split, classes in files.items():
        pairs = [(file, label_of[name]) for name in sorted(classes) for file in classes[name]]
        # RandomState, as NumPy promises that its stream never changes.
        order = np.random.RandomState(0).permutation(len(pairs))
        paths[split] = np.array([file for file, _ in pairs])[order]
        labels[split] = np.array([label for _, label in pairs])[order]
    shape = _common_shape(list(itertools.chain(*paths.values())))
    return Collection(
        name="folder",
        num_classes=len(names),
        class_names=tuple(names),
        image_shape=shape,
        splits={split: split_info(split, len(values)) for split, values in labels.items()},
        open=lambda parts: FileExamples(take(paths, parts), take(labels, parts), shape[2]),
    )


def _scan(root: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """The image files by split and class; folders without any are left out."""
    flat = _classes(root)
    splits = {"train": flat} if flat else {p.name: _classes(p) for p in _folders(root)}
    return {split: classes for split, classes in splits.items() if classes}


def _classes(root: pathlib.Path) -> dict[str, list[str]]:
    files = {p.name: [str(f) for f in sorted(p.iterdir()) if _is_image(f)] for p in _folders(root)}
    return {name: paths for name, paths in files.items() if paths}


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _is_image(path: pathlib.Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _common_shape(paths: list[str]) -> tuple[int | None, int | None, int]:
    """(H, W, C) from the files' headers; stops reading at the second size it meets."""
    sizes, grey = set(), True
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):
            for size, mode in pool.map(_header, paths[start : start + 1024]):
                sizes.add(size)
                grey = grey and mode in ("1", "L", "LA")
            if len(sizes) > 1:
                return None, None, 3
    ((width, height),) = sizes
    return height, width, 1 if grey else 3


def _header(path: str) -> tuple[tuple[int, int], str]:
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except images.UNREADABLE as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
