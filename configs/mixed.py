"""ResNet-20 on CIFAR-10 with a precision for each layer: 2, 4 or 8 bits, in 1/10 of the bytes.

    python -m efficient_nets.main --config=configs/quantized.py:float --workdir=runs/float
    python -m efficient_nets.main --config=configs/mixed.py --mode=sensitivity --workdir=runs/mixed
    python -m efficient_nets.main --config=runs/mixed/built_config.py --workdir=runs/mixed/built

272,510 parameters, 40.8 M MACs at 4 bits. The second command measures what each layer of the
trained net loses alone at each choice, on 2,500 images held out, and chooses; the third trains what
it chose from the weights in float. The argument is the share of the net's packed bytes that may
stay; --config.mixed.budget=bops cuts bit operations. Not run in full.
"""

from efficient_nets import recipes


def get_config(keep: str = "0.1"):
    config = recipes.quantized_cifar("lsq:w4a4")
    config.data.train, config.data.validation = "train[:95%]", "train[95%:]"
    config.checkpoint.convert_from = "runs/float"
    config.optimizer.learning_rate = 0.01
    config.schedule.warmup_epochs = 0.0
    config.mixed.choices = ("lsq:w2a2", "lsq:w4a4", "lsq:w8a8")
    config.mixed.keep = float(keep)
    return config
