"""`--mode=deploy`: rounding after training, and nets that were trained rounded."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_nets import data, deployment, experiment, inspection, layers
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm
from tests.train_test import tiny

ROUNDED = (dict(match=r"conv\d|shortcut$", precision="minmax:w8a8"),)


def config_of(rules=ROUNDED, **changes):
    return tiny(layers=rules, **dict(train__epochs=1.0) | changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trained net, nothing rounded."""
    workdir = tmp_path_factory.mktemp("plain")
    training.train(config_of((), train__epochs=8.0), workdir)
    # As a run would be that is older than these fields.
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    del config["deploy"], config["calibration"]["norm_batches"]
    path.write_text(json.dumps(config))
    return workdir


def deployed(config, workdir, folder=None, which="newest"):
    return deployment.make_deployable(config, workdir, folder or workdir, which)


def outputs(config, workdir):
    run = experiment.build(config, data.load(config.data), training=False)
    images, _ = inspection.first_batch(run)
    return deployment.load(config, workdir), images


def norms(net):
    return [norm for _, norm in nnx.iter_graph(net) if isinstance(norm, BatchNorm)]


@pytest.mark.slow
def test_rounding_after_training(plain, tmp_path, capsys):
    config = config_of(checkpoint__convert_from=str(plain), deploy__bias_correction=60)
    result = deployed(config, tmp_path)
    assert (result["fold"], result["corrected"], result["norms_left"]) == ("before", True, {})
    trained = json.loads((plain / "result.json").read_text())
    scores = result["scores"]
    for name in ("test/accuracy", "test/loss"):
        # The same net; rounding of float32 on eight devices.
        np.testing.assert_allclose(scores["float"][name], trained[name], rtol=1e-4)
    for name in ("rounded", "integer"):  # 100 images; steps of a 255th of each range
        assert abs(scores[name]["test/accuracy"] - trained["test/accuracy"]) <= 0.03
        np.testing.assert_allclose(scores[name]["test/loss"], trained["test/loss"], rtol=0.02)
        drop = scores["float"]["test/accuracy"] - scores[name]["test/accuracy"]
        assert result["drops"][name]["test/accuracy"] == drop
    size = (tmp_path / "net.safetensors").stat().st_size
    assert result["file_bytes"] == size
    assert result["packed_bytes"] < size < result["float_bytes"]
    assert json.loads((tmp_path / "deploy.json").read_text()) == result
    out = capsys.readouterr().out
    assert f"{size:,} bytes" in out and "whole numbers" in out

    net, images = outputs(config, tmp_path)
    assert not norms(net) and net.stage1[0].conv1.w.kernel.dtype == np.int8
    with pytest.raises(UserError, match=r"is of another net"):
        deployment.load(config_of((dict(match="head", precision="minmax:w8a8"),)), tmp_path)


@pytest.mark.slow
def test_biases_are_corrected_with_norms_and_without(plain, tmp_path):
    nets = {}
    for fold, images in ((True, 0), (True, 60), (False, 60)):
        config = config_of(checkpoint__convert_from=str(plain), deploy__bias_correction=images)
        config.deploy.fold = fold
        folder = tmp_path / f"{fold}{images}"
        result = deployed(config, folder)
        assert (result["fold"], result["corrected"]) == ("before" if fold else "not", images > 0)
        nets[fold, images] = outputs(config, folder)[0]
    kept = nets[False, 60]
    assert len(norms(kept)) == 9 and np.any(kept.stem.w.bias[...] == 0)  # the stem is not rounded
    assert np.any(kept.stage1[0].conv1.w.bias[...])
    changed = {
        path
        for (path, layer), (_, old) in zip(
            *(layers.layers(nets[True, images]) for images in (60, 0)), strict=True
        )
        if np.any(layer.w.bias[...] != old.w.bias[...])
    }
    assert {"stage1/0/conv1", "stage3/0/shortcut", "head"} <= changed


@pytest.mark.slow
def test_norms_that_were_recalibrated_fold_after_rounding(plain, tmp_path):
    config = config_of(checkpoint__convert_from=str(plain), calibration__norm_batches=3)
    result = deployed(config, tmp_path)
    assert (result["fold"], result["corrected"]) == ("after", False)
    net, images = outputs(config, tmp_path)
    assert not norms(net)
    # One scale for each feature, of one step for all.
    assert net.stage1[0].conv1.ranges["w"].scale.shape == (1, 1, 1, 4)
    assert abs(result["drops"]["integer"]["test/accuracy"]) <= 0.1
    config.deploy.fold = False
    result = deployed(config, tmp_path / "kept")
    assert result["fold"] == "not"
    kept, _ = outputs(config, tmp_path / "kept")
    assert len(norms(kept)) == 9
    # A code of 8 bits that moves over is a 255th of a range.
    expected, found = jax.jit(lambda x: (kept(x), net(x)))(images)
    np.testing.assert_allclose(found, expected, atol=0.05 * np.max(np.abs(expected)))


@pytest.mark.slow
def test_a_net_that_was_trained_rounded(plain, tmp_path):
    config = config_of(checkpoint__init_from=str(plain), optimizer__learning_rate=1e-4)
    trained = training.train(config, tmp_path)
    result = deployed(config, tmp_path / "new", tmp_path, "best")
    assert result["fold"] == "after" and result["source"] == str(plain)
    accuracy = trained["test/accuracy"]
    assert abs(result["scores"]["rounded"]["test/accuracy"] - accuracy) <= 0.01
    assert abs(result["scores"]["integer"]["test/accuracy"] - accuracy) <= 0.02
    net, _ = outputs(config, tmp_path / "new")
    assert not norms(net)
    with pytest.raises(UserError, match="bias_correction=8: .* trained rounded"):
        deployed(config_of(deploy__bias_correction=8), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rules=()), "config.layers rounds nothing"),
        ({}, "holds no checkpoint, and checkpoint.convert_from=''"),
        (dict(calibration__batch_size=0), "calibration.batch_size=0: .* from images"),
        (
            dict(calibration__norm_batches=1, deploy__bias_correction=8),
            "norm_batches and deploy.bias_correction undo the same",
        ),
    ],
)
def test_what_cannot_be_deployed(plain, tmp_path, changes, says):
    if "calibration__batch_size" in changes or "calibration__norm_batches" in changes:
        changes = changes | dict(checkpoint__convert_from=str(plain))
    with pytest.raises(UserError, match=says):
        deployed(config_of(**changes), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_step_needs_a_checkpoint(plain, tmp_path):
    config = config_of(checkpoint__convert_from=str(plain))
    with pytest.raises(UserError, match="holds no checkpoint"):
        deployed(config, tmp_path, which="best")
    with pytest.raises(UserError, match="holds no deploy.json"):
        deployment.load(config, tmp_path)


@pytest.mark.slow
def test_the_net_in_float_of_a_run_of_two_is_where_it_came_from(tmp_path):
    config = config_of(pretrain__epochs=1.0)
    training.train(config, tmp_path)
    result = deployed(config, tmp_path)
    assert result["source"] == str(tmp_path / "float")
    before = json.loads((tmp_path / "float" / "result.json").read_text())
    assert result["scores"]["float"]["test/accuracy"] == before["test/accuracy"]
