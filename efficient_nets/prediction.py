"""`--mode=predict`: what a trained detector sees in images of any kind."""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from efficient_nets import data, drawing, reporting, tasks, workdirs
from efficient_nets.data import images as image_files
from efficient_nets.errors import UserError
from efficient_nets.tasks.average_precision import Found

BATCH = 8  # images at once


def predict(
    config: ConfigDict, workdir: pathlib.Path, folder: pathlib.Path, which: str, given: str
) -> None:
    """Writes predictions/NAME.png for each image, and predictions.json; on one device.

    The file has of each image its width and height, turned as its EXIF data say, and by falling
    score what was found: class, score and box, `[ymin, xmin, ymax, xmax]` in pixels.

    Args:
      config: Of the run.
      workdir: Where the files go.
      folder, which: The checkpoint, as of `workdirs.restore_for_evaluation`.
      given: An image, or a folder of images. One that cannot be read is named and left out.

    Raises:
      UserError: if there is no such file, no image that can be read, or no such checkpoint.
    """
    files = _files(given)
    if jax.process_index() > 0:
        return
    info = _info(config)
    detect = _detector(config, info, folder, which)
    side = data.stored_shape(config.data, info.image_shape)
    out = workdir / "predictions"
    out.mkdir(parents=True, exist_ok=True)
    report = {}
    for names, originals, batch in _batches(files, side):
        for path, original, own in zip(names, originals, detect(batch), strict=False):
            scale = np.array([original.height, original.width] * 2)
            report[str(path)] = {
                "width": original.width,
                "height": original.height,
                "detections": [
                    {
                        "class": info.class_names[label] if info.class_names else int(label),
                        "score": float(score),
                        "box": [float(x) for x in box * scale],
                    }
                    for box, score, label in zip(*own, strict=True)
                ],
            }
            least = config.detection.drawn_score
            drawing.draw(original, own, info.class_names, least=least).save(
                out / f"{path.name}.png"
            )
            shown = sum(own.scores >= least)
            print(f"{path}  {shown} of {len(own.scores)} detections drawn")
    if not report:
        raise UserError(f"--input={given}: it holds no image that can be read")
    reporting.write_json(workdir / "predictions.json", report)
    print(f"result       {workdir / 'predictions.json'}")
    print(f"pictures     {out}", flush=True)


def _files(given: str) -> list[pathlib.Path]:
    if not given:
        raise UserError("--input='': --mode=predict needs an image or a folder of images")
    path = pathlib.Path(given)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--input={given}: there is no such file or folder")
    known = Image.registered_extensions()
    found = sorted(own for own in path.iterdir() if own.suffix.lower() in known and own.is_file())
    if not found:
        raise UserError(f"--input={given}: there is no image in this folder")
    return found


def _batches(
    files: list[pathlib.Path], shape: tuple[int, int, int]
) -> Iterator[tuple[list[pathlib.Path], list[Image.Image], np.ndarray]]:
    """Paths, images as they are, and uint8 `(BATCH, H, W, C)`, whose last ones may be empty."""
    height, width, channels = shape
    readable = []
    for path in files:
        try:
            image = image_files.decode(path.read_bytes(), channels, str(path), upright=True)
        except (UserError, OSError) as error:
            logging.warning("%s: left out", error)
            continue
        readable.append((path, image))
        if len(readable) == BATCH:
            yield _stacked(readable, height, width, channels)
            readable = []
    if readable:
        yield _stacked(readable, height, width, channels)


def _stacked(readable, height: int, width: int, channels: int):
    batch = np.zeros((BATCH, height, width, channels), np.uint8)
    for row, (_, image) in enumerate(readable):
        resized = image_files.resize(image, (width, height))
        batch[row] = np.asarray(resized).reshape(batch.shape[1:])
    names, originals = zip(*readable, strict=True)
    return list(names), list(originals), batch


def _info(config: ConfigDict) -> data.Info:
    """Of the data set, which must be there only where its mean and deviation are measured."""
    if data.statistics_known(config.data, config.task):
        return data.describe(config.data, config.task)
    return data.load(config.data, config.task).info


def _detector(config: ConfigDict, info: data.Info, folder: pathlib.Path, which: str):
    """`(images uint8 (N, H, W, C)) -> [Found]`, of the averaged net where the run keeps one."""
    task = tasks.create(config)
    graph, net = workdirs.restored_net(config, info, folder, which)

    @jax.jit
    def step(net, images):
        model = nnx.merge(graph, net["params"], net["stats"])
        model.eval()
        return task.detect(model(data.normalise(images, info)))

    return lambda images: found_of(jax.device_get(step(net, images)))


def found_of(detections) -> list[Found]:
    """Detections of a batch, image by image, without the empty ones."""
    return [
        Found(boxes[label >= 0], scores[label >= 0], label[label >= 0])
        for boxes, scores, label in zip(*detections, strict=True)
    ]
