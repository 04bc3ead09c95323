"""The net of an architecture of the micro space, trained from scratch (ENAS, arXiv 1802.03268).

    python -m efficient_nets.main --config=configs/enas_arc.py --config.arc="0 2 0 0 ..."
    python -m efficient_nets.main --config=configs/enas_arc.py:ternarize/clipped,dataset=mnist

1,567,108 parameters, 107.0 M MACs. The default is the architecture that ENAS found on CIFAR-10,
whose 40 numbers are both cells with 5 nodes each. The argument is the precision of its operands:
float, or of the binary and k-bit nets binarize, ternarize/clipped, kbit/clipped:w2a2, any short
form, or searched, where the string goes on with the precision of each operand; options: dataset
(cifar10, mnist, digits), nodes, and layers, to which two cells are added. The training is of ENAS's
kind: SGD with Nesterov momentum, a cosine with restarts, drop-path, an auxiliary head, crop, flip
and cutout, and Adam for what is rounded. ENAS's own run is larger: 36 channels, 630 epochs, batches
of 144, weight decay 2e-4 for 1e-4 here, drop-path of 0.4 for 0.2, and dropout before the head.
`--config.model.width` multiplies the channels. No full run of this was made here.
"""

from efficient_nets import recipes


def get_config(text: str = "float"):
    given = recipes.arguments(text, precision="float", dataset="cifar10", layers=0, nodes=5)
    dataset, precision = given["dataset"], given["precision"]
    of_cifar = dataset == "cifar10"
    config = recipes.enas(precision)
    config.model.layers = given["layers"] or {"cifar10": 15, "mnist": 6}.get(dataset, 2)
    config.model.nodes = given["nodes"]
    config.model.features = 16 if dataset != "digits" else 8
    config.model.reductions = 3 if dataset != "digits" else 2
    config.model.auxiliary = 0.4
    config.model.drop_path = 0.2 if of_cifar else 0.0
    config.data.name = dataset
    config.train.epochs = 310.0 if of_cifar else 30.0  # restarts at 10, 30, 70, 150
    if of_cifar:
        config.model.drop_path_steps = 310 * (45000 // 128)
        config.data.crop, config.data.flip, config.data.cutout = 4, True, 16
    return config
