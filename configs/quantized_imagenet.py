"""ResNet-18 on ImageNet: a net in float, then LSQ at 2 bits from its weights, in one command.

    python -m efficient_nets.main --config=configs/quantized_imagenet.py --workdir=runs/imagenet2
    python -m efficient_nets.main --config=configs/quantized_imagenet.py:w=dorefa:2,a=pact:2
    python -m efficient_nets.main --config=configs/quantized_imagenet.py:bireal

11,689,544 parameters, 1.8 G MACs. The argument is a short form of `ops/precision.py`, the
blocks are those of the method's paper; first and last layer and shortcuts stay in float. The net in
float, in WORKDIR/float, has 90 epochs at 0.1; the rounded one 40 at 0.005, times 0.1 after 15, 25
and 35, weight decay 1e-4, batch 256, as model-quantization fine-tunes at 2 bits. It gives 67.3% for
LSQ, 65.7% for LQ-Nets, 64.1% for DoReFa at 2 bits, 52.0% for XNOR-Net and 70.1% in float. Not run
here.
"""

from efficient_nets import config as configs
from efficient_nets import recipes
from efficient_nets.ops import precision as precisions


def get_config(precision: str = "lsq:w2a2"):
    config = recipes.imagenet()
    config.model = configs.model("resnet", preset=_preset(precision), depth=18, layout="imagenet")
    config.layers = () if precision == "float" else recipes.quantized(precision)
    if precision != "float":
        config.pretrain.epochs = 90.0
    config.optimizer.learning_rate = 5e-3
    config.schedule.name, config.schedule.milestones = "multistep", (15.0, 25.0, 35.0)
    config.train.epochs = 40.0
    config.train.batch_size = 256
    return config


def _preset(precision: str) -> str:
    """The blocks of the method's paper, of PACT's and not of that of its weights."""
    methods = [quantizer.method for quantizer in precisions.parse(precision).quantizers.values()]
    own = [name for name in ("pact", "lq", "dorefa") if name in methods]
    return recipes.preset(precision, own[0] if own else "torchvision")
