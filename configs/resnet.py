"""ResNet-32 on CIFAR-10, the first-order baseline of QResNet-14.

    python -m efficient_nets.main --config=configs/resnet.py --workdir=runs/resnet
    python -m efficient_nets.main --config=configs/resnet.py:cifar100

466,906 parameters, 69 M MACs. Expected after 200 epochs: 92.83% on CIFAR-10, 69.13% on CIFAR-100
(QuadraLib's table, one GPU). Two CPU cores take about 11 minutes an epoch; not timed elsewhere.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(dataset: str = "cifar10"):
    config = recipes.cifar(dataset)
    config.model = configs.model("resnet", depth=32)
    return config
