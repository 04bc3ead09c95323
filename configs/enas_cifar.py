"""ENAS on CIFAR-10: the architecture of a net of binary, ternary or k-bit cells (arXiv 1802.03268).

    python -m efficient_nets.main --config=configs/enas_cifar.py --workdir=runs/enas_cifar
    python -m efficient_nets.main --config=runs/enas_cifar/built_config.py \\
        --workdir=runs/enas_cifar/built

12,575,376 parameters of the shared net. The first command searches a net of five cells with five
nodes each, the second trains what it found, with 17 cells. The argument is as that of
configs/enas_mnist.py, a precision or searched; option: strategy. ENAS's own search has six
cells, batches of 160, drop-path of 0.4 and dropout before the head. On a GPU whose XLA stops in
`triton_tiling_propagation.cc` set `XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`. No full run of
this was made here.
"""

from efficient_nets import recipes


def get_config(text: str = "ternarize/clipped"):
    given = recipes.arguments(text, precision="ternarize/clipped", strategy="enas")
    config = recipes.cell_search(given["precision"], given["strategy"])
    config.data.name = "cifar10"
    config.data.crop, config.data.flip, config.data.cutout = 4, True, 16
    config.model.layers, config.model.features = 3, 20
    config.model.auxiliary, config.model.drop_path = 0.4, 0.1
    config.train.epochs = 150.0  # restarts at 10, 30, 70
    config.model.drop_path_steps = 150 * (45000 // 128)
    config.search.built_layers, config.search.built_features = 15, 16
    config.search.built_epochs = 310.0  # restarts at 10, 30, 70, 150
    return config
