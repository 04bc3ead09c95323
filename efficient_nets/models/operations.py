"""What an operand of a cell can be: named maps `(N, H, W, C)` to the same shape.

An operation is a text: a name in `OPERATIONS`, and behind it fields of `LayerSpec` that its layers
have: 'sep3', 'sep5|neuron=ours|norm=branch', 'conv3|algorithm=winograd:2,flex'. The precision is
not among them: it is chosen for each operand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, Layer, LayerSpec, kaiming_normal
from efficient_nets.layers import layer_norm_act as unit
from efficient_nets.models import parts
from efficient_nets.ops.precision import Precision
from efficient_nets.ops.precision import parse as parse_precision

FIELDS = tuple(
    f.name for f in dataclasses.fields(LayerSpec) if f.name not in ("precision", "joint")
)


# Methods whose kernels live in [-1, 1], whatever the layer's size, and start all over it, as in the
# BinaryNet family: those of a wide layer that start by its size would all be rounded to 0.
IN_FIXED_RANGE = ("binarize", "ternarize", "kbit")


def all_over(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Uniformly in [-1, 1]."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


def kernel_init(spec: LayerSpec):
    """Where kernels of a layer of cells start: He et al.'s normal, or uniformly in [-1, 1]."""
    rounds = spec.precision.kernel
    if rounds is None or rounds.method not in IN_FIXED_RANGE:
        return kaiming_normal
    return all_over


def pointwise(in_features: int, features: int, spec: LayerSpec, *, rngs: nnx.Rngs) -> Dense:
    """A 1x1 convolution. Of type Dense: a `lax.conv` in a branch is many times as slow on CPUs.

    Without a window it is direct, and nothing is rounded inside of transforms.
    """
    inner = dict.fromkeys(spec.precision.inner)
    precision = dataclasses.replace(spec.precision, **inner)
    spec = dataclasses.replace(spec, algorithm="direct", precision=precision)
    init = dict(use_bias=False, kernel_init=kernel_init(spec))
    return Dense(in_features, features, spec=spec, rngs=rngs, **init)


def of_dense(precision: str) -> Precision:
    """The same of a plain dense layer, which has neither transforms nor cores to round."""
    found = parse_precision(precision)
    return dataclasses.replace(found, core=None, **dict.fromkeys(found.inner))


def activated(x: Array, activation: parts.Activation, layer: Layer) -> Array:
    """x as a layer behind an activation reads it: a quantizer of its input is the activation."""
    return x if layer.spec.precision.input is not None else activation(x)


class Separable(nnx.Module):
    """`times` times [activation, depthwise convolution, pointwise convolution, batch norm].

    As ENAS has it (arXiv 1802.03268, section 2.4, and its code), twice. The precision rounds what
    the depthwise convolution reads, where it then stands in for the activation, and both kernels.

    Args:
      features: C.
      spec: Of both layers; the algorithm is the depthwise one's.
      activation: In front of each pair.
      kernel: Of the window.
      dilation: Likewise.
      times: How many pairs there are.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        features: int,
        spec: LayerSpec,
        activation: parts.Activation,
        *,
        kernel: int,
        dilation: int = 1,
        times: int = 2,
        rngs: nnx.Rngs,
    ):
        self.activation, self.times = activation, times
        behind = dataclasses.replace(spec.precision, input=None)
        behind = dataclasses.replace(spec, precision=behind)
        for number in range(1, times + 1):
            depthwise = Conv(
                features,
                features,
                (kernel, kernel),
                padding=dilation * (kernel // 2),
                dilation=dilation,
                groups=features,
                use_bias=False,
                kernel_init=kernel_init(spec),
                spec=spec,
                rngs=rngs,
            )
            setattr(self, f"depthwise{number}", depthwise)
            setattr(self, f"pointwise{number}", pointwise(features, features, behind, rngs=rngs))
            setattr(self, f"pointwise{number}_norm", BatchNorm(features, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        for number in range(1, self.times + 1):
            depthwise = getattr(self, f"depthwise{number}")
            x = unit(activated(x, self.activation, depthwise), depthwise)
            name = f"pointwise{number}"
            x = unit(x, getattr(self, name), getattr(self, f"{name}_norm"))
        return x


class Convolution(nnx.Module):
    """[activation, convolution, batch norm].

    Args:
      features, spec, activation, kernel, rngs: As in `Separable`.
    """

    def __init__(
        self,
        features: int,
        spec: LayerSpec,
        activation: parts.Activation,
        *,
        kernel: int,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        if kernel == 1:
            self.conv = pointwise(features, features, spec, rngs=rngs)
        else:
            window = dict(padding=kernel // 2, use_bias=False, kernel_init=kernel_init(spec))
            self.conv = Conv(features, features, (kernel,) * 2, spec=spec, rngs=rngs, **window)
        self.norm = BatchNorm(features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return unit(activated(x, self.activation, self.conv), self.conv, self.norm)


class Function(nnx.Module):
    """A function without parameters, which nothing rounds."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x: Array) -> Array:
        return self.function(x)


