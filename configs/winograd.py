"""WinogradAwareNets' ResNet-18 on CIFAR-10: 8 bits at each site of F(4, 3), learned transforms.

    python -m efficient_nets.main --config=configs/winograd.py --workdir=runs/flex
    python -m efficient_nets.main --config=configs/winograd.py:direct --workdir=runs/direct
    python -m efficient_nets.main --config=configs/winograd.py:static-rounded,tile=2
    python -m efficient_nets.main --config=configs/winograd.py:tap,tile=6,bits=8,width=0.25
    python -m efficient_nets.main --config=configs/winograd.py:flex,bits=0,dataset=cifar100
    python -m efficient_nets.main --config=configs/winograd.py:flex,adapt=120

2,798,858 parameters, 36.7 M MACs; the direct net has 139.3 M. The argument is a method of
`recipes.winograd` and its options. The last command is the paper's adaptation (arXiv 2002.10711):
120 epochs of the direct net in float, then 20 of this one from its weights. With
--config.pretrain.keep_precision=True the direct net is rounded too. The source gives for 8 bits and
120 epochs about 92% direct, 78% static-rounded and 91% flex. It decays all parameters; here norms,
biases and transforms are not decayed. No full run of this was made here.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(text: str = "flex"):
    given = recipes.arguments(
        text, method="flex", tile=0, bits=8, width=0.5, dataset="cifar10", adapt=0.0
    )
    config = configs.defaults()
    config.model = configs.model("resnet:winograd", depth=18, width=given["width"])
    config.layers = recipes.winograd(given["method"], tile=given["tile"], bits=given["bits"])
    if given["method"] == "tap":
        config.calibration.how = "minmax"  # LSQ's own start is too coarse for 8 bits
    config.data.name = given["dataset"]
    config.data.train, config.data.validation = "train[:90%]", "train[90%:]"
    config.data.crop, config.data.flip = 4, True
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 4e-5
    config.train.batch_size = 64
    config.train.epochs = 20.0 if given["adapt"] else 120.0
    config.schedule.name, config.schedule.factor = "multistep", 0.1
    config.schedule.milestones = (0.6 * config.train.epochs, 0.8 * config.train.epochs)
    if given["adapt"]:
        config.pretrain.epochs, config.pretrain.learning_rate = given["adapt"], 1e-3
    return config
