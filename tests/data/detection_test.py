"""Sets of images with boxes, and what augmentation does to both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from efficient_nets import data
from efficient_nets.data import detection_augmentation as augmentation
from efficient_nets.data import eval_batches, load, windows
from efficient_nets.errors import UserError
from efficient_nets.ops import boxes as box_ops

IMAGE = tfds.features.Image(shape=(None, None, 3))
OBJECTS = tfds.features.Sequence(
    {
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=["a", "b"]),
        "is_difficult": np.bool_,
    }
)


def example(pixels, seed, count):
    rng = np.random.default_rng(seed)
    objects = [
        {
            "bbox": tfds.features.BBox(*sorted(rng.random(2)), *(1.0, 1.0)),
            "label": int(rng.integers(2)),
            "is_difficult": bool(i % 2),
        }
        for i in range(count)
    ]
    return dict(image=pixels(seed, 12, 10 + seed, 3), objects=objects)


@pytest.fixture
def set_of_boxes(write_tfds, pixels):
    """'boxes/x' and 'boxes/y', two and one images of train, none to three objects; data_dir."""
    for config, seeds in (("x", (0, 1)), ("y", (2,))):
        examples = [example(pixels, seed, count=seed) for seed in seeds]
        where = write_tfds(
            {"image": IMAGE, "objects": OBJECTS}, {"train": examples}, f"boxes/{config}"
        )
    return where


def fields(where, name="boxes/x", **others):
    given = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=8, max_boxes=3, test="")
    return dict(name=name, dir=where) | given | others


def test_boxes_are_padded(set_of_boxes, make_config, pixels):
    dataset = load(make_config(**fields(set_of_boxes)), "detection")
    resident = dataset.train.resident
    assert dataset.info.image_shape == (8, 8, 3) and dataset.info.class_names == ("a", "b")
    assert resident["image"].shape == (2, 9, 9, 3)  # an eighth larger
    expected = example(pixels, 1, 1)["objects"][0]
    np.testing.assert_array_equal(resident["boxes"][1, 0], np.float32(expected["bbox"]))
    assert resident["label"].tolist() == [[-1] * 3, [expected["label"], -1, -1]]
    assert not resident["difficult"].any() and not resident["boxes"][0].any()


def test_configs_of_a_set_join(set_of_boxes, make_config):
    config = make_config(**fields(set_of_boxes, "boxes/x+y", train="train_y+train_x[1:]"))
    joined = load(config, "detection").train
    parts = [
        load(make_config(**fields(set_of_boxes, name, train=split)), "detection").train.resident
        for name, split in (("boxes/y", "train"), ("boxes/x", "train[1:]"))
    ]
    for key, values in joined.resident.items():
        np.testing.assert_array_equal(values, np.concatenate([part[key] for part in parts]))


@pytest.mark.parametrize(
    ("name", "others", "task", "message"),
    [
        ("boxes/x+y", dict(train="train_y", max_boxes=1), "detection", "max_boxes=1: image 0 .* 2"),
        ("boxes/x+y", dict(train="train"), "detection", "data.train='train'.*train_x"),
        ("boxes/x", dict(image_size=0), "detection", "data.image_size=0"),
        ("boxes/x", {}, "classification", "no image classification set"),
    ],
)
def test_bad_input_is_named(set_of_boxes, make_config, name, others, task, message):
    with pytest.raises(UserError, match=message):
        load(make_config(**fields(set_of_boxes, name, **others)), task)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("group", "kind"),
    [("objects", "type"), ("bobjects", "label"), ("panoptic_objects", "label")],
)
def test_sets_that_name_their_boxes_otherwise(group, kind, write_tfds, make_config, pixels):
    """As KITTI, Open Images, whose `objects` have no boxes, and panoptic COCO."""
    label = tfds.features.ClassLabel(names=["a", "b"])
    objects = {"bbox": tfds.features.BBoxFeature(), kind: label}
    features = {"image": IMAGE, group: tfds.features.Sequence(objects)}
    own = [{"bbox": tfds.features.BBox(0.0, 0.25, 0.5, 1.0), kind: 1}]
    given = {"image": pixels(0, 12, 10, 3), group: own}
    if group == "bobjects":
        features["objects"] = tfds.features.Sequence({"label": label})
        given["objects"] = [{"label": 0}, {"label": 1}]
    where = write_tfds(features, {"train": [given]}, "others")
    dataset = load(make_config(**fields(where, "others", train="train")), "detection")
    assert dataset.info.class_names == ("a", "b")
    np.testing.assert_array_equal(dataset.train.resident["label"], [[1, -1, -1]])
    np.testing.assert_array_equal(dataset.train.resident["boxes"][0, 0], [0, 0.25, 0.5, 1])


def test_a_set_without_boxes_is_named(tiny_tfds, make_config):
    with pytest.raises(UserError, match="'tiny' is no detection set.*label: ClassLabel"):
        load(make_config(name="tiny", dir=tiny_tfds), "detection")


INFO = data.Info("painted", 1, (32, 32, 3), (0.5,) * 3, (0.5,) * 3)
BOX = np.array([[0.25, 0.375, 0.5, 0.75], [0.9, 0.9, 0.95, 0.95]], np.float32)
OFF = augmentation.DetectionAugmentation(photometric=False, expand=1.0, crop=False, flip=False)


def painted():
    """A grey image with a white first box."""
    image = np.full((40, 40, 3), 64, np.uint8)
    image[10:20, 15:30] = 255
    return image


@pytest.fixture(scope="module")
def augment():
    """`augment(spec, seed, count)`: of so many painted images."""

    def run(seed, *, spec, count):
        image = jnp.broadcast_to(jnp.asarray(painted()), (count, 40, 40, 3))
        boxes = jnp.broadcast_to(jnp.asarray(BOX), (count, *BOX.shape))
        label = jnp.broadcast_to(jnp.array([0, -1], jnp.int32), (count, 2))
        key = jax.random.key(seed)
        return augmentation.augment_detection(key, image, boxes, label, spec=spec, info=INFO)

    return jax.jit(run, static_argnames=("spec", "count"))


def test_without_augmentation_training_sees_what_evaluation_does(augment):
    images, boxes, label = augment(0, spec=OFF, count=1)
    np.testing.assert_allclose(images[0], data.normalise(painted(), INFO), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(boxes[0, 0], BOX[0])
    assert label.tolist() == [[0, -1]]


def test_boxes_go_where_the_pixels_go(augment):
    """What is brighter than halfway between grey and white is the box."""
    spec = dataclasses.replace(OFF, expand=2.0, crop=True, flip=True)
    images, boxes, label = jax.device_get(augment(1, spec=spec, count=24))
    assert set(label[:, 1].tolist()) == {-1} and 12 < np.sum(label[:, 0] == 0)
    halfway, seen = (64 + 255) / 255 - 1, 0
    for image, box, own in zip(images[..., 0], boxes[:, 0], label[:, 0], strict=True):
        bright = np.argwhere(image > halfway)
        if own < 0 or not len(bright):
            continue
        seen += 1
        low, high = bright.min(0), bright.max(0) + 1
        # Half a pixel of rounding, and as much of the canvas where the box lies at its edge.
        np.testing.assert_allclose(np.concatenate([low, high]), box * 32, atol=1)
    assert seen > 12
    assert np.ptp(boxes[:, 0, 2] - boxes[:, 0, 0]) > 0.1  # several sizes
    outside = np.float32((0.5 - 0.5) / 0.5)
    assert np.any(images == outside)  # the canvas is of mean colour


def test_crops_leave_enough_of_an_object():
    boxes, valid = jnp.asarray(BOX), jnp.array([True, False])
    window = jnp.array([-0.5, -0.5, 1.5, 1.5])
    keys = jax.random.split(jax.random.key(0), 64)
    found = jax.jit(jax.vmap(lambda key: augmentation.cropped(key, window, boxes, valid)))(keys)
    whole = np.all(np.asarray(found) == np.asarray(window), 1)
    cut = np.asarray(found)[~whole]
    assert 4 < whole.sum() < 50
    sides = (cut[:, 2:] - cut[:, :2]) / 2
    ratio = sides[:, 0] / sides[:, 1]
    assert sides.min() >= 0.3 and sides.max() <= 1 and ratio.min() >= 0.5 and ratio.max() <= 2
    centre = (BOX[0, :2] + BOX[0, 2:]) / 2
    assert np.all((cut[:, :2] < centre) & (centre < cut[:, 2:]))
    assert cut[:, :2].min() >= -0.5 and cut[:, 2:].max() <= 1.5
    overlaps = np.asarray(box_ops.iou(jnp.asarray(cut), boxes[:1]))[:, 0]
    assert (overlaps > 0.1).any()


def test_colours_change_and_grey_stays_grey():
    keys = jax.random.split(jax.random.key(1), 16)
    image = jnp.stack([jnp.full((2, 2), x, jnp.float32) for x in (0.2, 0.4, 0.6)], -1)
    grey = jnp.full((2, 2, 3), 0.4, jnp.float32)
    distort = jax.jit(jax.vmap(augmentation.distorted, in_axes=(0, None)))
    coloured, greys = np.asarray(distort(keys, image)), np.asarray(distort(keys, grey))
    assert np.ptp(coloured[:, 0, 0], axis=0).min() > 0.1
    # The two decimals of the matrix YIQ are not exact, so hue turns grey by about 1e-3.
    np.testing.assert_allclose(np.ptp(greys, axis=-1), 0, atol=5e-3)
    assert coloured.min() >= 0 and coloured.max() <= 1


def test_a_window_is_resampled():
    image = jnp.asarray(np.random.default_rng(0).random((6, 8, 2)), jnp.float32)
    resample = jax.jit(lambda window: windows.resample(image, window, (6, 8)))
    beyond = np.asarray(resample(jnp.array([0.5, -0.25, 1.5, 0.75])))
    np.testing.assert_allclose(beyond[:3, 2:], image[3:, :6], rtol=0, atol=1e-6)
    assert not beyond[3:].any() and not beyond[:, :2].any()
    # Half as large: halfway between two pixels, of which each has half.
    part = np.asarray(resample(jnp.array([0.0, 0.25, 1.0, 0.75])))
    np.testing.assert_allclose(part[:, 1], 0.75 * image[:, 2] + 0.25 * image[:, 3], atol=1e-6)


def test_batches_of_a_stream(set_of_boxes, make_config):
    config = fields(set_of_boxes, storage="stream")
    source = load(make_config(**config), "detection").train
    batch = next(eval_batches(source, 2))
    resident = load(make_config(**fields(set_of_boxes)), "detection").train.resident
    for key, values in resident.items():
        np.testing.assert_array_equal(batch[key], values)
    with pytest.raises(UserError, match="detection.expand=0.5: must be at least 1"):
        augmentation.DetectionAugmentation(expand=0.5)
