"""Loading: splits, storage, sizes, statistics, and what each wrong field says."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from efficient_nets.data import Source, defaults, digits, load, sources
from efficient_nets.errors import UserError


def rows(source):
    """The images of a resident source as a set of bytes, with how often each occurs."""
    values, counts = np.unique(
        source.resident["image"].reshape(len(source), -1), axis=0, return_counts=True
    )
    return {value.tobytes(): count for value, count in zip(values, counts, strict=True)}


def test_digits_are_all_there_once(make_config):
    dataset = load(make_config())
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (1437, 360, None)
    assert dataset.info.image_shape == (8, 8, 1) and dataset.info.num_classes == 10
    for source in (dataset.train, dataset.test):
        assert source.resident["image"].dtype == np.uint8
        assert source.resident["label"].dtype == np.int32
        # A random split: each class is a tenth, within four standard deviations.
        share = np.bincount(source.resident["label"], minlength=10) / len(source)
        assert np.abs(share - 0.1).max() < 4 * np.sqrt(0.09 / len(source))
    everything = np.concatenate(
        [
            np.column_stack([s.resident["label"], s.resident["image"].reshape(len(s), -1)])
            for s in (dataset.train, dataset.test)
        ]
    )
    raw = load_digits()
    # Mixed, as scikit-learn keeps one writer's digits together.
    assert (dataset.train.resident["label"] != raw.target[:1437]).mean() > 0.8
    expected = np.column_stack([raw.target, np.round(raw.data * 255 / 16)]).astype(int)
    np.testing.assert_array_equal(
        everything[np.lexsort(everything.T)], expected[np.lexsort(expected.T)]
    )


def test_splits_cut_as_tfds_does(make_config):
    whole = load(make_config()).train.resident
    dataset = load(
        make_config(train="train[:90%]", validation="train[90%:]", test="train[-7:]+test")
    )
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1293, 144, 367)
    for key in whole:
        parts = [dataset.train.resident[key], dataset.validation.resident[key]]
        np.testing.assert_array_equal(np.concatenate(parts), whole[key])
        np.testing.assert_array_equal(dataset.test.resident[key][:7], whole[key][-7:])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("train[:10", "'train': 1437.*'train\\[:90%\\]'.*Unrecognized split format"),
        ("trian", "'train': 1437, 'test': 360.*Unknown split 'trian'"),
        ("train[:200%]", "boundaries"),
        ("train[:90000]", "incompatible with 1437"),
        ("train[5:5]", "selects no image"),
        ("all[:5%]", "does not support slice"),
    ],
)
def test_a_wrong_split_is_explained(make_config, spec, message):
    with pytest.raises(UserError, match=rf"(?s)data.validation=.*{message}"):
        load(make_config(validation=spec))


def test_auto_keeps_in_memory_what_fits(make_config):
    bytes_needed = (1437 + 360) * 64
    for limit, resident in ((bytes_needed, True), (bytes_needed - 1, False)):
        dataset = load(make_config(memory_limit_gib=limit / 2**30, mean=(0.3,), std=(0.4,)))
        assert (
            (dataset.train.resident is not None) == (dataset.test.resident is not None) == resident
        )
    forced = load(make_config(storage="memory", memory_limit_gib=0.0))
    assert forced.train.resident is not None
    stream = load(make_config(storage="stream", mean=(0.3,), std=(0.4,)))
    assert stream.train.resident is None
    batch = stream.train.read([3, 1])
    np.testing.assert_array_equal(batch["image"], forced.train.resident["image"][[3, 1]])
    np.testing.assert_array_equal(batch["label"], forced.train.resident["label"][[3, 1]])


def test_another_image_size_resizes(make_config):
    dataset = load(make_config(image_size=16))
    assert dataset.info.image_shape == (16, 16, 1)
    big, small = (d.train.resident["image"][:50, ..., 0] for d in (dataset, load(make_config())))
    halves = big.reshape(50, 8, 2, 8, 2).mean((2, 4))
    # Blocks of an enlarged image keep what it shows, smoothed by bilinear interpolation.
    assert np.corrcoef(halves.ravel(), small.ravel())[0, 1] > 0.97


def test_statistics_are_those_of_the_train_split(make_config):
    dataset = load(make_config(train="train[:50%]"))
    pixels = dataset.train.resident["image"] / 255
    # Both sum in float64.
    np.testing.assert_allclose(dataset.info.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.info.std, pixels.std((0, 1, 2)), rtol=1e-12)
    given = load(make_config(mean=(0.25,), std=(0.5,)))
    assert (given.info.mean, given.info.std) == ((0.25,), (0.5,))
    assert hash(given.info) == hash(load(make_config(mean=(0.25,), std=(0.5,))).info)


def test_known_statistics(make_config, monkeypatch):
    monkeypatch.setitem(sources.STATISTICS, "digits", ((0.1,), (0.2,)))
    info = load(make_config(storage="stream")).info
    assert (info.mean, info.std) == ((0.1,), (0.2,))


def test_a_constant_channel_has_no_statistics(make_folder, make_config):
    root = make_folder({f"a/{i}.png": np.full((4, 4), 7, np.uint8) for i in range(3)})
    with pytest.raises(UserError, match="data.std must be given .*constant"):
        load(make_config(name=f"folder:{root}", test=""))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(storage="disk"), "data.storage='disk' .*'auto', 'memory', 'stream'"),
        (dict(image_size=-1), "data.image_size=-1 must be at least 0"),
        (dict(workers=-2), "data.workers=-2 must be at least 0"),
        (dict(memory_limit_gib=-1.0), "data.memory_limit_gib=-1.0 must be at least 0"),
        (dict(train="", test=""), "train, validation and test are all ''"),
        (dict(dir="/tmp"), "data.dir='/tmp' is for TFDS sets"),
        (dict(storage="stream"), "data.mean and std must be given for digits"),
        (dict(train=""), "data.mean and std must be given for digits"),
        (dict(mean=(0.5,)), r"data.mean=\(0.5,\) and std=\(\): need 1 floats"),
        (dict(mean=(0.5,) * 3, std=(0.5,) * 3), "need 1 floats"),
        (dict(mean=(0.5,), std=(0.0,)), "std above 0"),
    ],
)
def test_wrong_fields_are_named(make_config, fields, message):
    with pytest.raises(UserError, match=message):
        load(make_config(**fields))


def test_a_label_out_of_range_is_named(pixels):
    examples = digits.ArrayExamples(pixels(0, 3, 4, 4), np.array([0, 1, -1]))
    source = Source("unlabelled test", examples, (4, 4, 1), 2, False, 0)
    with pytest.raises(UserError, match=r"unlabelled test: image 2 has label -1, not in 0..1"):
        source.decoded()


def test_defaults_are_documented():
    import efficient_nets.data as package

    for field, value in defaults().items():
        assert f"{field}={value!r}" in package.__doc__
