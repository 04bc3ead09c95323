"""A fully connected tensor net on MNIST, or one behind convolutions.

    python -m efficient_nets.main --config=configs/tnn.py --workdir=runs/tnn
    python -m efficient_nets.main --config=configs/tnn.py:conv_tnn --workdir=runs/conv_tnn
    python -m efficient_nets.main --config=configs/tnn.py:tnn,transform=haar
    python -m efficient_nets.main --config=configs/tnn.py:tnn,transform=dft,readout=dense
    python -m efficient_nets.main --config=configs/tnn.py:conv_tnn,dataset=cifar10

99,064 parameters, 0.3 M MACs.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(text: str = "tnn"):
    given = recipes.arguments(
        text, model="tnn", dataset="mnist", transform="dct", readout="tubal_softmax"
    )
    config = configs.defaults()
    config.model = configs.model(
        given["model"], transform=given["transform"], readout=given["readout"]
    )
    config.data.name = given["dataset"]
    config.data.train, config.data.validation = "train[:90%]", "train[90%:]"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.schedule.warmup_epochs = 0.2
    config.train.epochs = 10.0
    config.train.batch_size = 128
    return config