def _windows3(x: Array, combine, filler: float) -> Array:
    """3x3 windows at stride 1, rows and then columns: quicker on CPUs than `reduce_window`."""
    for axis in (1, 2):
        pads = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, pads, constant_values=filler)
        shifted = (lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(3))
        x = functools.reduce(combine, shifted)
    return x


def max3(x: Array) -> Array:
    """Maximum over 3x3 windows at stride 1, of what there is of those at the edge."""
    return _windows3(x, jnp.maximum, -jnp.inf)


def mean3(x: Array) -> Array:
    """Mean over 3x3 windows at stride 1, of what there is of those at the edge."""
    rows, columns = (
        sum(np.pad(np.ones(n, np.float32), 1)[i : i + n] for i in range(3)) for n in x.shape[1:3]
    )
    share = jnp.asarray(1 / np.outer(rows, columns)[None, :, :, None], x.dtype)
    return _windows3(x, jnp.add, 0.0) * jnp.broadcast_to(share, x.shape)


def _same(x: Array) -> Array:
    return x


# Functions have no layers; others are `(features, spec, activation, *, rngs) -> Module`.
OPERATIONS = {
    "sep3": functools.partial(Separable, kernel=3),
    "sep5": functools.partial(Separable, kernel=5),
    "sep7": functools.partial(Separable, kernel=7),
    "dil3": functools.partial(Separable, kernel=3, dilation=2, times=1),  # arXiv 1806.09055
    "dil5": functools.partial(Separable, kernel=5, dilation=2, times=1),
    "conv1": functools.partial(Convolution, kernel=1),
    "conv3": functools.partial(Convolution, kernel=3),
    "conv5": functools.partial(Convolution, kernel=5),
    "avg3": mean3,
    "max3": max3,
    "identity": _same,
}
WITHOUT_LAYERS = tuple(
    name for name, op in OPERATIONS.items() if not isinstance(op, functools.partial)
)
IDENTITY = "identity"


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a text says.

    Attributes:
      name: A key of `OPERATIONS`.
      fields: Of `LayerSpec`, with their texts.
    """

    name: str
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def has_layers(self) -> bool:
        return self.name not in WITHOUT_LAYERS

    def spec(self, precision: str) -> LayerSpec:
        return LayerSpec(**dict(self.fields), precision=precision)

    def make(
        self, features: int, precision: str, activation: parts.Activation, rngs: nnx.Rngs
    ) -> nnx.Module:
        """A module with fresh parameters, at one precision."""
        found = OPERATIONS[self.name]
        if not self.has_layers:
            return Function(found)
        return found(features, self.spec(precision), activation, rngs=rngs)

    def ways(
        self, features: int, precisions, activation: parts.Activation, rngs: nnx.Rngs
    ) -> list[nnx.Module]:
        """One for each precision, of the same kernels and norms.

        Each has ranges and learned transforms of its own. Where nothing is rounded, one in all.
        """
        if not self.has_layers:
            precisions = precisions[:1]
        first, *others = (self.make(features, p, activation, rngs) for p in precisions)
        for other in others:
            for name, own in vars(first).items():
                if isinstance(own, BatchNorm):
                    setattr(other, name, own)
                elif isinstance(own, Layer):
                    _share(own, getattr(other, name), rngs)
        return [first, *others]


def _share(layer: Layer, other: Layer, rngs: nnx.Rngs) -> None:
    for name in layer.spec.branches:
        setattr(other, name, getattr(layer, name))
    other.bias = nnx.data(layer.bias)
    other.remake_ranges(rngs)


def parse(text: str) -> Operation:
    """An operation of its text, see above.

    Raises:
      UserError: on a name or field that is not known, or a field of an operation without layers.
    """
    name, *fields = text.split("|")
    names.pick("model.ops", name, OPERATIONS)
    pairs = [field.partition("=")[::2] for field in fields]
    names.check_fields(f"model.ops: {text!r}", dict(pairs), FIELDS)
    if pairs and name in WITHOUT_LAYERS:
        raise UserError(f"model.ops: {text!r}: {name!r} has no layers that could have fields")
    try:
        LayerSpec(**dict(pairs))
    except UserError as error:
        raise UserError(f"model.ops: {text!r}: {error}") from error
    return Operation(name, tuple(pairs))
