"""LeNet on MNIST.

    python -m efficient_nets.main --config=configs/lenet.py --workdir=runs/lenet
    python -m efficient_nets.main --config=configs/lenet.py:fashion_mnist

454,922 parameters, 11 M MACs. Expected after 10 epochs: about 99% on MNIST, as in the literature.
Two CPU cores take about 40 seconds an epoch.
"""

from efficient_nets import config as configs


def get_config(dataset: str = "mnist"):
    config = configs.defaults()
    config.model = configs.model("lenet")
    config.data.name = dataset
    config.data.train, config.data.validation = "train[:90%]", "train[90%:]"
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 0.5
    config.train.epochs = 10.0
    config.train.batch_size = 128
    return config
