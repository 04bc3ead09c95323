"""A net in float and then the rounded one from its weights, in one command."""

import json

import jax
import numpy as np
import pytest

from efficient_nets import config as configs
from efficient_nets import conversion, data, experiment, pretraining, recipes, workdirs
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.ops import factorization
from tests.train_test import metrics, tiny

ROUNDED = (
    dict(match="conv2", kernel="dense", precision="lsq:w2a2"),
    dict(match="head|hidden", precision="w=dorefa:4,a=pact:4"),
)


def two_runs(**changes):
    small = configs.model("lenet", width=0.25)
    config = tiny(model=small, layers=ROUNDED, train__epochs=1.0, pretrain__epochs=2.0, **changes)
    config.optimizer.rules = (
        dict(match=r"ranges/.*/alpha$", weight_decay=1e-3),
        *config.optimizer.rules,
    )
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("both")
    training.train(two_runs(teacher__checkpoint="pretrain"), workdir)
    return workdir


def test_both_runs_end_and_the_second_starts_from_the_first(workdir):
    results = [json.loads((f / "result.json").read_text()) for f in (workdir / "float", workdir)]
    assert [result["steps"] for result in results] == [10, 5]
    first = [line for line in metrics(workdir) if line["step"] == 0]
    assert "test/accuracy" in first[0]  # of the net that training starts from
    config = two_runs()
    run = experiment.build(config, data.load(config.data))
    state = workdirs.warm_start(run, run.initial_state(), workdir / "float")
    plain = pretraining.float_config(config)
    source = experiment.build(plain, data.load(plain.data))
    saved = workdirs.restore_for_evaluation(source, workdir / "float", "newest")
    for path in (("conv1",), ("hidden",)):
        here, there = state.params, saved.params
        for name in (*path, "w"):
            here, there = here[name], there[name]
        jax.tree.map(np.testing.assert_array_equal, here, there)


def test_the_net_in_float_taught_the_rounded_one(workdir):
    assert "train/distillation_loss" in (workdir / "metrics.jsonl").read_text()
    assert "train/distillation_loss" not in (workdir / "float" / "metrics.jsonl").read_text()


def test_the_same_command_again_trains_nothing_anew(workdir):
    before = (workdir / "float" / "result.json").stat().st_mtime_ns
    lines = len(metrics(workdir))
    training.train(two_runs(teacher__checkpoint="pretrain"), workdir)
    assert (workdir / "float" / "result.json").stat().st_mtime_ns == before
    assert len([line for line in metrics(workdir)[lines:] if "train/loss" in line]) == 0


def test_the_first_run_is_the_config_s_but_for_what_the_second_alone_has():
    config = two_runs(schedule__name="multistep", schedule__milestones=(0.25, 0.5))
    plain = pretraining.float_config(config)
    assert plain.layers == (dict(match="conv2", kernel="dense"), dict(match="head|hidden"))
    assert plain.optimizer.rules == config.optimizer.rules[1:]
    assert plain.schedule.milestones == (0.5, 1.0) and plain.train.epochs == 2.0
    assert plain.optimizer.learning_rate == 0.1 and plain.pretrain.epochs == 0
    assert configs.to_json(config) == configs.to_json(
        two_runs(schedule__name="multistep", schedule__milestones=(0.25, 0.5))
    )


@pytest.mark.parametrize(
    "preset, precision, activation",
    [
        ("bireal", "bireal", "hard_tanh"),
        ("bireal", "lsq:w2a2", "none"),
        ("torchvision", "bireal", "relu"),
    ],
)
def test_a_net_of_signs_is_not_linear_in_float(preset, precision, activation):
    config = tiny(
        model=configs.model("resnet", preset=preset, blocks=(1, 1, 1), width=0.25),
        layers=(dict(match="conv", precision=precision),),
        pretrain__epochs=1.0,
    )
    assert pretraining.float_config(config).model.activation == activation


TILED = (
    dict(match="conv1", algorithm="winograd:2,flex", kernel="dense"),
    dict(match="conv2", algorithm="winograd:2", precision="minmax:w8a8si8t8o8s"),
    dict(match="hidden", precision=dict(kernel=dict(method="lsq", bits=4))),
)


@pytest.mark.parametrize("keeps", [False, True])
def test_the_first_run_is_direct(keeps):
    changes = dict(layers=TILED, pretrain__epochs=1.0, pretrain__keep_precision=keeps)
    plain = pretraining.float_config(tiny(model=configs.model("lenet", width=0.25), **changes))
    configs.check(plain)
    kept = (dict(precision="minmax:w8a8so8s"), dict(precision=TILED[2]["precision"]))
    conv2, hidden = kept if keeps else ({}, {})
    assert [dict(rule) for rule in plain.layers] == [
        dict(match="conv1", kernel="dense"),
        dict(match="conv2") | conv2,
        dict(match="hidden") | hidden,
    ]
    assert plain.pretrain == configs.defaults().pretrain


