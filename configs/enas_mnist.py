"""ENAS on MNIST: the architecture of a net of binary, ternary or k-bit cells (arXiv 1802.03268).

    python -m efficient_nets.main --config=configs/enas_mnist.py --workdir=runs/enas
    python -m efficient_nets.main --config=runs/enas/built_config.py --workdir=runs/enas/built
"""

from efficient_nets import recipes


def get_config(text: str = "ternarize"):
    given = recipes.arguments(text, precision="ternarize", strategy="enas", dataset="mnist")
    config = recipes.cell_search(given["precision"], given["strategy"])
    config.data.name = given["dataset"]
    config.model.nodes, config.model.layers, config.model.features = 3, 2, 8
    config.model.reductions = 2
    config.train.epochs = 30.0  # restarts at 10
    config.search.built_layers, config.search.built_features = 6, 16
    config.search.built_epochs = 30.0
    if given["dataset"] == "digits":
        config.train.batch_size, config.search.batch_size = 64, 64
        config.search.built_layers = config.search.built_features = 0
        config.log.every_steps = 10
    return config
