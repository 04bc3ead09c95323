"""QResNet-14 on CIFAR-10: three stages of two blocks, both convs of a block quadratic.

    python -m efficient_nets.main --config=configs/qresnet.py --workdir=runs/qresnet
    python -m efficient_nets.main --config=configs/qresnet.py:cifar100

518,938 parameters, 79 M MACs. Expected after 200 epochs: 93.23% on CIFAR-10, 69.58% on CIFAR-100
(QuadraLib's table, one GPU). Two CPU cores take about 9 minutes an epoch; not timed elsewhere.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(dataset: str = "cifar10"):
    config = recipes.cifar(dataset)
    config.model = configs.model("resnet", blocks=(2, 2, 2))
    config.layers = (dict(match=r"stage\d/.*/conv\d", **recipes.QUADRATIC),)
    return config
