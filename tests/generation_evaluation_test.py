"""FID and IS of a run's generator: by a classifier trained here, and by a file of features."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from efficient_nets import config as configs
from efficient_nets import data, evaluation, experiment, workdirs
from efficient_nets import generation_evaluation as generation
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.tasks import image_scores
from tests.adversarial_test import tiny
from tests.train_test import tiny as tiny_classifier

RNG = np.random.default_rng(0)


def test_tiles_go_from_left_to_right():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    picture = generation.tiled(images, 3)
    assert picture.shape == (4, 9, 1)
    np.testing.assert_array_equal(picture[::2, ::3, 0], [[0, 1, 2], [3, 4, 5]])


def of_numpy(x):
    return image_scores.Gaussian(x.mean(0), np.cov(x, rowvar=False))


def test_scores_of_a_file(tmp_path):
    path = tmp_path / "features.npz"
    made, real = RNG.normal(size=(20, 3)), RNG.normal(1, 2, size=(30, 3))
    expected = image_scores.frechet_distance(of_numpy(real), of_numpy(made))
    np.savez(path, made=made, real=real, step=7)
    assert generation.scores_of_file(path, 7) == {"fid": pytest.approx(expected, rel=1e-12)}
    own = of_numpy(real)
    logits = np.where(np.eye(4)[np.arange(8) % 4] > 0, 100.0, -100.0)  # each class as often, sure
    moments = dict(real_mean=own.mean, real_covariance=own.covariance)
    np.savez(path, made=made, **moments, logits=logits, step=7)
    found = generation.scores_of_file(path, 7)
    assert found == {"fid": pytest.approx(expected), "is": pytest.approx(4)}


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(made=np.ones((4, 2)), real=np.ones((4, 2))), "it holds no 'step', but made, real"),
        (dict(made=np.ones((4, 2)), step=3), "it holds no 'real_mean'"),
        (dict(made=np.ones((4, 2)), real=np.ones((4, 2)), step=2), "its step=2, the net's is 3"),
        (dict(made=np.ones((4, 2)), real=np.ones((4, 3)), step=3), r"real is \(4, 3\) beside made"),
        (
            dict(made=np.ones((4, 2)), real=np.full((4, 2), np.nan), step=3),
            "real has .* not finite",
        ),
        (dict(made=np.ones((1, 2)), real=np.ones((4, 2)), step=3), "made has 1 rows, of at least"),
        (
            dict(made=np.ones((4, 2)), real=np.ones((4, 2)), logits=np.ones(4), step=3),
            r"logits is \(4,\), of",
        ),
    ],
)
def test_a_file_that_does_not_fit(arrays, message, tmp_path):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(UserError, match=message):
        generation.scores_of_file(tmp_path / "f.npz", 3)
    with pytest.raises(UserError, match="none.npz: it cannot be read"):
        generation.scores_of_file(tmp_path / "none.npz", 3)


@pytest.mark.every_case
@pytest.mark.parametrize("damage", ["empty", "cut off", "no archive"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, made=np.ones((4, 2)), real=np.ones((4, 2)), step=3)
    whole = path.read_bytes()
    if damage == "no archive":
        np.save(tmp_path / "f.npy", np.ones((4, 2)))
        path = tmp_path / "f.npy"
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut off" else b"")
    with pytest.raises(UserError, match="it cannot be read as .npz"):
        generation.scores_of_file(path, 3)


def test_one_feature_has_a_distance_too(tmp_path):
    """Of two normal distributions on a line: the means' and the deviations' distance, squared."""
    path = tmp_path / "f.npz"
    made, real = np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])
    np.savez(path, made=made, real=real, step=3)
    found = generation.scores_of_file(path, 3)["fid"]
    assert found == pytest.approx(4**2 + (np.std(real, ddof=1) - np.std(made, ddof=1)) ** 2)


@pytest.mark.slow
def test_a_run_is_judged_by_a_classifier_and_by_a_file(tmp_path):
    classifier, workdir = tmp_path / "classifier", tmp_path / "run"
    lenet = dict(layers=(), model=configs.model("lenet", width=0.25), train__epochs=1.0)
    training.train(tiny_classifier(**lenet), classifier)
    config = tiny()
    config.generation.features = str(classifier)
    config.generation.samples, config.generation.grid = 50, 3
    config.evaluate.batch_size = 32
    config.train.epochs = 2.0
    config.log.tensorboard = False
    result = training.train(config, workdir)
    assert result["features"] == str(classifier) and 1 <= result["test/is"] <= 10
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum("test/fid" in line for line in lines) == 2
    for step in (2, 4):
        with Image.open(workdir / "plots" / f"samples-{step}.png") as picture:
            assert picture.size == (24, 24)

    run = experiment.build(config, data.load(config.data, config.task))
    state = workdirs.restore_for_evaluation(run, workdir, "newest")
    path = generation.write_samples(run, state, tmp_path)
    with np.load(path) as file:
        images = file["images"]
        assert int(file["step"]) == 4 and images.dtype == np.uint8
    assert images.shape == (50, 8, 8, 1)
    assert np.all(images[:32] == np.asarray(next(generation.Sampler(run)(state))[0]))

    # The same by the classifier itself and NumPy: what its head reads, and what that gives.
    saved = workdirs.read_config("", classifier)
    of_digits = experiment.build(saved, data.load(saved.data), training=False)
    net = workdirs.restore_for_evaluation(of_digits, classifier, "newest").net
    model = nnx.merge(of_digits.graph, net["params"], net["stats"])
    model.eval()

    def features(pixels):
        x = data.normalise(pixels, of_digits.dataset.info)
        for conv in (model.conv1, model.conv2):
            y = nnx.relu(conv(x))
            x = np.asarray(y).reshape(len(y), y.shape[1] // 2, 2, y.shape[2] // 2, 2, -1)
            x = x.max(axis=(2, 4))
        x = nnx.relu(model.hidden(x.reshape(len(x), -1)))
        return np.asarray(x, np.float64), np.asarray(model.head(x), np.float64)

    real, _ = features(run.dataset.test.resident["image"][:40])
    made, logits = features(images)
    file = tmp_path / "features.npz"
    np.savez(file, made=made, real=real, logits=logits, step=4)
    by_file = generation.scores_of_file(file, 4)
    # float32 through a net of four layers.
    assert result["test/fid"] == pytest.approx(by_file["fid"], rel=1e-3, abs=1e-3)
    assert result["test/is"] == pytest.approx(by_file["is"], rel=1e-4)

    config.generation.features = f"file:{file}"
    evaluation.evaluate(config, workdir, workdir, "newest")
    saved = json.loads((workdir / "eval.json").read_text())
    assert saved["test/fid"] == by_file["fid"] and saved["features"] == f"file:{file}"
    config.generation.features = str(workdir)
    with pytest.raises(UserError, match="it holds a run of task='generation'"):
        evaluation.evaluators(run_of(config))


def run_of(config):
    return experiment.build(config, data.load(config.data, config.task))
