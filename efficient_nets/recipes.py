"""Published training recipes that several configs share."""

from efficient_nets import config as configs
from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops import factorization, neurons
from efficient_nets.ops.precision import parse

# The first layer of every architecture, and the last one, or a detector's last ones.
FIRST = r"^(backbone/)?(stem|conv1|stage1/0/conv)$"
LAST = r"^(head|(class|box)_heads/\d+)$"
FIRST_LAST = {
    "float": "nothing is rounded there",
    "8bit": "the same methods with 8 bits; the first layer's input, an image, with a sign",
    "all": "as everywhere",
}
SHORTCUTS = {"float": "nothing is rounded in shortcuts", "same": "as everywhere"}
# Methods of `winograd`: whether the transforms are learned, and whether they are rounded.
WINOGRAD = {
    "direct": "no transforms, 'direct' of arXiv 2002.10711",
    "static": "exact transforms; all other sites are rounded",
    "static-rounded": "the transforms are rounded too, 'static' of arXiv 2002.10711",
    "flex": "the transforms are learned, and rounded each step",
    "tap": "exact transforms; inside of them a learned power of two for each tap of a tile",
}
# By architecture: its convolutions of more than one tap but for a stem, those of them whose maps
# are no larger than 4x4, the other layers that are rounded.
WINOGRAD_LAYERS = {
    "resnet": (r"^stage\d/.*/conv\d$", r"^stage4/.*/conv\d$", r"/shortcut$"),
    "resnext": (r"/conv2$", "", r"/(conv[13]|shortcut)$"),
    "squeezenet": (r"/expand3$", "", r"/(squeeze|expand1)$"),
    "lenet": (r"^conv\d$", "", r"^hidden$"),
}
# What tokens of a searched precision mean.
CELL_PRECISIONS = (
    "binarize",
    "ternarize/clipped",
    "kbit/clipped:w2a2",
    "kbit/clipped:w4a4",
    "kbit/clipped:w8a8",
    "float",
)
SEARCHED = "searched"
# QuadraLib's neuron as it is trained there.
QUADRATIC = dict(neuron="ours", norm="branch")


