"""TFDS sets, from files written here in its own format, and every way they can be missing."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from efficient_nets.data import eval_batches, load, prepare
from efficient_nets.errors import UserError

SQUARE = tfds.features.Image(shape=(8, 8, 3))
LABEL = tfds.features.ClassLabel(num_classes=3)


def test_a_prepared_set(tiny_tfds, make_config, pixels):
    dataset = load(make_config(name="tiny", dir=tiny_tfds))
    assert dataset.info.class_names == ("a", "b", "c")
    assert dataset.info.image_shape == (8, 8, 3)
    np.testing.assert_array_equal(dataset.train.resident["label"], np.arange(20) % 3)
    for split, first in ((dataset.train, 0), (dataset.test, 20)):
        expected = np.stack([pixels(first + i) for i in range(len(split))])
        np.testing.assert_array_equal(split.resident["image"], expected)


def test_splits_are_those_of_tfds(tiny_tfds, make_config):
    spec = "train[3:30%]+test[-2:]+train[:10%]"
    dataset = load(make_config(name="tiny", dir=tiny_tfds, train=spec))
    source = tfds.builder("tiny", data_dir=tiny_tfds).as_data_source(spec)
    np.testing.assert_array_equal(dataset.train.resident["image"], [r["image"] for r in source])
    everything = load(make_config(name="tiny:1.0.0", dir=tiny_tfds, train="all"))
    assert len(everything.train) == 25


def test_streaming_equals_memory(tiny_tfds, make_config):
    fields = dict(name="tiny", dir=tiny_tfds, mean=(0.5,) * 3, std=(0.5,) * 3)
    resident = load(make_config(**fields)).train.resident
    stream = load(make_config(**fields, storage="stream")).train
    batches = list(eval_batches(stream, 6))
    np.testing.assert_array_equal(
        np.concatenate([b["image"] for b in batches])[:20], resident["image"]
    )


def test_varied_and_grey(write_tfds, make_config, pixels):
    examples = [dict(image=pixels(i, 30, 20 + i), label=i) for i in range(3)]
    image = tfds.features.Image(shape=(None, None, 1))
    where = write_tfds({"image": image, "label": LABEL}, {"train": examples, "test": examples})
    fields = dict(name="tiny", dir=where, mean=(0.5,), std=(0.5,))
    dataset = load(make_config(**fields, image_size=16))
    assert dataset.train.resident is None
    assert dataset.test.resident["image"].shape == (3, 16, 16, 1)
    with pytest.raises(UserError, match="data.image_size=0"):
        load(make_config(**fields))


def test_a_damaged_image_is_named(write_tfds, make_config, pixels):
    examples = [dict(image=pixels(0), label=0), dict(image=b"no image", label=0)]
    where = write_tfds({"image": SQUARE, "label": LABEL}, {"train": examples})
    with pytest.raises(UserError, match="tiny/1.0.0.*image 1 is not a readable image"):
        load(make_config(name="tiny", dir=where, test=""))


def test_a_set_that_is_not_prepared_says_how(make_config, tmp_path):
    command = rf"python -m efficient_nets.data.prepare cifar100 --dir {tmp_path}"
    with pytest.raises(UserError, match=rf"'cifar100' is not prepared in .*{command}"):
        load(make_config(name="cifar100", dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_another_format_says_how(write_tfds, make_config, pixels):
    examples = [dict(image=pixels(0), label=0)]
    features = {"image": SQUARE, "label": LABEL}
    where = write_tfds(features, {"train": examples}, file_format="tfrecord")
    with pytest.raises(UserError, match="cannot be read at random.*prepare tiny --dir FOLDER"):
        load(make_config(name="tiny", dir=where))
    with pytest.raises(UserError, match="already in .*give another folder"):
        prepare.prepare("tiny", where)


def test_unknown_names_give_the_nearest(make_config, tmp_path):
    for name, near in (
        ("cifr10", "cifar10"),
        ("imagenet2021", "imagenet2012"),
        ("digit", "digits"),
    ):
        with pytest.raises(UserError, match=f"data.name='{name}' is not .*'{near}'"):
            load(make_config(name=name, dir=str(tmp_path)))
    with pytest.raises(UserError, match="data.name='xyzzyplugh' is not .*data.dir$"):
        load(make_config(name="xyzzyplugh", dir=str(tmp_path)))
    for name in ("cifar10:9.9.9", "cifar10/none", "a b"):
        with pytest.raises(UserError, match=f"data.name='{name}' cannot be opened"):
            load(make_config(name=name, dir=str(tmp_path)))


def test_unreachable_folders(make_config):
    with pytest.raises(UserError, match="data.dir='/nowhere' does not exist"):
        load(make_config(name="cifar10", dir="/nowhere"))


def test_a_folder_whose_service_fails(make_config, monkeypatch):
    def refuse(self):
        raise PermissionError("no credentials")

    monkeypatch.setattr(type(tfds.core.Path("/tmp")), "is_dir", refuse)
    with pytest.raises(UserError, match="data.dir='/tmp' cannot be reached: no credentials"):
        load(make_config(name="cifar10", dir="/tmp"))


@pytest.mark.parametrize(
    "features, has",
    [
        ({"image": SQUARE, "objects": LABEL}, "image: Image, objects: ClassLabel"),
        (
            {"image": tfds.features.Tensor(shape=(8,), dtype=np.uint8), "label": LABEL},
            "image: Tensor",
        ),
        (
            {"image": tfds.features.Image(shape=(8, 8, 1), dtype=np.float32), "label": LABEL},
            "Image",
        ),
        ({"image": SQUARE, "label": tfds.features.Scalar(np.int64)}, "label: Scalar"),
    ],
)
def test_other_kinds_of_sets_are_refused(write_tfds, make_config, features, has):
    where = write_tfds(features, {"train": []})
    with pytest.raises(UserError, match=f"'tiny' is no image classification set: .*{has}"):
        load(make_config(name="tiny", dir=where))


def test_prepare_without_tensorflow_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="1"):
        prepare.main(["cifar10"])
    assert "pip install" in capsys.readouterr().err


def test_prepare(monkeypatch, tiny_tfds, capsys):
    asked = []
    builder = tfds.builder("tiny", data_dir=tiny_tfds)
    monkeypatch.setattr(
        type(builder), "download_and_prepare", lambda self, **options: asked.append(options)
    )
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: "there")
    prepare.main(["tiny", "--dir", tiny_tfds])
    assert asked == [{"file_format": "array_record"}]
    assert f"tiny is prepared in {tiny_tfds}/tiny/1.0.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        prepare.main(["tiyn", "--dir", tiny_tfds])
    assert "'tiyn' is not a data set of TFDS" in capsys.readouterr().err


def test_loading_does_not_import_tensorflow(tiny_tfds):
    code = (
        "import sys, ml_collections\n"
        "from efficient_nets import data\n"
        f"fields = data.defaults() | dict(name='tiny', dir={tiny_tfds!r})\n"
        "data.load(ml_collections.ConfigDict(fields))\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
