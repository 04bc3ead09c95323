"""The net that is looked into is the one that is evaluated."""

import jax
import numpy as np
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import data, experiment, inspection
from efficient_nets import train as training
from tests import tiny_config


def test_an_averaged_net_is_what_is_analysed(tmp_path):
    config = tiny_config.get_config()
    config.model, config.layers = configs.model("lenet", width=0.25), ()
    config.train.ema, config.train.epochs = 0.5, 0.4
    training.train(config, tmp_path)
    run = experiment.build(config, data.load(config.data))
    net, step = inspection.restored_net(run, tmp_path, "newest")
    assert step == 2
    state = inspection.workdirs.restore_for_evaluation(run, tmp_path, "newest")
    for kind, filter_ in (("params", nnx.Param), ("stats", nnx.Not(nnx.Param))):
        found = jax.tree.leaves(nnx.to_pure_dict(nnx.state(net, filter_)))
        averaged = jax.tree.leaves(state.ema[kind])
        jax.tree.map(np.testing.assert_array_equal, found, averaged)
    raw = jax.tree.leaves(state.params)
    averaged = jax.tree.leaves(state.ema["params"])
    assert any(not np.array_equal(a, b) for a, b in zip(raw, averaged, strict=True))
