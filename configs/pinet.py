"""A Pi-net on CIFAR-10: a ResNet-18 of polynomial blocks, without activation functions.

    python -m efficient_nets.main --config=configs/pinet.py --workdir=runs/pinet
    python -m efficient_nets.main --config=configs/pinet.py:cifar100

11,528,274 parameters, 576 M MACs. The block is that of Chrysos et al. (arXiv 2006.13026), the
recipe that of our other nets for CIFAR. Not run by us; we know of no published figure for the two
together.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(dataset: str = "cifar10"):
    config = recipes.cifar(dataset)
    config.model = configs.model("pinet_resnet", blocks=(2, 2, 2, 2))
    return config
