"""VGG-16 with batch norm on CIFAR-10, the first-order baseline of QVGG-7.

    python -m efficient_nets.main --config=configs/vgg.py --workdir=runs/vgg
    python -m efficient_nets.main --config=configs/vgg.py:cifar100

14,728,266 parameters, 313 M MACs. Expected after 200 epochs: 93.61% on CIFAR-10, 73.88% on
CIFAR-100 (QuadraLib's table, where the net is called VGG-13; one GPU). Not timed by us.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(dataset: str = "cifar10"):
    config = recipes.cifar(dataset)
    config.model = configs.model("vgg", layout="D")
    return config
