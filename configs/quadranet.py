"""A small QuadraNet on CIFAR-10: ConvNeXt blocks whose depthwise convolutions are quadratic.

    python -m efficient_nets.main --config=configs/quadranet.py --workdir=runs/quadranet
    python -m efficient_nets.main --config=configs/quadranet.py:cifar100
    python -m efficient_nets.main --config=configs/quadranet.py --config.layers='()'  # ConvNeXt

5,055,706 parameters, 69 M MACs. Half of ConvNeXt-T's channels, patches of 2x2 pixels. Trained as
ConvNeXt is (arXiv 2201.03545: AdamW, weight decay 0.05, label smoothing 0.1), but in batches of
256, with our other nets' augmentation for CIFAR and without stochastic depth. Not run by us; we
know of no published figure for this net.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(dataset: str = "cifar10"):
    config = recipes.cifar(dataset)
    config.model = configs.model("quadranet", depths=(2, 2, 6, 2), width=0.5)
    config.layers = (dict(match=r"depthwise", neuron="ours"),)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_epochs = 10.0
    config.schedule.end_value = 1e-6
    config.train.label_smoothing = 0.1
    return config
