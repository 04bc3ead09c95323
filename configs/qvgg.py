"""QVGG-7 on CIFAR-10: seven convs, all quadratic.

    python -m efficient_nets.main --config=configs/qvgg.py --workdir=runs/qvgg
    python -m efficient_nets.main --config=configs/qvgg.py:cifar100

12,304,330 parameters, 430 M MACs. Expected after 200 epochs: 94.13% on CIFAR-10, 74.35% on
CIFAR-100 (QuadraLib's table, one GPU). Not timed by us.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(dataset: str = "cifar10"):
    config = recipes.cifar(dataset)
    config.model = configs.model("vgg", layout="Q7")
    config.layers = (dict(match=r"conv", **recipes.QUADRATIC),)
    return config
