"""wiNAS on CIFAR-10: for each 3x3 convolution of a ResNet-18 direct or F2, F4, F6; float, 16, 8.

    python -m efficient_nets.main --config=configs/winas.py --mode=search --workdir=runs/winas
    python -m efficient_nets.main --config=runs/winas/built_config.py --workdir=runs/winas/built

2,797,610 parameters, 139.3 M MACs before the search. The first command trains the net of all
candidates, the second what it chose, as configs/winograd.py trains. The argument has options:

    --config=configs/winas.py:cost=latency,width=0.25,dataset=cifar100

where bits=8 leaves the candidates of that precision alone, and cost is bops, macs or latency, the
last one from times that are measured before:

    python -m efficient_nets.main --config=configs/winas.py --mode=latency --workdir=runs/latency

The weight of the expected cost beside the loss is --config.winas.cost_weight. The learning rate of
the architecture is that of ProxylessNAS (arXiv 1812.00332). dataset=digits searches a net of six
convolutions: a quarter of an hour on two busy CPU cores, most of it compiling. No full run of this
was made here.
"""

from efficient_nets import config as configs
from efficient_nets import recipes
from efficient_nets.search import candidates


def get_config(text: str = "bops"):
    given = recipes.arguments(text, cost="bops", width=0.5, bits=0, dataset="cifar10")
    config = configs.defaults()
    config.data.name = given["dataset"]
    config.data.train, config.data.validation = "train[:50%]", "train[50%:]"
    config.model = configs.model("resnet:winograd", depth=18, width=given["width"])
    config.winas.epochs, config.winas.warmup_epochs = 60.0, 5.0
    config.train.epochs, config.train.batch_size = 120.0, 64
    config.data.crop, config.data.flip = 4, True
    if given["dataset"] == "digits":
        config.model = configs.model("resnet", blocks=(1, 1, 1), width=given["width"])
        config.winas.epochs, config.winas.warmup_epochs = 20.0, 2.0
        config.winas.learning_rate = 0.05
        config.train.epochs = 25.0
        config.data.crop, config.data.flip = 1, False
        config.log.every_steps = 11
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-2 if given["dataset"] == "digits" else 1e-3
    config.optimizer.weight_decay = 4e-5
    bits = (given["bits"],) if given["bits"] else candidates.BITS
    config.winas.candidates = candidates.grid(bits=bits)
    config.winas.cost = given["cost"]
    if given["cost"] == "latency":
        config.winas.latency = "runs/latency/latency.json"
    return config
