"""QMobileNet on CIFAR-10: eight depthwise-separable blocks, depthwise and pointwise quadratic.

    python -m efficient_nets.main --config=configs/qmobilenet.py --workdir=runs/qmobilenet
    python -m efficient_nets.main --config=configs/qmobilenet.py:cifar100

3.23 M parameters. Expected after 250 epochs: 92.61% on CIFAR-10, 69.71% on CIFAR-100 (QuadraLib's
table, one GPU). Not timed by us.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(dataset: str = "cifar10"):
    config = recipes.cifar(dataset)
    config.model = configs.model("mobilenet", layout="q8")
    config.layers = (dict(match=r"depthwise|pointwise", **recipes.QUADRATIC),)
    config.schedule.end_value = 1e-5
    config.train.epochs = 250.0
    return config
