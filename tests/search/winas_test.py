"""wiNAS on a handful of digits: what moves in which step, and what a search ends in."""

import functools
import json
import math
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import data, evaluation, experiment, layers, paths
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.ops import precision, winograd
from efficient_nets.search import candidates, costs, winas

# ml_collections reads a config file in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CANDIDATES = (
    dict(algorithm="direct", precision="float"),
    dict(algorithm="winograd:2,flex", precision="minmax:w8i8"),  # few sites: compiling is slow
    dict(algorithm="direct", precision="lsq:w4a4s"),
)
LAYERS = ["conv1", "conv2"]


def tiny_config(**fields):
    config = configs.defaults()
    config.model = configs.model("lenet", width=0.125)
    config.data.name = "digits"
    config.data.train, config.data.validation = "train[:96]", "train[96:196]"
    config.data.test = "test[:40]"
    config.optimizer.learning_rate = 0.05
    config.train.batch_size, config.evaluate.batch_size = 32, 64
    config.calibration.batch_size = 32
    config.log.every_steps, config.log.tensorboard = 2, False
    config.winas.update(
        dict(
            candidates=CANDIDATES[:2],
            cost="bops",
            epochs=2.0,
            warmup_epochs=1.0,
            learning_rate=0.1,
        )
        | fields
    )
    return config


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("winas")
    programs = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("weight_step", "architecture_step"):
            function = getattr(winas, name)

            def counted(*arguments, function=function, name=name):
                programs.append(name)
                return function(*arguments)

            patch.setattr(winas, name, counted)
        report = winas.build(tiny_config(), workdir)
    return workdir, report, programs


def test_each_kind_of_step_is_compiled_once(built):
    assert sorted(built[2]) == ["architecture_step", "weight_step"]


def test_what_it_leaves_says_it_all(built):
    workdir, report, _ = built
    assert json.loads((workdir / "winas.json").read_text()) == json.loads(json.dumps(report))
    assert list(report["layers"]) == LAYERS
    for layer in report["layers"].values():
        assert sum(layer["probabilities"]) == pytest.approx(1, abs=1e-5)
        best = int(np.argmax(layer["probabilities"]))
        assert layer["chosen"] == report["candidates"][best]
    text = (workdir / "winas.txt").read_text()
    assert all(name in text for name in LAYERS) and "all of them" in text
    assert (workdir / "plots" / "winas.png").stat().st_size > 10_000
    assert [record["epoch"] for record in report["history"]] == [1, 2]
    assert report["history"][0]["entropy"] == pytest.approx(math.log(2))  # of the warm-up
    assert report["history"][1]["entropy"] < math.log(2)
    lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
    assert {"train/loss", "architecture/loss"} <= set().union(*lines)
    assert "train/quantization_loss" not in set().union(*lines)  # as no candidate has one


def test_costs_are_sums_by_hand(built):
    """Of 5x5 kernels on 8x8 and 4x4 pixels; F(2,5) multiplies 36 times for 4 * 25."""
    _, report, _ = built
    products = {"conv1": 8 * 8 * 25 * 1 * 4, "conv2": 4 * 4 * 25 * 4 * 8}
    own = {name: [n * 32 * 32, n * 36 / 100 * 8 * 8] for name, n in products.items()}
    whole = sum(of_float for of_float, _ in own.values())
    expected = chosen = 0.0
    for name, layer in report["layers"].items():
        np.testing.assert_allclose(layer["costs"], np.array(own[name]) / whole, rtol=1e-12)
        pairs = zip(layer["probabilities"], own[name], strict=True)
        expected += sum(p * cost / whole for p, cost in pairs)
        chosen += own[name][report["candidates"].index(layer["chosen"])] / whole
    assert report["expected_cost"] == pytest.approx(expected, rel=1e-6)
    assert report["history"][-1]["expected_cost"] == pytest.approx(expected, rel=1e-5)
    assert report["chosen_cost"] == pytest.approx(chosen, rel=1e-6)


def test_the_built_config_is_the_chosen_net(built):
    workdir, report, _ = built
    config = runpy.run_path(str(workdir / "built_config.py"))["get_config"]()
    assert config.winas == configs.defaults().winas
    model = experiment.abstract_model(config, data.describe(config.data))
    specs = {path: layer.spec for path, layer in layers.layers(model)}
    for path, layer in report["layers"].items():
        assert specs[path].algorithm == winograd.parse(layer["algorithm"])
        assert specs[path].precision == precision.parse(layer["precision"])
    assert specs["hidden"] == layers.LayerSpec()


@pytest.mark.slow
def test_the_built_config_trains(built, tmp_path):
    config = runpy.run_path(str(built[0] / "built_config.py"))["get_config"]()
    assert training.train(config, tmp_path)["steps"] == 3


@pytest.fixture(scope="module")
def prepared():
    config = tiny_config(candidates=CANDIDATES, cost_weight=0.0)
    found = candidates.of_config(config), candidates.searched(config)
    dataset = data.load(config.data)
    table = costs.costs(config, found[1], found[0])
    return winas.prepare(config, dataset, found[1], found[0], table)


def batch_of(search, split):
    source = getattr(search.run.dataset, split)
    return next(data.train_batches(source, 32, seed=0)), source.resident


