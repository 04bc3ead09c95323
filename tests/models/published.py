"""Layer lists as papers and their code print them, and the list of a model of ours.

A layer is `(path, channels in, channels out, kernel, stride, output side)`, kernel 0 if dense.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_nets import layers


def traced(model, image_shape):
    """A model's layers in the order in which an image passes them."""
    found = []

    def observe(path, layer, x, y):
        geometry = layer.geometry
        square = geometry.kernel_size[0] if geometry.kernel_size else 0
        stride = geometry.strides[0] if geometry.strides else 1
        side = y.shape[1] if y.ndim == 4 else 1
        found.append((path, x.shape[-1], y.shape[-1], square, stride, side))

    watched = layers.watched(model, observe)
    nnx.eval_shape(lambda m, x: m(x), watched, jnp.zeros((1, *image_shape)))
    return found


def _block(path, before, after, stride, side, projects):
    """A basic block of ours calls its shortcut first."""
    shortcut = [(f"{path}/shortcut", before, after, 1, stride, side)] * projects
    return [
        *shortcut,
        (f"{path}/conv1", before, after, 3, stride, side),
        (f"{path}/conv2", after, after, 3, 1, side),
    ]


# arXiv 1512.03385, section 4.2, n = 3; with projections.
RESNET_20 = [
    ("stem", 3, 16, 3, 1, 32),
    *_block("stage1/0", 16, 16, 1, 32, False),
    *_block("stage1/1", 16, 16, 1, 32, False),
    *_block("stage1/2", 16, 16, 1, 32, False),
    *_block("stage2/0", 16, 32, 2, 16, True),
    *_block("stage2/1", 32, 32, 1, 16, False),
    *_block("stage2/2", 32, 32, 1, 16, False),
    *_block("stage3/0", 32, 64, 2, 8, True),
    *_block("stage3/1", 64, 64, 1, 8, False),
    *_block("stage3/2", 64, 64, 1, 8, False),
    ("head", 64, 10, 0, 1, 1),
]
# arXiv 1512.03385, table 1, and torchvision's resnet18.
RESNET_18 = [
    ("stem", 3, 64, 7, 2, 112),
    *_block("stage1/0", 64, 64, 1, 56, False),
    *_block("stage1/1", 64, 64, 1, 56, False),
    *_block("stage2/0", 64, 128, 2, 28, True),
    *_block("stage2/1", 128, 128, 1, 28, False),
    *_block("stage3/0", 128, 256, 2, 14, True),
    *_block("stage3/1", 256, 256, 1, 14, False),
    *_block("stage4/0", 256, 512, 2, 7, True),
    *_block("stage4/1", 512, 512, 1, 7, False),
    ("head", 512, 10, 0, 1, 1),
]

# WinogradAwareNets' ResNet-18 (arXiv 2002.10711), half as wide but for the stem: 2x2 maxima in
# front of stages 2 to 4, and no stride.
WINOGRAD_18 = [
    ("stem", 3, 32, 3, 1, 32),
    *_block("stage1/0", 32, 32, 1, 32, False),
    *_block("stage1/1", 32, 32, 1, 32, False),
    *_block("stage2/0", 32, 64, 1, 16, True),
    *_block("stage2/1", 64, 64, 1, 16, False),
    *_block("stage3/0", 64, 128, 1, 8, True),
    *_block("stage3/1", 128, 128, 1, 8, False),
    *_block("stage4/0", 128, 256, 1, 4, True),
    *_block("stage4/1", 256, 256, 1, 4, False),
    ("head", 256, 10, 0, 1, 1),
]


def bases(block_layers, number):
    """The list of a Group-Net: stem and head once, each block `number` times."""
    found, blocks = [], {}
    for path, *rest in block_layers:
        block, _, name = path.rpartition("/")
        blocks.setdefault(block or path, []).append((name, rest))
    for block, members in blocks.items():
        for base in range(number if "/" in block else 1):
            prefix = f"{block}/bases/{base}/" if "/" in block else ""
            found += [(prefix + name, *rest) for name, rest in members]
    return found


CIFAR, IMAGENET = (("depth", 20),), (("layout", "imagenet"), ("depth", 18))
# By preset and options.
RESNETS = (
    {
        (preset, options): net
        for preset in ("torchvision", "xnor", "dorefa", "pact", "lq", "fixup")
        for options, net in ((CIFAR, RESNET_20), (IMAGENET, RESNET_18))
    }
    | {
        # arXiv 1808.00278, figure 3: pooled in front of the shortcut's convolution.
        ("bireal", options): [
            (name, before, after, kernel, 1 if "shortcut" in name else stride, side)
            for name, before, after, kernel, stride, side in net
        ]
        for options, net in ((CIFAR, RESNET_20), (IMAGENET, RESNET_18))
    }
    | {("winograd", (("depth", 18), ("width", 0.5))): WINOGRAD_18}
    | {("groupnet", CIFAR): bases(RESNET_20, 5), ("groupnet", IMAGENET): bases(RESNET_18, 5)}
)


