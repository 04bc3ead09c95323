"""LeNet on MNIST.

    python -m efficient_nets.main --config=configs/lenet.py --workdir=runs/lenet
    python -m efficient_nets.main --config=configs/lenet.py:fashion_mnist

454,922 parameters, 11 M MACs. Expected after 10 epochs: about 99% on MNIST, as in the literature.
Two CPU cores take about 40 seconds an epoch.
"""

from efficient_nets import recipes


def get_config(dataset: str = "mnist"):
    return recipes.factorized("dense", "lenet", dataset)