def arguments(text: str, **defaults) -> dict:
    """What the argument of a config says, as 'flex,tile=6' in `configs/winograd.py:flex,tile=6`.

    Args:
      text: `key=value` pairs with commas between; the first may be the value of the first key.
      **defaults: Of each key; their types are those of the values.

    Raises:
      UserError: on an unknown key, one given twice, or a value of another type.
    """
    found = {}
    for index, part in enumerate(text.split(",")):
        key, equals, value = part.partition("=")
        if index == 0 and (not equals or ":" in key):  # a value such as 'tt:energy=0.9', no key
            key, equals, value = next(iter(defaults)), "=", part
        if not equals:
            raise UserError(f"the config's argument {text!r}: {part!r} is no key=value")
        names.check_fields("the config's argument", [key], defaults)
        if key in found:
            raise UserError(f"the config's argument {text!r}: {key!r} is given twice")
        kind = type(defaults[key])
        try:
            found[key] = kind(value)
        except ValueError:
            raise UserError(
                f"the config's argument {text!r}: {key} takes a {kind.__name__}, not {value!r}"
            ) from None
    return defaults | found


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
        others = f"(?!{FIRST}|{LAST}){others}"
    rules = [dict(match=f"^{others}" if others else "", precision=precision)]
    if first_last == "8bit":
        if not isinstance(precision, str):
            raise UserError("first_last='8bit': give precision in its short form")
        rules += [
            dict(match=FIRST, precision=_eight_bits(precision, image=True)),
            dict(match=LAST, precision=_eight_bits(precision, image=False)),
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


FACTORIZED = {"lenet": {}, "vgg": {"layout": "D"}}  # architectures, and their options


def factorized(
    kernel: str,
    model: str = "lenet",
    dataset: str = "mnist",
    dense: float = 0.0,
    *,
    kept: bool = False,
):
    """A config in the spirit of Tensor_Layer: a net all of whose layers but the head have a kernel.

    SGD with momentum 0.9, learning rate 0.05, weight decay 5e-4, batch 128, cosine decay; 10 epochs
    of LeNet, 200 of VGG-16, with crops and flips. Gradients of factorized nets are clipped at a
    norm of 1, without which fine-tuning a decomposed one can diverge at this rate.

    Args:
      kernel: As in `LayerSpec`; 'dense' for the net to compare with.
      model: A key of `FACTORIZED`.
      dataset: The data set's name.
      dense: Epochs for which the dense net is trained first, to be decomposed; 0: from scratch.
      kept: Whether cores come from the kernels that there are, as they do with `dense`.

    Raises:
      UserError: on an unknown model or kernel, or a dense kernel with `dense`.
    """
    names.pick("model", model, FACTORIZED)
    parsed = factorization.parse(kernel)
    if (dense or kept) and parsed == factorization.DENSE:
        raise UserError(f"dense={dense}, kept={kept}: kernel='dense' decomposes nothing; give 0")
    config = configs.defaults()
    config.model = configs.model(model, **FACTORIZED[model])
    config.data.name = dataset
    config.data.train, config.data.validation = "train[:90%]", "train[90%:]"
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 0.5
    config.train.epochs = 10.0
    config.train.batch_size = 128
    if model == "vgg":
        config.data.crop, config.data.flip = 4, True
        config.train.epochs = 200.0
    if parsed != factorization.DENSE:
        start = {"start": "kept"} if dense or kept else {}
        config.layers = (dict(match="^(?!head$)", kernel=kernel, **start),)
        # A step moves a kernel through each of its cores, so further than a dense one.
        config.optimizer.clip_norm = 1.0
    if dense:
        config.pretrain.epochs = float(dense)
        config.pretrain.learning_rate = config.optimizer.learning_rate
    return config


def winograd(
    method: str, *, tile: int = 0, bits: int = 8, architecture: str = "resnet"
) -> tuple[dict, ...]:
    """Rules for `config.layers` that make a net Winograd-aware, as arXiv 2002.10711 does.

    Kernels, inputs, outputs and what is inside of transforms have the same bits, each site its own
    range around 0: the moving average of the largest magnitude. With 'tap' what is multiplied has a
    step for each tap, whose logarithm is learned, as LSQ's steps are, and rounded to a whole
    number; the sums of the products are not rounded (Andri et al., arXiv 2209.12982, which holds
    them in int32). Stem and head are float, convolutions of one tap direct. The architecture
    'resnet' is that of preset 'winograd'.

    Args:
      method: A key of `WINOGRAD`.
      tile: m of F(m, r), 0 for 4; maps of 4x4 pixels take no more than 4. Not for 'direct'.
      bits: Of each site, 2 to 8; 0: nothing is rounded.
      architecture: A key of `WINOGRAD_LAYERS`.

    Raises:
      UserError: on an unknown name, other bits, or a method that these leave nothing to do.
    """
    names.pick("method", method, WINOGRAD)
    tiled, small, others = names.pick("architecture", architecture, WINOGRAD_LAYERS)
    if bits not in (0, *range(2, 9)):
        raise UserError(f"bits={bits}: allowed 0 (float), 2 to 8")
    if bits == 0 and method in ("static-rounded", "tap"):
        raise UserError(f"bits=0 with method={method!r}: there is nothing to round; give bits")
    around = {"precision": f"minmax:w{bits}a{bits}so{bits}s"} if bits else {}
    direct = (dict(match=others, **around),) if bits else ()
    if method == "direct":
        if tile:
            raise UserError(f"tile={tile} with method='direct': it has no tiles; give 0")
        return (dict(match=tiled, **around), *direct) if bits else ()
    inside = {"precision": _inside(method, bits)} if bits else {}
    flex = ",flex" if method == "flex" else ""
    tiles = [(tiled, tile or 4)]
    if small and tiles[0][1] > 4:
        tiles.insert(0, (small, 4))
    return (*(dict(match=m, algorithm=f"winograd:{n}{flex}", **inside) for m, n in tiles), *direct)


def _inside(method: str, bits: int) -> str | dict[str, dict]:
    """The precision of a layer with transforms; the base of the transforms is not rounded."""
    if method != "tap":
        transforms = "" if method == "static" else f"t{bits}"
        return f"minmax:w{bits}a{bits}si{bits}{transforms}o{bits}s"
    around = dict(method="minmax", bits=bits)
    taps = dict(method="lsq", bits=bits, per="tap", power_of_two=True, log_step=True)
    return dict(
        kernel=around,
        **dict.fromkeys(("input", "output"), around | {"signed": True}),
        **dict.fromkeys(("transformed_input", "transformed_kernel"), taps),
    )


# Nets that a detector stands on, by the name that configs give them: options of `models.ssd.SSD`.
BACKBONES = {
    "vgg16": dict(backbone="vgg", layout="D"),
    "vgg7": dict(backbone="vgg", layout="Q7"),
    "resnet18": dict(backbone="resnet", depth=18),
    "resnet50": dict(backbone="resnet", depth=50),
    "mobilenet": dict(backbone="mobilenet"),
}
# A detector's convolutions whose maps are large: a batch norm of a branch needs many values, which
# the levels behind the backbone do not have. Stem, shortcuts and heads stay linear too.
QUADRATIC_DETECTOR = dict(match=r"^(backbone|dense)/.*/(conv\d?|depthwise|pointwise)$", **QUADRATIC)


def ssd_voc(backbone: str = "vgg16"):
    """SSD300's recipe for Pascal VOC (arXiv 1512.02325, section 3.1), 07+12 for training.

    SGD with momentum 0.9, learning rate 1e-3 and twice that of biases, weight decay 5e-4, batch 32,
    120,000 steps, a tenth of the rate from 80,000 and from 100,000 on.

    Args:
      backbone: A key of `BACKBONES`.
    """
    config = configs.defaults()
    config.task = "detection"
    options = names.pick("the config's argument", backbone, BACKBONES)
    config.model = configs.model("ssd", **options)
    config.data.name = "voc/2007+2012"
    config.data.train = "train_2007+validation_2007+train_2012+validation_2012"
    config.data.test = "test_2007"
    config.data.image_size = 300
    config.data.flip = True
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 5e-4
    bias = dict(match=r"(^|/)bias$", learning_rate=2.0)
    config.optimizer.rules = (bias, *config.optimizer.rules)
    epoch = 16551 // 32  # steps
    config.train.epochs = 120_000 / epoch
    config.train.batch_size = config.evaluate.batch_size = 32
    config.schedule.name = "multistep"
    config.schedule.milestones = (80_000 / epoch, 100_000 / epoch)
    config.evaluate.every_epochs = config.checkpoint.every_epochs = 10.0
    return config


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


def enas(precision: str):
    """A net of cells, trained as ENAS's are (arXiv 1802.03268): SGD, a cosine with restarts.

    Where the operands are rounded the stem has kernels of 4 bits and the optimizer is Adam, as the
    binary, ternary and k-bit cells of the ENAS project have, from 5e-3 to 5e-5 where that goes from
    5e-2 to 5e-4; kernels of the stem and in cells stay in [-1, 1]. The precisions are better
    clipped ones: states of cells grow, and a gradient that goes straight through a value that is
    rounded to 1 grows with each layer.

    Args:
      precision: Of the operands, a short form; or 'searched' for one of `CELL_PRECISIONS` each.
    """
    config = configs.defaults()
    rounded = precision != "float"
    config.model = configs.model(
        "cells",
        precisions=CELL_PRECISIONS if precision == SEARCHED else (precision,),
        mix_precision="ternarize/clipped" if precision == SEARCHED else "",
        stem_precision="kbit:w4" if rounded else "float",
    )
    config.data.train, config.data.validation = "train[:90%]", "train[90%:]"
    if rounded:
        config.optimizer.name, config.optimizer.learning_rate = "adam", 5e-3
        latent = dict(match=r"^(stem|cells)/.*kernel", bound=1.0)
        config.optimizer.rules = (*map(dict, config.optimizer.rules), latent)
    else:
        config.optimizer.learning_rate, config.optimizer.nesterov = 0.05, True
        config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 5.0
    config.schedule.name = "restarts"
    config.schedule.end_value = config.optimizer.learning_rate / 100
    config.train.batch_size = 128
    return config


def cell_search(precision: str, strategy: str):
    """A search for a net of such cells.

    A searched precision is rewarded for bit operations too, as float is the best of all otherwise.
    """
    config = enas(precision)
    config.model.arc = ""
    config.search.strategy = strategy
    if precision == SEARCHED:
        config.search.reward = "cost_aware"
        config.search.cost_weight = 0.1 if strategy in ("darts", "gumbel") else 0.0
    return config


def sngan(dataset: str = "cifar10", *, neuron: str = "linear"):
    """A config of SNGAN at the size of its paper for CIFAR-10 (Miyato et al., arXiv 1802.05957).

    Adam with learning rate 2e-4, beta (0, 0.9), decayed linearly to 0 over 50,000 updates of the
    generator; 5 updates of the discriminator to each, with 64 images, 128 for the generator. The
    generator that is evaluated is a moving average, which is not the paper's.

    Args:
      dataset: The data set's name.
      neuron: Of all convolutions in residual blocks but the shortcuts. Other ones than 'linear'
        have a batch norm on their branches in the generator.
    """
    config = configs.defaults()
    config.task = "generation"
    config.model = configs.model("sngan")
    if neuron != "linear":
        config.layers = (
            dict(match=r"generator/blocks/.*/conv", neuron=neuron, norm="branch"),
            dict(match=r"discriminator/blocks/.*/conv", neuron=neuron),
        )
    config.data.name = dataset
    channels = 1 if dataset in ("mnist", "fashion_mnist") else 3
    config.data.mean = config.data.std = (0.5,) * channels
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b1, config.optimizer.b2 = 0.0, 0.9
    config.schedule.name = "poly"
    config.train.batch_size = 5 * 64
    config.train.epochs = 320.0
    config.train.ema = 0.999
    config.evaluate.every_epochs = 10.0
    config.checkpoint.every_epochs = 10.0
    return config
