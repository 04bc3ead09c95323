"""Published training recipes that several configs share."""

from efficient_nets import config as configs
from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops import neurons

# QuadraLib's neuron as it is trained there.
QUADRATIC = dict(neuron="ours", norm="branch")


def slow_products(neuron: str, factor: float = 1e-4) -> dict:
    """A rule for `optimizer.rules`: the branches that a 'relinear' start adds learn slower.

    ReLinear trains them at a smaller rate than the linear part, 1e-5 beside 0.1 (Fan et al. 2021,
    arXiv 2110.06081), which is the default.

    Raises:
      UserError: if the neuron cannot start linear.
    """
    parts = neurons.neuron(neuron)
    if not set(parts.relinear) - {"carry"}:
        raise UserError(f"neuron={neuron!r} has no products, or cannot start linear")
    added = [
        name for name, role in zip(parts.branches, parts.relinear, strict=True) if role != "carry"
    ]
    return dict(match=rf"(^|/)({'|'.join(added)})/", learning_rate=factor)


def cifar(dataset: str = "cifar10"):
    """QuadraLib's recipe for CIFAR (arXiv 2204.01701), for its VGG, ResNet and MobileNet.

    SGD with momentum 0.9 and weight decay 5e-4, gradient norm clipped at 0.5, learning rate 0.1
    with cosine decay to 1e-4, batch 256, 200 epochs; random crop with padding 4 and flip. Biases
    and norm scales are not decayed, as everywhere here unless `optimizer.rules` says so.
    """
    names.pick("the config's argument", dataset, {"cifar10": 10, "cifar100": 100})
    config = configs.defaults()
    config.data.name = dataset
    config.data.crop = 4
    config.data.flip = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip_norm = 0.5
    config.schedule.end_value = 1e-4
    config.train.epochs = 200.0
    config.train.batch_size = 256
    return config