def moved(before, after):
    """Names of the arrays that differ."""
    before, after = paths.named_leaves(before), paths.named_leaves(after)
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.slow
def test_a_weight_step_moves_what_is_sampled_and_nothing_else_of_the_candidates(prepared):
    search, state = prepared
    logits = jnp.array([[0.0, 50.0, 0.0], [0.0, 0.0, 50.0]])  # so that it is known
    # As after steps of other candidates: momentum alone would move theirs.
    trace = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state.optimizer)
    state = state._replace(optimizer=trace)
    step = jax.jit(functools.partial(winas.weight_step, search))
    after, _ = step(state, logits, *batch_of(search, "train"))
    names = moved(
        {"params": state.params, "stats": state.stats},
        {"params": after.params, "stats": after.stats},
    )
    of_ways = {name for name in names if "/ways/" in name}
    places = ("conv1/ways/1/", "conv2/ways/2/")
    assert of_ways and all(any(place in name for place in places) for name in of_ways)
    assert any("conv1/ways/1/transforms/G5" in name for name in of_ways)
    assert any("conv1/ways/1/ranges/hadamard" in name for name in of_ways)
    assert any("conv2/ways/2/ranges/input/step" in name for name in of_ways)
    assert {"params/conv1/w/kernel", "params/head/w/kernel"} <= names


@pytest.mark.slow
def test_an_architecture_step_follows_loss_and_cost(prepared):
    """The loss moves the two that were sampled, against each other; the cost moves all, by lambda.

    What the loss does to them is checked in float64 in supernet_test.py.
    """
    search, state = prepared
    logits = jnp.array([[50.0, 0.0, 0.0], [2.0, 1.5, -60.0]])
    gradient = jax.jit(functools.partial(winas.architecture_gradient, search))
    batch, resident = batch_of(search, "validation")
    found, metrics = gradient(logits, state, batch, resident)
    assert metrics["loss"] > 0 and found.shape == (2, 3)
    assert float(jnp.sum(found[1])) == pytest.approx(0, abs=1e-7)
    assert found[1, 2] == 0 and found[1, 0] != 0
    config = search.run.config.copy_and_resolve_references()
    config.winas.cost_weight = 2.0
    run = winas.dataclasses.replace(search.run, config=config)
    other = winas.dataclasses.replace(search, run=run)
    weighted, _ = jax.jit(functools.partial(winas.architecture_gradient, other))(
        logits, state, batch, resident
    )
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    of_cost = p * (search.costs - np.sum(p * search.costs, -1, keepdims=True))
    np.testing.assert_allclose(weighted - found, 2 * of_cost, atol=1e-6)


@pytest.mark.slow
def test_scores_are_those_of_the_net_that_is_built(built, prepared):
    """Of a state that is evaluated by hand as a plain converted net."""
    search, state = prepared
    chosen = dict(zip(LAYERS, (1, 2), strict=True))
    config = tiny_config()
    fields = {path: CANDIDATES[index] for path, index in chosen.items()}
    built_config = candidates.with_chosen(config, fields)
    found = winas.scores_of(search, state, built_config, chosen)
    run = experiment.build(built_config, search.run.dataset, training=False)
    model = nnx.merge(run.graph, *run.abstract[2:4])
    params = paths.named_leaves(state.params) | paths.named_leaves(state.stats)
    values = {}
    for name in paths.named_leaves(nnx.to_pure_dict(nnx.state(model))):
        path = next((path for path in LAYERS if name.startswith(f"{path}/")), None)
        inside = path and name.replace(path, f"{path}/ways/{chosen[path]}", 1)
        values[name] = params[name] if name in params else params[inside]
    state = nnx.state(model)
    state = paths.map_named(lambda name, _: values[name], nnx.to_pure_dict(state))
    nnx.update(model, state)
    model.eval()
    source = search.run.dataset.test
    images = data.normalise(jnp.asarray(source.resident["image"]), search.run.dataset.info)
    logits = jax.jit(lambda images: model(images))(images)
    labels = jnp.asarray(source.resident["label"])
    scores = run.task.scores(logits, labels, jnp.ones(len(logits)))
    expected = evaluation.classification.summarise(scores)
    assert found["test/loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["test/accuracy"] == expected["accuracy"]


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(candidates=()), "winas.candidates has 0: it takes two or more"),
        (dict(candidates=CANDIDATES[:1] * 2), "'direct float' is given twice"),
        (dict(candidates=("direct",) * 2), r"candidates\[0\]='direct': give algorithm and"),
        (dict(candidates=(dict(algorithm="direct", precision="lsq"),) * 2), "give bits"),
        (dict(layers="head"), "matches none of the convolutions of several taps"),
        (dict(layers="("), "is no regular expression"),
        (dict(cost="seconds"), "winas.cost='seconds' is not known"),
        (dict(cost="latency"), "give winas.latency"),
        (dict(latency="table.json"), "only winas.cost='latency' reads it"),
        (dict(warmup_epochs=2.0), "must be below winas.epochs"),
        (dict(cost_weight=-1.0), "must be at least 0"),
        (dict(latency_repeats=0), "must be at least 1"),
    ],
)
def test_what_cannot_be(tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        winas.build(tiny_config(**fields), tmp_path)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("data.validation", "", "images that the weights do not see"),
        ("train.ema", 0.9, "train.ema=0.9: a search has none"),
        ("pretrain.epochs", 1.0, "pretrain.epochs=1.0: a search has none"),
    ],
)
def test_what_it_needs(tmp_path, field, value, words):
    config = tiny_config()
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=words):
        winas.build(config, tmp_path)


def test_training_does_not_drop_it_in_silence(command, tmp_path):
    arguments = ("--config=tests/tiny_config.py", f"--workdir={tmp_path}")
    status, _, err = command(*arguments, "--config.winas.epochs=3.0")
    assert status == 2 and "winas: only --mode=search and --mode=latency heed it" in err
