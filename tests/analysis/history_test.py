"""Weights, activations and gradients over training: what a run writes, again after a kill."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets import analysis, data, experiment, inspection, tasks
from efficient_nets import train as training
from efficient_nets.analysis import history
from efficient_nets.tasks.classification import Classification
from tests import tiny_config


def config_of(every_epochs):
    """Six steps, evaluated and saved every second one."""
    config = tiny_config.get_config()
    config.log.histograms_every_epochs = every_epochs
    config.train.epochs = 1.2
    config.evaluate.every_epochs = config.checkpoint.every_epochs = 0.4
    return config


def files(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "histograms").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every third step, for which there is no evaluation at step 3."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, training.train(config_of(0.6), workdir)


@pytest.mark.slow
def test_a_run_writes_them_at_both_ends_and_at_the_first_evaluation_of_a_period(whole):
    assert sorted(files(whole[0])) == ["00000000.npz", "00000004.npz", "00000006.npz"]
    for kind in ("weights", "activations", "gradients"):
        path = whole[0] / "plots" / f"{kind}_over_training.png"
        assert path.stat().st_size > 10_000


@pytest.mark.slow
def test_they_are_of_weights_and_running_statistics(whole):
    found = history.read_history(whole[0])
    steps, kernels = found["params/stage3/0/conv1/a/kernel"]
    assert steps == [0, 4, 6] and {kernel.counts.sum() for kernel in kernels} == {9 * 8 * 16}
    _, means = found["stats/stem_norm/mean"]
    assert (means[0].mean, means[0].std) == (0, 0) and means[2].std > 0


@pytest.mark.slow
def test_activations_and_gradients_are_those_of_the_first_images(whole):
    """At the last step, of the parameters themselves."""
    run = experiment.build(config_of(0.6), data.load(config_of(0.6).data))
    net, step = inspection.restored_net(run, whole[0], "newest")
    images, labels = inspection.first_batch(run)
    assert (step, images.shape) == (6, (32, 8, 8, 1))
    found = history.read_history(whole[0])
    expected = analysis.batch_histograms(net, images, labels, run.task.label_loss)
    assert {"activations/head", "gradients/stage3/0/conv2/b"} <= expected.keys()
    for name, histogram in expected.items():
        steps, histograms = found.pop(name)
        assert steps == [0, 4, 6] and histograms[0].std < 10
        np.testing.assert_array_equal(histograms[-1].counts, histogram.counts)
        np.testing.assert_array_equal(histograms[-1].edges, histogram.edges)
    assert {name.partition("/")[0] for name in found} == {"params", "stats"}


@pytest.mark.slow
def test_all_steps_of_a_run_share_what_is_compiled(tmp_path, monkeypatch):
    traced = []

    class Counted(Classification):
        def label_loss(self, logits, labels):
            traced.append(logits.shape)
            return super().label_loss(logits, labels)

    monkeypatch.setitem(tasks.TASKS, "classification", Counted)
    config = config_of(0.6)
    config.evaluate.batch_size = 100
    training.train(config, tmp_path)
    assert traced == [(64, 10)]  # no more images than that


def test_without_held_out_images_there_are_weights_alone(tmp_path):
    config = config_of(0.6)
    run = experiment.build(config, dataclasses.replace(data.load(config.data), test=None))
    assert training._histogram_batch(run) is None
    assert training._histogram_batch(experiment.build(config_of(0.0), run.dataset)) is None


@pytest.mark.slow
def test_they_change_no_step(whole, tmp_path):
    assert training.train(config_of(0.0), tmp_path)["params_digest"] == whole[1]["params_digest"]
    assert not (tmp_path / "histograms").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_writes_the_same(whole, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    class Dies(training.Checkpoints):
        def save(self, step, *args, **kwargs):
            super().save(step, *args, **kwargs)
            self.wait()
            if step == 4:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "Checkpoints", Dies)
        with pytest.raises(Killed):
            training.train(config_of(0.6), tmp_path)
    training.train(config_of(0.6), tmp_path)
    assert files(tmp_path) == files(whole[0])


def test_what_is_saved_is_read(tmp_path):
    arrays = {"a": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}, "count": jnp.zeros(3, jnp.int32)}
    found = analysis.histograms_of({"params": arrays})
    assert list(found) == ["params/a/kernel"]  # no integers
    analysis.save_histograms(tmp_path, 3, found)
    ((name, (steps, (read,))),) = history.read_history(tmp_path).items()
    assert (name, steps, read.mean, read.nonfinite) == ("params/a/kernel", [3], 1, 0)
    np.testing.assert_array_equal(read.counts, found[name].counts)


def test_no_histograms_no_picture(tmp_path):
    assert analysis.plot_history(tmp_path) == []
