"""Any neuron in a small LeNet on 10,000 images of MNIST: the net of the README's table of neurons.

    python -m efficient_nets.main --config=configs/neurons.py --workdir=runs/neurons
    python -m efficient_nets.main --config=configs/neurons.py:t4
    python -m tests.peers.neurons                             # the whole table, 3 seeds each

9,266 parameters, 0.7 M MACs. The argument is a neuron of `efficient_nets/ops/neurons.py`, 'ours' if
not given; both convolutions have it, with a batch norm on each branch. Half a minute on two CPU
cores; 96.3% after 2 epochs, mean of 3 seeds (README has those of other neurons).
"""

from efficient_nets import config as configs


def get_config(neuron: str = "ours"):
    config = configs.defaults()
    config.model = configs.model("lenet", width=0.125)
    config.layers = (dict(match="conv", neuron=neuron, norm="branch"),)
    config.data.name = "mnist"
    config.data.train = "train[:10000]"
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_epochs = 0.3
    config.train.epochs = 2.0
    config.train.batch_size = 96
    return config
