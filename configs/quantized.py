"""ResNet-20 on CIFAR-10 with rounded weights and activations, LSQ at 2 bits or any precision.

    python -m efficient_nets.main --config=configs/quantized.py --workdir=runs/lsq2
    python -m efficient_nets.main --config=configs/quantized.py:float --workdir=runs/float
    python -m efficient_nets.main --config=configs/quantized.py:dorefa:w2a2
    python -m efficient_nets.main --config=configs/quantized.py:bireal
    python -m efficient_nets.main --config=configs/quantized.py:minmax:w8a8 --mode=deploy \\
        --config.checkpoint.convert_from=runs/float --workdir=runs/int8

272,510 parameters, 40.8 M MACs; of 1,096,168 bytes in float 94,144 are left with LSQ at 2 bits. The
argument is a short form of `efficient_nets/ops/precision.py`. First and last layer and shortcuts
stay in float; nets whose inputs are signs get the blocks of Bi-Real Net or XNOR-Net. The recipe is
`recipes.quantized_cifar`, 200 epochs from nothing. From a net in float,

    --config.pretrain.epochs=200 --config.optimizer.learning_rate=0.01

trains that first, and --config.checkpoint.init_from=runs/float takes one that is there. No full run
of this was made here.
"""

from efficient_nets import recipes


def get_config(precision: str = "lsq:w2a2"):
    return recipes.quantized_cifar(precision)
