"""`--mode=decompose`: ranks, errors and scores of a trained net's cores, and a config with them."""

import json
import runpy

import pytest

from efficient_nets import config as configs
from efficient_nets import data, experiment, recipes
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.search import decompose
from tests.search.conftest import tiny_config

LAYERS = (
    dict(match="conv1", kernel="tt:16", start="kept"),
    dict(match="conv2", kernel="tucker:evbmf,always", start="kept"),
    dict(match="hidden", kernel="cp:0.3", start="kept"),
)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A dense LeNet, trained for 12 steps."""
    folder = tmp_path_factory.mktemp("dense")
    training.train(plain(), folder)
    return folder


def plain():
    config = tiny_config()
    config.model = configs.model("lenet", width=0.25)
    config.builder = configs.defaults().builder
    config.layers, config.optimizer.rules = (), ()
    return config


def of(net, layers):
    config = plain()
    config.train.epochs, config.layers = 1.0, layers
    config.checkpoint.convert_from = str(net)
    return config


def test_it_reports_and_writes_a_config_that_trains(net, tmp_path):
    report = decompose.build(of(net, layers=LAYERS), tmp_path)
    assert report == json.loads((tmp_path / "decompose.json").read_text())
    assert report["dense"] == ["conv1"]  # 5x5x1x8 numbers, fewer than those cores
    conv2, hidden = report["layers"]["conv2"], report["layers"]["hidden"]
    assert conv2["kernel"].startswith("tucker:") and conv2["kernel"].endswith(",always")
    assert hidden["ranks"] == {"r": 6} and hidden["params"] == 6 * (64 + 32)
    for found in (conv2, hidden):
        errors = list(found["errors"].values())
        assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < found["error"] < 1
    table = (tmp_path / "decompose.txt").read_text()
    assert "conv1   dense: no gain" in table and "nothing being trained" in table
    assert (tmp_path / "plots" / "decompose.png").stat().st_size > 10_000

    built = runpy.run_path(str(tmp_path / "built_config.py"))["get_config"]()
    rules = {rule["match"]: dict(rule) for rule in built.layers}
    assert rules["^conv1$"] == dict(match="^conv1$", kernel="dense", start="own")
    assert rules["^conv2$"]["kernel"] == conv2["kernel"]
    result = training.train(built, tmp_path / "built")
    assert result["params"] == report["factorized_cost"]["params"]
    first = json.loads((tmp_path / "built" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["test/accuracy"] == pytest.approx(report["after"]["test/accuracy"])


def test_errors(net, tmp_path):
    with pytest.raises(UserError, match="checkpoint.convert_from='': give the workdir"):
        decompose.build(recipes.factorized("tt:0.1", dataset="digits"), tmp_path)
    with pytest.raises(UserError, match="no rule has start='kept' and a kernel"):
        decompose.build(of(net, layers=(dict(match="conv2", kernel="tt:0.2"),)), tmp_path)
    with pytest.raises(UserError, match="or find it by --mode=decompose"):
        config = of(net, layers=LAYERS)
        experiment.abstract_model(config, data.describe(config.data))
