"""SNGAN at the size of its paper, on CIFAR-10 without classes.

    python -m efficient_nets.main --config=configs/resnet.py --workdir=runs/resnet
    python -m efficient_nets.main --config=configs/sngan_cifar.py --workdir=runs/sngan_cifar \\
        --config.generation.features=runs/resnet
    python -m efficient_nets.main --config=configs/sngan_cifar.py:ours   # or any other neuron

5,330,564 parameters, 1.89 G MACs for one image of each part. 50,000 updates of the generator; not
run here. Published: FID 21.7, IS 8.22 (arXiv 1802.05957, table 2), by Inception's features: another
classifier's give other figures, see `generation_evaluation.py` for both ways.
"""

from efficient_nets import recipes


def get_config(neuron: str = "linear"):
    return recipes.sngan("cifar10", neuron=neuron)
