"""Small data sets made on the spot: configs, folders of images, and real TFDS files."""

import io
import json

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from efficient_nets import data


def random_pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8, 3), dtype=np.uint8)


def encode(content):
    """An array as a PNG file; bytes as they are."""
    if isinstance(content, bytes):
        return content
    buffer = io.BytesIO()
    Image.fromarray(content).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pixels():
    """`pixels(seed, *shape)`: random uint8, by default (8, 8, 3)."""
    return random_pixels


@pytest.fixture(scope="session")
def make_config():
    """config.data with some fields changed; digits unless it says otherwise."""

    def make(**fields):
        config = ml_collections.ConfigDict(data.defaults())
        config.update({"name": "digits", "workers": 0} | fields)
        return config

    return make


@pytest.fixture
def make_folder(tmp_path):
    """Writes {"train/cat/0.png": array or bytes} under a folder and gives its path."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(content))
        return tmp_path / "images"

    return make


@pytest.fixture
def write_tfds(tmp_path):
    """Writes a prepared set into a TFDS data_dir, without TensorFlow, and gives the data_dir."""

    def write(features, splits, name="tiny", file_format="array_record"):
        folder = tmp_path / "tfds" / name / "1.0.0"  # a name may be one of a config, as 'voc/2007'
        base, _, config = name.partition("/")
        folder.mkdir(parents=True)
        features = tfds.features.FeaturesDict(features)
        features.save_config(folder)
        infos = []
        for split, examples in splits.items():
            path = folder / f"{base}-{split}.{file_format}-00000-of-00001"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for example in examples:
                example = example | {"image": encode(example["image"])}
                writer.write(features.serialize_example(example))
            writer.close()
            template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            infos.append(dict(name=split, numBytes="1", filepathTemplate=template))
            infos[-1]["shardLengths"] = [str(len(examples))]
        info = dict(name=base, version="1.0.0", fileFormat=file_format, moduleName="none")
        info |= dict(configName=config) if config else {}
        (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": infos}))
        return str(tmp_path / "tfds")

    return write


@pytest.fixture
def tiny_tfds(write_tfds):
    """A TFDS set `tiny` of 20 + 5 images of 8 x 8, label i % 3; its data_dir."""
    features = {
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
        "extra": tfds.features.Scalar(np.int64),
    }
    examples = [dict(image=random_pixels(i), label=i % 3, extra=i) for i in range(25)]
    return write_tfds(features, {"train": examples[:20], "test": examples[20:]})
