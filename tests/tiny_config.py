"""A quadratic net of 12,246 parameters on 160 digits, 5 steps an epoch: for tests of whole runs.

python -m efficient_nets.main --config=tests/tiny_config.py --workdir=DIR
"""

from efficient_nets import config as configs


def get_config():
    config = configs.defaults()
    config.model = configs.model("resnet", blocks=(1, 1, 1), width=0.25)
    config.layers = (dict(match=r"stage3/.*/conv\d", neuron="ours", norm="branch"),)
    config.data.name = "digits"
    config.data.train, config.data.test = "train[:160]", "test[:100]"
    config.data.crop = 1
    config.train.batch_size, config.evaluate.batch_size = 32, 32
    config.train.epochs = 2.0
    config.log.every_steps = 2
    config.log.tensorboard = False
    return config
