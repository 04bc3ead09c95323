"""ReLinear: the trained linear LeNet of `configs/neurons.py` goes on as a quadratic one.

    python -m efficient_nets.main --config=configs/neurons.py:linear --workdir=runs/neurons-linear
    python -m efficient_nets.main --config=configs/relinear.py --workdir=runs/relinear

9,266 parameters, 0.7 M MACs. The argument is the linear net's workdir. The quadratic net starts as
that net (Fan et al. 2021, arXiv 2110.06081), and its products learn at a tenth of the rate of the
rest. Half a minute on two CPU cores; with seed 0 it starts at the 95.86% of the linear net and ends
at 96.72%. (The linear net alone, trained for the four epochs that the two have together: 97.19%.)
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(linear: str = "runs/neurons-linear"):
    config = configs.defaults()
    config.model = configs.model("lenet", width=0.125)
    config.layers = (dict(match="conv", neuron="ours", norm="branch", start="relinear"),)
    config.checkpoint.convert_from = linear
    config.data.name = "mnist"
    config.data.train = "train[:10000]"
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip_norm = 1.0
    config.optimizer.rules += (recipes.slow_products("ours", 0.1),)
    config.train.epochs = 2.0
    config.train.batch_size = 96
    return config