def inverted(table, stem_stride, side):
    """MobileNetV2 by its table, of (expansion, channels, blocks, stride) rows."""
    side //= stem_stride
    found, before, index = [("stem", 3, 32, 3, stem_stride, side)], 32, 0
    for expansion, channels, number, first in table:
        for stride in (first, *(1,) * (number - 1)):
            path, hidden = f"blocks/{index}", before * expansion
            if expansion > 1:
                found.append((f"{path}/expand", before, hidden, 1, 1, side))
            side //= stride
            found.append((f"{path}/depthwise", hidden, hidden, 3, stride, side))
            found.append((f"{path}/project", hidden, channels, 1, 1, side))
            before, index = channels, index + 1
    return [*found, ("last", before, 1280, 1, 1, side), ("head", 1280, 10, 0, 1, 1)]


# arXiv 1801.04381, table 2.
TABLE = [
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
]


def separable(rows):
    """MobileNet at 224 pixels by its table, of (channels, stride) rows of two layers each."""
    found, before, side = [("stem", 3, 32, 3, 2, 112)], 32, 112
    for index, (channels, stride) in enumerate(rows):
        side //= stride
        found.append((f"blocks/{index}/depthwise", before, before, 3, stride, side))
        found.append((f"blocks/{index}/pointwise", before, channels, 1, 1, side))
        before = channels
    return [*found, ("head", before, 10, 0, 1, 1)]


# arXiv 1704.04861, table 1; the last stride, 2 there on a map of 7x7 that stays 7x7, is 1.
SEPARABLE = [
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
]


def grouped_bottlenecks(cardinality, base_width, blocks):
    """ResNeXt for CIFAR, arXiv 1611.05431, section 5.3: C x d, so many blocks a stage."""
    found, before, side = [("stem", 3, 64, 3, 1, 32)], 64, 32
    for stage in (1, 2, 3):
        inner, after = cardinality * base_width * 2 ** (stage - 1), 128 * 2**stage
        for index in range(blocks):
            path, stride = f"stage{stage}/{index}", 2 if stage > 1 and index == 0 else 1
            if index == 0:
                found.append((f"{path}/shortcut", before, after, 1, stride, side // stride))
            found.append((f"{path}/conv1", before, inner, 1, 1, side))
            side //= stride
            found.append((f"{path}/conv2", inner, inner, 3, stride, side))
            found.append((f"{path}/conv3", inner, after, 1, 1, side))
            before = after
    return [*found, ("head", before, 10, 0, 1, 1)]


def fires(stem_stride, sides):
    """SqueezeNet v1.1 by its authors' prototxt, on maps of these sides."""
    table = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
    found, before = [("stem", 3, 64, 3, stem_stride, sides[0])], 64
    for index, ((squeezed, expanded), side) in enumerate(zip(table, sides[1:], strict=True)):
        path = f"blocks/{index}"
        found.append((f"{path}/squeeze", before, squeezed, 1, 1, side))
        found.append((f"{path}/expand1", squeezed, expanded, 1, 1, side))
        found.append((f"{path}/expand3", squeezed, expanded, 3, 1, side))
        before = 2 * expanded
    return [*found, ("head", before, 10, 1, 1, sides[-1])]


# By model, options and image side.
OTHERS = {
    ("mobilenet", "v1", 224): separable(SEPARABLE),
    ("mobilenet_v2", "imagenet", 224): inverted(TABLE, 2, 224),
    ("mobilenet_v2", "cifar", 32): inverted([TABLE[0], (6, 24, 2, 1), *TABLE[2:]], 1, 32),
    ("resnext", "", 32): grouped_bottlenecks(8, 16, 2),
    ("squeezenet", "imagenet", 224): fires(2, (112, 56, 56, 28, 28, *(14,) * 4)),
    ("squeezenet", "cifar", 32): fires(1, (32, 32, 32, 16, 16, *(8,) * 4)),
    # LQ-Nets, arXiv 1807.10029: 2x(128C3), MP2, 2x(256C3), MP2, 2x(512C3), MP2, dense.
    ("vgg", "small", 32): [
        ("stage1/0/conv", 3, 128, 3, 1, 32),
        ("stage1/1/conv", 128, 128, 3, 1, 32),
        ("stage2/0/conv", 128, 256, 3, 1, 16),
        ("stage2/1/conv", 256, 256, 3, 1, 16),
        ("stage3/0/conv", 256, 512, 3, 1, 8),
        ("stage3/1/conv", 512, 512, 3, 1, 8),
        ("head", 512 * 4 * 4, 10, 0, 1, 1),
    ],
    # The authors' CIFAR-10 net of arXiv 1312.4400.
    ("nin", "", 32): [
        ("stem", 3, 192, 5, 1, 32),
        ("blocks/0/conv", 192, 160, 1, 1, 32),
        ("blocks/1/conv", 160, 96, 1, 1, 32),
        ("blocks/2/conv", 96, 192, 5, 1, 16),
        ("blocks/3/conv", 192, 192, 1, 1, 16),
        ("blocks/4/conv", 192, 192, 1, 1, 16),
        ("blocks/5/conv", 192, 192, 3, 1, 8),
        ("blocks/6/conv", 192, 192, 1, 1, 8),
        ("head", 192, 10, 1, 1, 8),
    ],
}
