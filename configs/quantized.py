"""ResNet-20 on CIFAR-10 with rounded weights and activations, LSQ at 2 bits or any precision.

    python -m efficient_nets.main --config=configs/quantized.py --workdir=runs/lsq2
    python -m efficient_nets.main --config=configs/quantized.py:float --workdir=runs/float
    python -m efficient_nets.main --config=configs/quantized.py:dorefa:w2a2
    python -m efficient_nets.main --config=configs/quantized.py:bireal
    python -m efficient_nets.main --config=configs/quantized.py:minmax:w8a8 --mode=deploy \\
        --config.checkpoint.convert_from=runs/float --workdir=runs/int8

272,510 parameters, 40.8 M MACs; of 1,090,040 bytes in float 87,800 are left with LSQ at 2 bits. The
argument is a short form of `efficient_nets/ops/precision.py`. First and last layer and shortcuts
stay in float; nets whose inputs are signs get the blocks of Bi-Real Net or XNOR-Net. Batch 128, SGD
with Nesterov's momentum, 200 epochs, the rate times 0.2 after 60, 120 and 160, which is
model-quantization's recipe for CIFAR. It fine-tunes LSQ at 0.01 from a net in float, here
`--config.checkpoint.init_from=runs/float --config.optimizer.learning_rate=0.01`; 0.05 is for a
start from nothing. No full run of this was made here.
"""

from efficient_nets import config as configs
from efficient_nets import recipes
from efficient_nets.ops import precision as precisions


def get_config(precision: str = "lsq:w2a2"):
    config = configs.defaults()
    config.model = configs.model("resnet", preset=_preset(precision), depth=20)
    if precision != "float":
        config.layers = recipes.quantized(precision)
    config.data.name = "cifar10"
    config.data.crop, config.data.flip = 4, True
    config.optimizer.nesterov = True
    config.optimizer.learning_rate = 0.1 if precision == "float" else 0.05
    config.optimizer.weight_decay = 1e-4
    config.schedule.name, config.schedule.factor = "multistep", 0.2
    config.schedule.milestones = (60.0, 120.0, 160.0)
    config.schedule.warmup_epochs = 1.0
    config.train.epochs = 200.0
    return config


def _preset(precision: str) -> str:
    """A sign needs values on both sides of 0, which a ReLU in front of it does not leave."""
    found = precisions.parse(precision).input
    if found is None or found.levels > 2 or not found.signed:
        return "torchvision"
    return "xnor" if found.method.startswith("xnor") else "bireal"
