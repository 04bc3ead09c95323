"""Folders of images in both layouts, of one size and of many."""

import io

import numpy as np
import pytest
from PIL import Image

from efficient_nets.data import load
from efficient_nets.errors import UserError


def jpeg(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG")
    return buffer.getvalue()


def labels_by_image(source, values):
    """The label of each of some images, found by its pixels."""
    found = {image.tobytes(): label for image, label in zip(*source.resident.values(), strict=True)}
    return [found[value.tobytes()] for value in values]


def test_split_folders(make_folder, make_config, pixels):
    cats, dogs, test = pixels(0, 5, 8, 6, 3), pixels(1, 4, 8, 6, 3), pixels(2, 2, 8, 6, 3)
    root = make_folder(
        {f"train/cat/{i}.png": x for i, x in enumerate(cats)}
        | {f"train/dog/{i}.PNG": x for i, x in enumerate(dogs)}
        | {f"test/dog/{i}.png": x for i, x in enumerate(test)}
        | {"train/cat/notes.txt": b"no image", "README.md": b"none", ".git/objects/x.png": b"none"}
    )
    dataset = load(make_config(name=f"folder:{root}"))
    assert dataset.info.class_names == ("cat", "dog") and dataset.info.num_classes == 2
    assert dataset.info.image_shape == (8, 6, 3)
    assert labels_by_image(dataset.train, [*cats, *dogs]) == [0] * 5 + [1] * 4
    # By class names of all splits, although test has no cats.
    assert labels_by_image(dataset.test, test) == [1, 1]
    again = load(make_config(name=f"folder:{root}"))
    np.testing.assert_array_equal(again.train.resident["image"], dataset.train.resident["image"])


def test_class_folders_are_one_split_in_mixed_order(make_folder, make_config, pixels):
    root = make_folder({f"{c}/{i}.png": pixels(i) for c in "ab" for i in range(20)})
    config = make_config(name=f"folder:{root}", train="train[:75%]", test="train[75%:]")
    dataset = load(config)
    assert (len(dataset.train), len(dataset.test)) == (30, 10)
    assert set(dataset.test.resident["label"]) == {0, 1}
    with pytest.raises(UserError, match="data.test='test' .*'train': 40"):
        load(make_config(name=f"folder:{root}"))


def test_channels_are_grey_only_if_all_are(make_folder, make_config, pixels):
    root = make_folder({"a/0.png": pixels(0, 4, 4), "b/0.jpg": jpeg(pixels(1, 4, 4))})
    config = make_config(name=f"folder:{root}", test="")
    assert load(config).info.image_shape == (4, 4, 1)
    make_folder({"b/1.png": pixels(2, 4, 4, 3)})
    dataset = load(config)
    assert dataset.info.image_shape == (4, 4, 3)
    expected = np.repeat(pixels(0, 4, 4)[..., None], 3, -1)
    assert labels_by_image(dataset.train, [expected, pixels(2, 4, 4, 3)]) == [0, 1]


def test_images_of_varied_size_stream_for_training(make_folder, make_config, pixels):
    root = make_folder(
        {
            f"{split}/a/{i}.png": pixels(i, 20 + i, 30)
            for split in ("train", "test")
            for i in range(3)
        }
        | {"train/b/0.png": pixels(9, 40, 20, 3)}
    )
    fields = dict(name=f"folder:{root}", mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = load(make_config(**fields, image_size=16))
    assert dataset.info.image_shape == (16, 16, 3)
    assert dataset.train.resident is None
    assert dataset.test.resident["image"].shape == (3, 16, 16, 3)
    rngs = [np.random.default_rng(i) for i in range(2)]
    assert dataset.train.read([0, 3], rngs)["image"].shape == (2, 16, 16, 3)
    with pytest.raises(UserError, match="data.image_size=0, but .* vary in size"):
        load(make_config(**fields))
    with pytest.raises(UserError, match="data.storage='memory': .* vary in size"):
        load(make_config(**fields, image_size=16, storage="memory"))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_damaged_image_is_named(make_folder, make_config, pixels, content):
    if content is None:  # the header is whole, the pixels are not
        content = jpeg(pixels(0, 64, 64, 3))[:2000]
    root = make_folder({"a/0.png": pixels(0, 64, 64, 3), "a/damaged.jpg": content})
    with pytest.raises(UserError, match="damaged.jpg is not a readable image"):
        load(make_config(name=f"folder:{root}", test=""))


def test_missing_or_empty_folders_are_named(make_config, tmp_path):
    with pytest.raises(UserError, match="data.name='folder:/nowhere'.* no folder /nowhere"):
        load(make_config(name="folder:/nowhere"))
    with pytest.raises(UserError, match="no images; they belong in .*<split>/<class>/"):
        load(make_config(name=f"folder:{tmp_path}"))
