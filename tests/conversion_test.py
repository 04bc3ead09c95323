"""A trained linear net becomes a quadratic one that computes the same, and trains on."""

import contextlib
import json

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import conversion, data, evaluation, experiment, paths, workdirs
from efficient_nets import train as training
from efficient_nets.checkpoint import Checkpoints
from efficient_nets.errors import UserError
from efficient_nets.models import cells
from tests import tiny_config

QUADRATIC = (dict(match=r"stage3.*conv\d", neuron="ours", start="relinear"),)


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
    block = state.params["stage3"][0]["conv1"]
    np.testing.assert_array_equal(
        block["c"]["kernel"], saved.params["stage3"][0]["conv1"]["w"]["kernel"]
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
    assert len(peaks) == 2 and "stage3.0.conv1/product_max" in peaks  # the quadratic layers
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
    folder.mkdir()
    save_net(folder, config_of((dict(match="stem", neuron="ours"),)))
    config = config_of((dict(match="head", neuron="ours"),), convert_from=str(folder))
    with pytest.raises(UserError, match=r"layer stem of the converted net is \('ours'.*name the"):
        training.train(config, tmp_path / "new")


def test_the_layer_that_overflows_is_named(tmp_path):
    config = config_of((dict(match=r"stage1/0/conv1", neuron="ours"),))
    config.log.products = True
    config.optimizer.learning_rate = 1e18
    with pytest.raises(training.TrainingDiverged, match="from layer [a-z0-9.]+ on"):
        training.train(config, tmp_path)


@pytest.mark.slow
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


ARC = "1 0 0 1 0 0 1 1 0 1 1 0"  # an operation of each kind in each cell; the precisions
OWN = ("auxiliary_head", "seed", "calls")
AUXILIARY = "auxiliary_head/project/w/kernel"


def of_cells(arc, **options):
    fields = dict(nodes=1, layers=0, features=2, ops=("conv3", "identity"))
    fields |= dict(precisions=("ternarize", "float"), mix_precision="float")
    config = config_of(())
    config.model = configs.model("cells", arc=arc, **(fields | options))
    return config


@pytest.fixture
def two_cells(monkeypatch):
    """A normal and a reduction cell on one device: what is slow here is compiling."""
    monkeypatch.setattr(cells, "reduction_places", lambda layers, reductions: (1,))
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])


def save_net(folder, config):
    """A workdir of random weights, and of what a search saves beside them."""
    info, draws = data.describe(config.data), np.random.default_rng(0)
    _, params, stats = nnx.split(experiment.abstract_model(config, info), nnx.Param, ...)
    net = {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}
    net = jax.tree.map(lambda x: draws.uniform(0, 9, x.shape).astype(x.dtype), net)
    (folder / "config.json").write_text(configs.to_json(config))
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        state = jax.device_put(net | {"strategy": {"logits": np.ones(3, np.float32)}})
        checkpoints.save(7, state, meta={}, metrics=None)


def started(folder, config):
    """By path, what `cells.extract` makes of the net in the folder, and what the run starts from.

    Both without what is a run's own.
    """
    config.checkpoint.convert_from = str(folder)
    run = experiment.build(config, data.load(config.data))
    state = conversion.converted_start(run, run.abstract)
    state = {"params": state.params, "stats": state.stats}
    like = {"params": run.abstract.params, "stats": run.abstract.stats}
    assert jax.tree.structure(state) == jax.tree.structure(like)
    graph, found = workdirs.trained_net("", folder, workdirs.read_config("", folder), run)
    found, state = jax.device_get((found, state))
    net = nnx.merge(graph, found["params"], found["stats"])
    net = cells.extract(net, net.space.parse(config.model.arc))
    expected = paths.named_leaves(nnx.to_pure_dict(nnx.state(net)))
    return expected, paths.named_leaves(state["params"]) | paths.named_leaves(state["stats"])


def without_own(leaves):
    return {path: leaf for path, leaf in leaves.items() if path.split("/")[0] not in OWN}


def test_a_net_of_one_architecture_starts_from_the_shared_net(two_cells, tmp_path, caplog):
    """One without drop-path, and with an auxiliary head, which the shared net has not."""
    save_net(tmp_path, of_cells("", drop_path=0.2))
    config = of_cells(ARC, auxiliary=0.4)
    config.layers = (
        dict(match="^head$", neuron="ours", start="relinear"),
        dict(match="^auxiliary_head/head$", neuron="t3"),
    )
    expected, found = started(tmp_path, config)
    assert found.keys().isdisjoint(("seed", "calls"))
    assert np.std(found[AUXILIARY]) > 0 and "auxiliary_head/head/a/kernel" in found
    assert "is a shared net" in caplog.text and "calibration.norm_batches" in caplog.text
    expected, found = without_own(expected), without_own(found)
    for path, leaf in expected.items():
        now = path.replace("head/w/", "head/c/")
        np.testing.assert_array_equal(found.pop(now), leaf, err_msg=path)
    assert all(path.startswith(("head/a/", "head/b/")) for path in found)


@pytest.mark.slow
@pytest.mark.parametrize("auxiliary", [0.0, 0.2])
def test_an_auxiliary_head_stays_or_goes_and_drop_path_begins_anew(two_cells, tmp_path, auxiliary):
    save_net(tmp_path, of_cells("", auxiliary=0.4, drop_path=0.2, drop_path_steps=3))
    config = of_cells(ARC, auxiliary=auxiliary, drop_path=0.1)
    expected, found = started(tmp_path, config)
    assert found["calls"] == 0 < expected["calls"]
    assert not np.array_equal(found["seed"], expected["seed"])
    assert (AUXILIARY in found) == bool(auxiliary) and AUXILIARY in expected
    for path in found.keys() - {"seed", "calls"}:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    assert without_own(found).keys() == without_own(expected).keys()


@pytest.mark.slow
def test_a_net_starts_from_a_shared_net_that_was_trained(two_cells, tmp_path, caplog):
    source = of_cells("")
    source.train.epochs = 0.4  # two steps
    source.train.ema = 0.5
    training.train(source, tmp_path / "shared")
    config = of_cells(ARC)
    config.calibration.norm_batches = 2
    expected, found = started(tmp_path / "shared", config)
    assert found.keys() == expected.keys() and "is a shared net" not in caplog.text
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    result = training.train(config, tmp_path / "fixed")
    assert result["steps"] == 5


def test_a_shared_net_of_another_space_is_refused(two_cells, tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(of_cells("", width=0.5)))
    config = of_cells(ARC, precisions=("ternarize", "binarize"), auxiliary=0.4)
    says = r"is of another model \(precisions: there \('ternarize', 'float'\), here \('ternarize', "
    says += r"'binarize'\); width: there 0.5, here 1.0\)"
    with pytest.raises(UserError, match=says):
        started(tmp_path, config)
