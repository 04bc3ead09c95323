"""A fully connected tensor net on MNIST, or one behind convolutions.

    python -m efficient_nets.main --config=configs/tnn.py --workdir=runs/tnn
    python -m efficient_nets.main --config=configs/tnn.py:conv_tnn --workdir=runs/conv_tnn
    python -m efficient_nets.main --config=configs/tnn.py:tnn,readout=tubal_softmax
    python -m efficient_nets.main --config=configs/tnn.py:tnn,transform=dft
    python -m efficient_nets.main --config=configs/tnn.py --config.model.slice_wise=True
    python -m efficient_nets.main --config=configs/tnn.py:conv_tnn,dataset=fashion_mnist
    python -m efficient_nets.main --config=configs/tnn.py:conv_tnn,dataset=cifar10,transform=haar

98,794 parameters, 0.3 M MACs. The argument is one of the two nets, a data set, a key of TRANSFORMS
in `efficient_nets/ops/tproduct.py`, and a read-out of `efficient_nets/models/tnn.py`. 97.8% after 5
epochs, which take a minute on two CPU cores; 98.3% with the DFT, 96.2% with the tubal softmax, and
96.9% slice-wise. The net behind convolutions, 174,986 parameters, has 99.1% after 2 epochs.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(text: str = "tnn"):
    given = recipes.arguments(text, model="tnn", dataset="mnist", transform="dct", readout="dense")
    config = configs.defaults()
    config.data.name = given.pop("dataset")
    config.model = configs.model(given.pop("model"), **given)
    config.data.train, config.data.validation = "train[:90%]", "train[90%:]"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.schedule.warmup_epochs = 0.2
    config.train.epochs = 5.0
    config.train.batch_size = 128
    return config
