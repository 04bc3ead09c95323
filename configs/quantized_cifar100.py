"""ResNet-20 on CIFAR-100: a net in float, then LSQ at 2 bits from its weights, in one command.

    python -m efficient_nets.main --config=configs/quantized_cifar100.py --workdir=runs/lsq2_c100
    python -m efficient_nets.main --config=configs/quantized_cifar100.py:dorefa:w2a2
    python -m efficient_nets.main --config=configs/quantized_cifar100.py:float

278,360 parameters, 40.8 M MACs. The net in float is trained in WORKDIR/float, 200 epochs at 0.1,
the rounded one as long at 0.01, both by `recipes.quantized_cifar`. model-quantization gives 67.41%
in float and 63.92% for LSQ with a shortcut in float. With --config.teacher.checkpoint=pretrain the
net in float teaches the rounded one too. No full run of this was made here.
"""

from efficient_nets import recipes


def get_config(precision: str = "lsq:w2a2"):
    config = recipes.quantized_cifar(precision, "cifar100")
    if precision != "float":
        config.pretrain.epochs = 200.0
        config.optimizer.learning_rate = 0.01
        config.schedule.warmup_epochs = 0.0
    return config
