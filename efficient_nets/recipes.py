"""Published training recipes that several configs share."""

from efficient_nets import config as configs
from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops import neurons
from efficient_nets.ops.precision import parse

# The first layer of every architecture, and the last one.
ENDS = r"^(stem|conv1|stage1/0/conv|head)$"
FIRST_LAST = {
    "float": "nothing is rounded there",
    "8bit": "the same methods with 8 bits; the first layer's input, an image, with a sign",
    "all": "as everywhere",
}
SHORTCUTS = {"float": "nothing is rounded in shortcuts", "same": "as everywhere"}
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


def quantized(
    precision: str, first_last: str = "float", shortcut: str = "float"
) -> tuple[dict, ...]:
    """Rules for `config.layers` that round a net, but for what papers leave out.

    XNOR-Net and Bi-Real leave first and last layer and the shortcuts float, the default here;
    DoReFa-Net, PACT and LQ-Nets round the shortcuts too; LSQ takes 8 bits in first and last layer.

    Args:
      precision: As in `LayerSpec`, a short form such as 'lsq:w2a2'.
      first_last: Of the first and the last layer: 'float', '8bit' or 'all'.
      shortcut: Of the layers named `shortcut`: 'float' or 'same'.

    Raises:
      UserError: on an unknown value, or '8bit' with a precision without bits.
    """
    names.pick("first_last", first_last, FIRST_LAST)
    names.pick("shortcut", shortcut, SHORTCUTS)
    parse(precision)
    others = "" if shortcut == "same" else r"(?!.*(^|/)shortcut$)"
    if first_last != "all":
        others = f"(?!{ENDS}){others}"
    rules = [dict(match=f"^{others}" if others else "", precision=precision)]
    if first_last == "8bit":
        if not isinstance(precision, str):
            raise UserError("first_last='8bit': give precision in its short form")
        rules += [
            dict(match=ENDS.replace("|head", ""), precision=_eight_bits(precision, image=True)),
            dict(match="^head$", precision=_eight_bits(precision, image=False)),
        ]
    return tuple(rules)


def _eight_bits(text: str, image: bool) -> dict[str, dict]:
    """The long form with 8 bits at each site of kernel and input."""
    found = {}
    for site, quantizer in parse(text).quantizers.items():
        fields = dict(method=quantizer.method, bits=8)
        if site == "input" and image:
            fields["signed"] = True
        found[site] = fields
    try:
        parse(found)
    except UserError as error:
        raise UserError(f"first_last='8bit' with precision={text!r}: {error}") from error
    return found


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


def imagenet():
    """What recipes for ImageNet share: 224 pixels, random crops and flips, bfloat16 products.

    SGD with Nesterov's momentum and weight decay 1e-4; the 50,000 validation images are the test
    split.
    """
    config = configs.defaults()
    config.dtype = "bfloat16"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.flip = True
    config.data.test = "validation"
    config.data.workers = 16
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.evaluate.batch_size = 1000
    return config


def quantized_cifar(precision: str, dataset: str = "cifar10"):
    """model-quantization's recipe for CIFAR: ResNet-20, rounded but for its ends and shortcuts.

    Batch 128, 200 epochs of SGD with Nesterov's momentum, the learning rate times 0.2 after 60, 120
    and 160, weight decay 1e-4; the rate is 0.1 in float and 0.05 rounded, from nothing. It
    fine-tunes LSQ at 0.01 from a net in float.

    Args:
      precision: A short form; its blocks are those of `preset`.
      dataset: 'cifar10' or 'cifar100'.
    """
    config = configs.defaults()
    config.model = configs.model("resnet", preset=preset(precision), depth=20)
    if precision != "float":
        config.layers = quantized(precision)
    config.data.name = dataset
    config.data.crop, config.data.flip = 4, True
    config.optimizer.nesterov = True
    config.optimizer.learning_rate = 0.1 if precision == "float" else 0.05
    config.optimizer.weight_decay = 1e-4
    config.schedule.name, config.schedule.factor = "multistep", 0.2
    config.schedule.milestones = (60.0, 120.0, 160.0)
    config.schedule.warmup_epochs = 1.0
    config.train.epochs = 200.0
    return config


def preset(precision: str, others: str = "torchvision") -> str:
    """The ResNet whose blocks a precision needs, a key of its presets.

    A sign needs values on both sides of 0, which a ReLU in front of it does not leave: nets whose
    inputs are signs have the blocks of XNOR-Net or Bi-Real Net.

    Args:
      precision: As in `LayerSpec`.
      others: For all other precisions.
    """
    found = parse(precision).input
    if found is None or found.levels > 2 or not found.signed:
        return others
    return "xnor" if found.method.startswith("xnor") else "bireal"
