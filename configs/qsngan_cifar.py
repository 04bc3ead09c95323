"""The same net as `sngan_cifar`, generator and discriminator quadratic in their residual blocks.

    python -m efficient_nets.main --config=configs/qsngan_cifar.py --workdir=runs/qsngan_cifar \\
        --config.generation.features=runs/resnet

14,494,084 parameters, 5.59 G MACs for one image of each part. Not run here: `sngan_mnist` is the
small net on which linear and quadratic were compared. Each kernel of a neuron in the discriminator
is divided by its own spectral norm; its products are not bounded by that, and its branches have no
batch norm, which would tell an image by the others of its batch.
"""

from efficient_nets import recipes


def get_config(neuron: str = "ours"):
    return recipes.sngan("cifar10", neuron=neuron)
