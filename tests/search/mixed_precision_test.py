"""Layers switched alone, a precision for each, and the config that trains it."""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import data, evaluation, experiment, layers, workdirs
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.ops.precision import parse
from efficient_nets.search import mixed_precision, sensitivity
from tests.search.conftest import tiny_config

CHOICES = ("lsq:w2a2", "minmax:w8a8", "float")
NAMES = ["conv1", "conv2"]


def plain_config():
    config = tiny_config()
    config.builder = configs.defaults().builder
    config.layers, config.optimizer.rules = (), ()
    config.train.epochs = 6.0
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    training.train(plain_config(), folder)
    return folder


def mixed_config(trained, **fields):
    config = plain_config()
    config.layers = (dict(match="conv", precision="lsq:w4a4"),)
    config.checkpoint.convert_from = str(trained)
    config.calibration.batch_size = 32
    config.mixed.update(dict(choices=CHOICES, keep=0.8) | fields)
    return config


@pytest.fixture(scope="module")
def built(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mixed")
    return workdir, mixed_precision.build(mixed_config(trained), workdir)


def scores_by_hand(trained, rules):
    """The trained net, rounded by rules alone: no switches."""
    config = plain_config()
    dataset = data.load(config.data)
    run = experiment.build(config, dataset, training=False)
    state = workdirs.restore_for_evaluation(run, trained, "newest")
    model = nnx.merge(run.graph, state.params, state.stats)
    model = layers.convert(model, rules, jax.random.key(0))
    model.eval()
    batch = next(data.train_batches(dataset.train, 32, seed=config.seed))
    images = data.gather(dataset.train.resident, batch)["image"]
    model = layers.calibrate(model, data.normalise(jnp.asarray(images), dataset.info))
    source = dataset.validation.resident
    batches = data.eval_batches(dataset.validation, 100)
    batch = data.gather(source, next(batches))
    batches.close()
    logits = model(data.normalise(jnp.asarray(batch["image"]), dataset.info))
    scores = run.task.scores(logits, jnp.asarray(batch["label"]), jnp.ones(len(logits)))
    return evaluation.classification.summarise(scores)


@pytest.mark.parametrize("choice", CHOICES[:2])
@pytest.mark.parametrize("on", [["conv1"], ["conv2"], NAMES])
def test_a_switched_net_is_the_net_rounded_there_alone(trained, built, choice, on):
    _, report = built
    found = report["all"][choice] if len(on) > 1 else report["layers"][on[0]][choice]
    expected = scores_by_hand(trained, [dict(match="|".join(on), precision=choice)])
    assert found["accuracy"] == expected["accuracy"]
    # Of whole numbers here, of rounded values there; sums of 200 terms.
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_the_float_net_is_the_one_that_was_trained(trained, built):
    _, report = built
    assert report["float"]["loss"] == pytest.approx(scores_by_hand(trained, [])["loss"], rel=1e-5)
    assert report["layers"]["conv1"]["float"] == report["float"]
    assert report["images"] == 100


def test_an_assignment_is_within_the_budget_and_the_best(built):
    _, report = built
    of, costs = report["assignment"], report["costs"]
    assert of["costs"]["packed_bytes"] <= 0.8 * costs["float"]["packed_bytes"]
    others = costs["float"]["packed_bytes"] - sum(
        costs["layers"][name]["float"]["packed_bytes"] for name in NAMES
    )
    totals = {}
    for first in CHOICES:
        for second in CHOICES:
            pair = dict(zip(NAMES, (first, second), strict=True))
            size = others + sum(costs["layers"][n][c]["packed_bytes"] for n, c in pair.items())
            if size <= 0.8 * costs["float"]["packed_bytes"]:
                totals[first, second] = sum(report["layers"][n][c]["loss"] for n, c in pair.items())
    assert tuple(of["layers"][name] for name in NAMES) == min(totals, key=totals.get)


def test_what_it_leaves_says_it_all_and_trains(built, tmp_path):
    workdir, report = built
    assert json.loads((workdir / "sensitivity.json").read_text()) == json.loads(json.dumps(report))
    text = (workdir / "sensitivity.txt").read_text()
    assert text.count("*") == 2 and "all of them" in text and "conv1" in text
    assert (workdir / "plots" / "sensitivity.png").stat().st_size > 10_000
    config = runpy.run_path(str(workdir / "built_config.py"))["get_config"]()
    chosen = report["assignment"]["layers"]
    model = experiment.abstract_model(config, data.describe(config.data))
    found = {path: layer.spec.precision for path, layer in layers.layers(model)}
    assert {name: found[name] for name in NAMES} == {n: parse(chosen[n]) for n in NAMES}
    config.train.epochs = 1.0
    result = training.train(config, tmp_path)
    assert result["steps"] == 3
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    before = report["assignment"]["before_training"]
    assert first["validation/accuracy"] == before["accuracy"]


def test_without_choices_the_config_s_own_precision_is_measured(trained, tmp_path):
    config = mixed_config(trained, choices=(), keep=0.0)
    report = mixed_precision.build(config, tmp_path)
    assert report["choices"] == ["own"] and "assignment" not in report
    expected = scores_by_hand(trained, [dict(match="conv", precision="lsq:w4a4")])
    assert report["all"]["own"]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert not (tmp_path / "built_config.py").exists()


def test_layers_that_are_not_asked_keep_what_the_config_says(trained, tmp_path):
    config = mixed_config(trained, keep=0.0, choices=("lsq:w2a2",), layers="conv2")
    # Its schedule would leave it in float at the start.
    fields = dict(method="minmax", bits=8, float_epochs=1.0)
    scheduled = dict(kernel=fields, input=fields | {"signed": True})
    config.layers = (
        dict(match="conv1", precision=scheduled),
        dict(match="conv2", precision="lsq:w4a4"),
    )
    report = mixed_precision.build(config, tmp_path)
    assert list(report["layers"]) == ["conv2"]
    others = dict(match="conv1", precision="minmax:w8a8s")
    for found, own in (
        (report["float"], []),
        (report["all"]["lsq:w2a2"], [dict(match="conv2", precision="lsq:w2a2")]),
    ):
        expected = scores_by_hand(trained, [others, *own])
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_factors_behind_the_map_are_switched_too():
    """XNOR-Net's K multiplies the output; off, the net is the one in float."""
    conv = layers.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    precision = sensitivity.switchable(parse("xnor"))
    rounded = layers.convert(
        nnx.List([conv]), [dict(match="0", precision=precision)], jax.random.key(0)
    )
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    np.testing.assert_array_equal(rounded[0](x), conv(x))
    for _, found in layers.ranges(rounded):
        found.active[...] = jnp.ones_like(found.active[...])
    assert not np.allclose(rounded[0](x), conv(x))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(keep=0.05), "mixed.keep=0.05 is below what is reachable"),
        (dict(keep=1.5), "mixed.keep=1.5: allowed 0 to below 1"),
        (dict(choices=("lsq:w4a4",)), "it takes two mixed.choices or more"),
        (dict(choices=("lsq:w4a4", "lsq:w4a4")), "one is given twice"),
        (dict(choices=("lsq",)), "give bits"),
        (dict(choices=("float",), keep=0.0), "none of them rounds anything"),
        (dict(layers="dense"), "matches none of the layers that are rounded"),
        (dict(layers="("), "is no regular expression"),
        (dict(choices=(4, 8)), "4 is no short form"),
        (dict(budget="params"), "mixed.budget='params' is not known"),
    ],
)
def test_what_cannot_be(trained, tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        mixed_precision.build(mixed_config(trained, **fields), tmp_path)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("calibration.norm_batches", 2, "whose norms stay as they are; give 0"),
        ("data.validation", "", "layers are switched on held-out images"),
        ("checkpoint.convert_from", "", "give the workdir of the trained net"),
        ("layers", (), "no rule has a precision"),
    ],
)
def test_what_it_needs(trained, tmp_path, field, value, words):
    config = mixed_config(trained)
    *sections, name = field.split(".")
    (config[sections[0]] if sections else config)[name] = value
    with pytest.raises(UserError, match=words):
        mixed_precision.build(config, tmp_path)
