"""`--mode=prune`: the ranks of a trained net, and a smaller one that goes on from there."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets import config as configs
from efficient_nets import data, experiment, workdirs
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.search import prune
from tests.search.conftest import tiny_config

THRESHOLD = 0.6  # so that a net which has hardly been trained loses something


def factorized(layers):
    config = tiny_config()
    config.builder = configs.defaults().builder
    config.layers, config.optimizer.rules = layers, ()
    config.train.epochs = 1.0
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The workdir of a net that was trained for 3 steps, and pruned."""
    folder = tmp_path_factory.mktemp("pruned")
    config = factorized((dict(match="hidden", kernel="tucker:8x8,lasso=0.01,dropout=0.1"),))
    training.train(config, folder)
    prune.build(config, folder, folder, "newest", THRESHOLD)
    return folder


def test_it_reports_and_writes_a_config(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("train/rank_lasso", 0) > 0 for line in lines)
    report = json.loads((folder / "prune.json").read_text())
    (hidden,) = report["layers"].values()
    for bond, shares in hidden["contributions"].items():
        assert hidden["before"][bond] == len(shares) == 8 and shares[0] == 1
        # Later ones may go with what the first bond has lost.
        assert 1 <= hidden["after"][bond] <= 8
    assert sum(hidden["after"].values()) < 16
    lost = hidden["params_before"] - hidden["params_after"]
    costs = report["before_cost"]["params"], report["after_cost"]["params"]
    assert costs[0] - costs[1] == lost > 0
    assert "hidden  8>" in (folder / "prune.txt").read_text()
    assert (folder / "plots" / "prune.png").stat().st_size > 10_000

    (rule,) = map(dict, built_config(folder).layers)
    assert rule == dict(match="^hidden$", kernel=hidden["kernel"], start="own")


def built_config(folder):
    return runpy.run_path(str(folder / "built_config.py"))["get_config"]()


def test_the_checkpoint_is_the_pruned_net(folder):
    """That eval restores, and training starts from."""
    built = built_config(folder)
    run = experiment.build(built, data.load(built.data), training=False)
    state = workdirs.restore_for_evaluation(run, folder / "pruned", "newest")
    bare = run.abstract._replace(
        params=jax.tree.map(jnp.zeros_like, state.params), stats=state.stats
    )
    start = workdirs.warm_start(run, bare, pathlib.Path(built.checkpoint.init_from))
    jax.tree.map(np.testing.assert_array_equal, start.params, state.params)
    report = json.loads((folder / "prune.json").read_text())
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(state.params)) == (report["after_cost"]["params"])
    )


@pytest.mark.slow
def test_it_trains_on(folder, tmp_path):
    training.train(built_config(folder), tmp_path)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    report = json.loads((folder / "prune.json").read_text())
    assert first["test/loss"] == pytest.approx(report["after"]["test/loss"])


# ml_collections reads a config file in a way that Python is about to drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_errors(tmp_path, command):
    with pytest.raises(UserError, match="no kernel is factorized, so there is nothing to prune"):
        prune.build(factorized(()), tmp_path, tmp_path, "newest", 0.01)
    status, _, err = command(
        "--config=configs/factorized.py", "--threshold=0.1", f"--workdir={tmp_path}"
    )
    assert status == 2 and "--threshold=0.1: only --mode=prune may have it" in err