def test_the_tap_form_keeps_what_is_around_the_transforms():
    rules = recipes.winograd("tap", bits=4)
    config = tiny(
        model=configs.model("resnet:winograd", blocks=(1, 1, 1, 1), width=0.0625),
        **dict(layers=rules, pretrain__epochs=1.0, pretrain__keep_precision=True),
    )
    tiled, _ = pretraining.float_config(config).layers
    assert tiled["precision"].keys() == {"kernel", "input", "output"}


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [False, True])
def test_a_tiled_net_starts_from_the_direct_one(keeps, tmp_path, caplog):
    small = configs.model("lenet", width=0.125)
    config = tiny(
        **dict(model=small, layers=TILED, train__epochs=1.0),
        **dict(pretrain__epochs=1.0, pretrain__keep_precision=keeps),
    )
    training.train(config, tmp_path)
    run = experiment.build(config, data.load(config.data))
    fresh = run.initial_state()
    state = workdirs.warm_start(run, fresh, tmp_path / "float")
    assert "starts fresh" not in caplog.text
    plain = pretraining.float_config(config)
    source = experiment.build(plain, data.load(plain.data))
    saved = workdirs.restore_for_evaluation(source, tmp_path / "float", "newest")
    jax.tree.map(
        np.testing.assert_array_equal, state.params["conv1"]["w"], saved.params["conv1"]["w"]
    )
    for name, matrix in state.params["conv1"]["transforms"].items():
        np.testing.assert_array_equal(matrix, fresh.params["conv1"]["transforms"][name])


def test_a_factorized_net_starts_from_the_cores_of_the_dense_one(tmp_path):
    # What else has a start has it in the first run, and is not drawn anew.
    other = dict(match="hidden", neuron="ours", start="variance")
    layers = (dict(match="conv2", kernel="tucker:0.4", start="kept"), other)
    small = configs.model("lenet", width=0.25)
    config = tiny(model=small, layers=layers, train__epochs=0.2, pretrain__epochs=0.2)
    assert pretraining.float_config(config).layers == (dict(match="conv2"), other)
    training.train(config, tmp_path)
    run = experiment.build(config, data.load(config.data))
    state = conversion.converted_start(run, run.initial_state(), tmp_path / "float")
    plain = pretraining.float_config(config)
    source = experiment.build(plain, data.load(plain.data))
    dense = workdirs.restore_for_evaluation(source, tmp_path / "float", "newest").params
    network = factorization.parse("tucker:0.4").network(dense["conv2"]["w"]["kernel"].shape)
    cores = state.params["conv2"]["w"]["kernel"]
    found = factorization.relative_error(network, cores, dense["conv2"]["w"]["kernel"])
    assert 0 < found < 0.9
    expected = factorization.decompose("tucker", network, dense["conv2"]["w"]["kernel"])
    # Vectors may change sign from one program to another; what they make does not.
    np.testing.assert_allclose(
        factorization.reconstruct(network, cores),
        factorization.reconstruct(network, expected),
        atol=1e-4,
    )
    for name in ("conv1", "hidden"):
        jax.tree.map(np.testing.assert_array_equal, state.params[name], dense[name])


def test_a_net_in_float_of_another_config_is_not_taken(workdir):
    plain = pretraining.float_config(two_runs())
    assert pretraining.is_done(workdir / "float", plain)
    plain.optimizer.weight_decay = 1e-3
    assert not pretraining.is_done(workdir / "float", plain)
    with pytest.raises(UserError, match="optimizer.weight_decay: there 0.0, here 0.001"):
        training.train(plain, workdir / "float")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(pretrain__epochs=1.0),
            "pretrain.epochs=1.0: no rule of layers has a precision or an algorithm, or st",
        ),
        (dict(pretrain__learning_rate=0.2), "pretrain.epochs=0: then the other fields"),
        (dict(pretrain__keep_precision=True), "pretrain.epochs=0: then the other fields"),
        (
            dict(pretrain__epochs=1.0, pretrain__keep_precision=True, layers=ROUNDED),
            "pretrain.keep_precision=True: no rule of layers has an algorithm",
        ),
        (
            dict(pretrain__epochs=1.0, layers=(dict(match="conv", algorithm="direct"),)),
            "pretrain.epochs=1.0: no rule of layers has a precision or an algorithm, or st",
        ),
        (
            dict(pretrain__epochs=1.0, checkpoint__init_from="x"),
            "checkpoint.init_from and pretrain.epochs: give one of them",
        ),
        (
            dict(pretrain__epochs=1.0, calibration__batch_size=0),
            "calibration.batch_size=0: the net",
        ),
        (dict(pretrain__epochs=1.0, builder__budget="params"), "runs of its own"),
    ],
)
def test_what_cannot_be(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        training.train(tiny(**changes), tmp_path)
