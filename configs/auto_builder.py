"""Auto-builder: takes layers out of a narrow quadratic VGG-16 until 60% of its MACs are left.

    python -m efficient_nets.main --config=configs/auto_builder.py --workdir=runs/auto_builder
    python -m efficient_nets.main --config=configs/auto_builder.py:cifar10
    python -m efficient_nets.main --config=configs/auto_builder.py:digits

696,146 parameters, 14.9 M MACs before the first removal. Thirteen convs, all quadratic, start as
the linear net (ReLinear): narrow quadratic nets of this depth learn little from a start of their
own. runs/auto_builder/ ends up with report.txt, plots/auto_builder.png and built_config.py.

MNIST, seed 0: seven rounds take out seven convs, the deepest first. 49.6% of the MACs and 8.3% of
the parameters stay; test accuracy goes from 97.63% to 97.06% after three rounds, with 73.2% of the
MACs, and to 94.23% at the end, each round being fine-tuned for one epoch. About a quarter of an
hour on two CPU cores.
"""

from efficient_nets import config as configs
from efficient_nets import names, recipes

DATA = {
    "mnist": dict(train="train[:10000]", validation="train[55000:]", image_size=32),
    "cifar10": dict(train="train[:45000]", validation="train[45000:]", crop=4, flip=True),
    "digits": dict(train="train[:1200]", validation="train[1200:]", image_size=32),
}


def get_config(dataset: str = "mnist"):
    config = configs.defaults()
    config.data.update(names.pick("the config's argument", dataset, DATA), name=dataset)
    config.model = configs.model("vgg", layout="D", width=1 / 8)
    config.layers = (dict(match=r"conv", start="relinear", **recipes.QUADRATIC),)
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip_norm = 0.5
    config.schedule.warmup_epochs = 0.5
    config.train.epochs = 3.0
    config.train.batch_size = 96
    config.builder.budget = "macs"
    config.builder.keep = 0.6
    if dataset == "cifar10":
        config.train.epochs, config.builder.finetune_epochs = 30.0, 5.0
    if dataset == "digits":
        config.model = configs.model("vgg", layout="A", width=1 / 16)
        config.train.batch_size, config.evaluate.batch_size = 48, 240
        config.train.epochs, config.builder.finetune_epochs = 8.0, 4.0
        config.builder.mask_seeds = 2
        config.log.every_steps = 25
    return config
