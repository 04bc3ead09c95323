"""A trained linear net becomes a quadratic one that computes the same, and trains on."""

import json

import jax
import numpy as np
import pytest

from efficient_nets import conversion, data, evaluation, experiment, workdirs
from efficient_nets import train as training
from efficient_nets.errors import UserError
from tests import tiny_config

QUADRATIC = (dict(match=r"stage.*conv\d", neuron="ours", start="relinear"),)


def config_of(layers, **checkpoint):
    config = tiny_config.get_config()
    config.layers = layers
    config.train.epochs = 1.0
    config.checkpoint.update(checkpoint)
    return config


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("linear")
    return workdir, training.train(config_of(()), workdir)


def scores(run, state):
    return evaluation.evaluate_all(evaluation.evaluators(run), state)


def test_a_converted_net_starts_with_the_linear_nets_scores(linear):
    folder, result = linear
    config = config_of(QUADRATIC, convert_from=str(folder))
    run = experiment.build(config, data.load(config.data))
    state = conversion.converted_start(run, run.initial_state())
    assert jax.tree.structure(state) == jax.tree.structure(run.abstract)
    assert int(state.step) == 0
    found = scores(run, state)
    assert found["test/accuracy"] == result["test/accuracy"]
    # Rounding of float32: XLA may sum a branch's convolution in another order beside others.
    np.testing.assert_allclose(found["test/loss"], result["test/loss"], rtol=1e-4)
    saved = workdirs.restore_for_evaluation(
        experiment.build(config_of(()), run.dataset), folder, "newest"
    )
    block = state.params["stage1"][0]["conv1"]
    np.testing.assert_array_equal(
        block["c"]["kernel"], saved.params["stage1"][0]["conv1"]["w"]["kernel"]
    )
    assert not np.any(block["b"]["kernel"]) and np.any(block["a"]["kernel"])


def test_it_trains_and_resumes_without_converting_again(linear, tmp_path):
    config = config_of(QUADRATIC, convert_from=str(linear[0]), every_epochs=0.4)
    config.log.products = True
    config.optimizer.learning_rate = 0.01
    result = training.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and lines[0]["test/accuracy"] == linear[1]["test/accuracy"]
    peaks = {name: x for name, x in lines[1].items() if name.endswith("/product_max")}
    assert len(peaks) == 6 and "stage1.0.conv1/product_max" in peaks  # the quadratic layers
    assert all(np.isfinite(x) and x > 0 for x in peaks.values())
    assert (tmp_path / "plots" / "product_max.png").exists()
    config.checkpoint.convert_from = str(tmp_path / "gone")
    (tmp_path / "config.json").unlink()
    again = training.train(config, tmp_path)
    assert again["params_digest"] == result["params_digest"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(convert_from="/nowhere"), "convert_from=/nowhere: it is no workdir"),
        (dict(init_from="a", convert_from="b"), "give one of them"),
    ],
)
def test_bad_folders(change, says, tmp_path):
    with pytest.raises(UserError, match=says):
        training.train(config_of(QUADRATIC, **change), tmp_path)


def test_another_model_is_refused(linear, tmp_path):
    config = config_of(QUADRATIC, convert_from=str(linear[0]))
    config.model.width = 0.5
    with pytest.raises(UserError, match=r"another model \(width: there 0.25, here 0.5\)"):
        training.train(config, tmp_path)


def test_rules_that_lean_on_the_other_nets_are_refused(linear, tmp_path):
    """A net that is quadratic already, and rules that leave that open."""
    folder = tmp_path / "quadratic"
    training.train(config_of((dict(match="stem", neuron="ours"),)), folder)
    config = config_of((dict(match="head", neuron="ours"),), convert_from=str(folder))
    with pytest.raises(UserError, match=r"layer stem of the converted net is \('ours'.*name the"):
        training.train(config, tmp_path / "new")


def test_the_layer_that_overflows_is_named(tmp_path):
    config = config_of((dict(match=r"stage1/0/conv1", neuron="ours"),))
    config.log.products = True
    config.optimizer.learning_rate = 1e18
    with pytest.raises(training.TrainingDiverged, match="from layer [a-z0-9.]+ on"):
        training.train(config, tmp_path)


def test_a_net_with_layers_removed_goes_on_as_a_quadratic_one(tmp_path):
    """Identities and adapters stay, trained as they are; rules that removed them may stay too."""
    remove = tuple(
        dict(match=f"^{path}$", remove=True) for path in ("stage1/0/conv2", "stage2/0/conv1")
    )
    folder = tmp_path / "reduced"
    reduced = training.train(config_of(remove), folder)
    config = config_of((*remove, *QUADRATIC), convert_from=str(folder))
    run = experiment.build(config, data.load(config.data))
    state = conversion.converted_start(run, run.initial_state())
    assert scores(run, state)["test/accuracy"] == reduced["test/accuracy"]
    with pytest.raises(UserError, match=r"layer stage1/0/conv2 of the converted net is None"):
        training.train(config_of(QUADRATIC, convert_from=str(folder)), tmp_path / "new")
