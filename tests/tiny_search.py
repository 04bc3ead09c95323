"""A search over cells of one node on 96 digits, 3 steps an epoch: for tests of whole searches.

python -m efficient_nets.main --config=tests/tiny_search.py --workdir=DIR
"""

from efficient_nets import config as configs


def get_config(strategy: str = "enas"):
    config = configs.defaults()
    config.model = configs.model(
        "cells",
        arc="",
        nodes=1,
        layers=1,
        features=4,
        reductions=2,
        ops=("conv1", "max3", "identity"),
        precisions=("ternarize", "float"),
    )
    config.data.name = "digits"
    config.data.train, config.data.validation = "train[:96]", "train[96:196]"
    config.data.test = "test[:40]"
    config.optimizer.learning_rate = 0.05
    config.train.epochs, config.train.batch_size = 2.0, 32
    config.evaluate.batch_size = 64
    config.calibration.batch_size = 32
    config.log.every_steps, config.log.tensorboard = 2, False
    config.search.strategy = strategy
    if strategy not in ("darts", "gumbel"):
        config.search.updates = 2
    config.search.proposals, config.search.batch_size = 8, 64
    config.search.shown, config.search.finalists = 3, 4
    config.search.norm_batches = 2
    return config
