"""ENAS on MNIST: the architecture of a net of binary, ternary or k-bit cells (arXiv 1802.03268).

    python -m efficient_nets.main --config=configs/enas_mnist.py --workdir=runs/enas
    python -m efficient_nets.main --config=runs/enas/built_config.py --workdir=runs/enas/built

958,770 parameters of the shared net. The first command searches a net of four cells with three
nodes each, the second trains what it found, with eight cells. The argument is the precision of
operands: ternarize/clipped, binarize, kbit/clipped:w2a2, float, any short form, or searched, where
each has one of binary, ternary, 2, 4, 8 bits and float, and bit operations count in the reward.
Options: strategy (enas, evolution, nsga2, random, darts, gumbel) and dataset (mnist, digits):

    --config=configs/enas_mnist.py:searched,strategy=evolution

--config.search.enas.bound=0.0 lets the controller be as sure as it likes, which ENAS's bounded
logits cannot be; it takes a larger --config.search.enas.entropy_weight=0.003. No full run of this
was made here; with --config.data.image_size=14 ten epochs take about half an hour on two CPU cores.
"""

from efficient_nets import recipes


def get_config(text: str = "ternarize/clipped"):
    given = recipes.arguments(text, precision="ternarize/clipped", strategy="enas", dataset="mnist")
    config = recipes.cell_search(given["precision"], given["strategy"])
    config.data.name = given["dataset"]
    config.model.nodes, config.model.layers, config.model.features = 3, 2, 8
    config.train.epochs = 30.0  # restarts at 10
    config.search.built_layers, config.search.built_features = 6, 16
    config.search.built_epochs = 30.0
    if given["dataset"] == "digits":
        config.train.batch_size, config.search.batch_size = 64, 64
        config.model.reductions = 2
        config.search.built_layers = config.search.built_features = 0
        config.log.every_steps = 10
    return config
