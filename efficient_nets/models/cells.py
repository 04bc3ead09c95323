"""Nets of two cells, normal and reduction (the micro space of ENAS, arXiv 1802.03268).

One class is both nets: with an architecture, the net of that; without, the shared net, whose
weights serve all architectures, and whose architecture is data:

    net = models.create("cells", arc="", ...)
    net.architecture[...] = net.space.random(key)  # one compiled step serves all of them
    fixed = cells.extract(net, tokens)  # models.create("cells", arc=space.text(tokens), ...)

For a search by gradient its operands are multiplied with gates, or it is the mixture of all:

    net.gates = nnx.data(relaxation.gates(choices, tokens))  # where the loss is taken
    net = models.create("cells", arc="", mixes=True, ...)  # the same weights
    net.choose(probabilities)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, LayerSpec, layer_norm_act
from efficient_nets.layers.collect import add, wanted
from efficient_nets.models import operations, parts
from efficient_nets.models.operands import Choice, Style, spec_of
from efficient_nets.models.operations import pointwise
from efficient_nets.models.space import OP, OPS, Choices, Space
from efficient_nets.ops import linear_maps

# The one that ENAS found on CIFAR-10 with B = 5, of its published training script.
ENAS_ARC = "0 2 0 0 0 4 0 1 0 4 1 1 1 0 0 1 0 2 1 1 1 0 1 0 0 3 0 2 1 1 3 1 1 0 0 4 0 3 1 1"
STEM = 3  # times the features of the first cells
REDUCTIONS = {3: "[d, 2 d + 1, L], d = L // 4", 2: "[d, 2 d + 1], d = L // 3 (ENAS)"}
AUXILIARY = (128, 768)  # channels of the auxiliary head


class Architecture(nnx.Variable):
    """The tokens of a shared net's architecture, int32 `(2, B, 2, 3)`: data, not trained."""


class Probabilities(nnx.Variable):
    """Of a net that mixes, one of the arrays of `space.Choices`: data, not trained with weights."""


class Draws(nnx.RngState):
    """Of drop-path: key data, and the number of training calls so far."""


class Projection(nnx.Module):
    """[activation, 1x1 convolution, batch norm]: to other channels."""

    def __init__(self, in_features: int, features: int, style: Style, *, rngs: nnx.Rngs):
        self.activation = style.activation
        self.conv = pointwise(in_features, features, style.mix, rngs=rngs)
        self.norm = BatchNorm(features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = operations.activated(x, self.activation, self.conv)
        return layer_norm_act(x, self.conv, self.norm)


class FactorizedReduction(nnx.Module):
    """Half the height and width: every other pixel, and every other one moved by one pixel.

    Each goes through a 1x1 convolution to half of the channels; both are joined, batch norm.

    Args:
      in_features: Channels of the input.
      features: An even number.
      style: Of the net.
      activates: Whether an activation is in front.
      rngs: Source of the initial values.
    """

    def __init__(
        self, in_features: int, features: int, style: Style, *, activates: bool, rngs: nnx.Rngs
    ):
        self.activation = style.activation if activates else parts.activation("none")
        self.conv1 = pointwise(in_features, features // 2, style.mix, rngs=rngs)
        self.conv2 = pointwise(in_features, features // 2, style.mix, rngs=rngs)
        self.norm = BatchNorm(features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`(N, H, W, in_features)` to `(N, ceil(H / 2), ceil(W / 2), features)`."""
        x = operations.activated(x, self.activation, self.conv1)
        moved = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
        halves = [
            layer_norm_act(part[:, ::2, ::2], conv)
            for part, conv in ((x, self.conv1), (moved, self.conv2))
        ]
        return self.norm(jnp.concatenate(halves, axis=-1))


class Node(nnx.Module):
    """The sum of two operands."""

    def __init__(self, x: nnx.Module, y: nnx.Module):
        self.x, self.y = x, y


class Cell(nnx.Module):
    """B nodes on two inputs; the nodes that none reads, mixed by 1x1 convolutions, are its value.

    With `reduces`, a factorized reduction of the second input comes first, and the first input is
    then what that was made of. Inputs of another shape than the cell's are brought to it.

    Attributes:
      reduce, first, second: Modules that bring inputs to the cell's shape, or None.
      nodes: Of two operands each.
      end0, end1, ...: The 1x1 convolution of each node that can be a loose end, or None.
      end_norm: Behind their sum.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        features: int,
        style: Style,
        tokens: np.ndarray | None,
        unused: np.ndarray | None,
        *,
        reduces: bool,
        rngs: nnx.Rngs,
    ):
        before, x = shapes
        self.activation = style.activation
        self.reduce = self.first = self.second = nnx.data(None)
        if reduces:
            made = FactorizedReduction(x[0], features, style, activates=False, rngs=rngs)
            self.reduce, before, x = made, x, (features, x[1] + 1)
        if before[1] != x[1]:
            self.first = FactorizedReduction(before[0], features, style, activates=True, rngs=rngs)
        elif before[0] != features:
            self.first = Projection(before[0], features, style, rngs=rngs)
        if x[0] != features:
            self.second = Projection(x[0], features, style, rngs=rngs)
        # What the next cell is given; its second number counts halvings.
        self.shapes = (x, (features, x[1]))
        nodes = []
        for number in range(style.space.nodes):
            operands = []
            for operand in range(2):
                if tokens is None:
                    operands.append(style.operand(number + 2, features, style, rngs))
                else:
                    at, op, precision = map(int, tokens[number, operand])
                    precision = style.space.precisions[precision]
                    op = style.ops[op].make(features, precision, style.activation, rngs)
                    operands.append(Choice(at, op))
            nodes.append(Node(*operands))
        self.nodes = nnx.List(nodes)
        for number in range(style.space.nodes):
            end = None
            if unused is None or unused[number]:
                end = pointwise(features, features, style.mix, rngs=rngs)
            setattr(self, f"end{number}", nnx.data(end))
        self.end_norm = BatchNorm(features, rngs=rngs)

    def __call__(self, before: Array, x: Array, tokens, unused, factors) -> tuple[Array, Array]:
        """What the next cell is given: the second input, and the value.

        Args:
          before, x: `(N, H, W, C)`.
          tokens: `(B, 2, 3)`, by node and operand; of mixtures `Choices` of arrays `(B, 2, ...)`.
          unused: `(B,)`, the loose ends, of mixtures how probable each is.
          factors: What multiplies each sample of each operand, `(B, 2, N or 1)`, or None.
        """
        if self.reduce is not None:
            before, x = x, self.reduce(x)
        states = [
            state if module is None else module(state)
            for module, state in ((self.first, before), (self.second, x))
        ]
        for number, node in enumerate(self.nodes):
            operands = []
            for operand, module in enumerate((node.x, node.y)):
                value = module(states, _at(tokens, (number, operand)))
                if factors is not None:
                    value = _times(value, factors[number, operand][:, None, None, None])
                operands.append(value)
            states.append(operands[0] + operands[1])
        # A sum in place of one convolution of all loose ends joined: the same, of a fixed form.
        ends = []
        for number, state in enumerate(states[2:]):
            end = getattr(self, f"end{number}")
            if end is not None:
                value = layer_norm_act(operations.activated(state, self.activation, end), end)
                ends.append(_times(value, unused[number]))
        return x, self.end_norm(sum(ends[1:], ends[0]))


def _times(x: Array, factor: Array) -> Array:
    """x times a factor of a few numbers, whose gradient is a sum over x: in at least float32."""
    wide = linear_maps.wide(x.dtype)
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


def _at(tree, place):
    return jax.tree.map(lambda leaf: leaf[place], tree)


class AuxiliaryHead(nnx.Module):
    """Logits from the middle of the net, for a loss in training alone, as ENAS's code has it.

    Activation, mean over 5x5 windows at stride 3, 1x1 convolution to 128 channels, one of the size
    of the map to 768, and the classifier; norm and activation behind both convolutions.

    Args:
      in_features: Channels of the input.
      size: Its height and width, at least.
      num_classes: Number of logits.
      activation: The function.
      rngs: Source of the initial values.
    """

    def __init__(self, in_features: int, size, num_classes: int, activation, *, rngs: nnx.Rngs):
        self.activation, self.window = activation, tuple(min(5, n) for n in size)
        left = tuple((n - window) // 3 + 1 for n, window in zip(size, self.window, strict=True))
        project, hidden = AUXILIARY
        self.project = pointwise(in_features, project, LayerSpec(), rngs=rngs)
        self.project_norm = BatchNorm(project, rngs=rngs)
        self.hidden = Conv(project, hidden, left, padding="VALID", use_bias=False, rngs=rngs)
        self.hidden_norm = BatchNorm(hidden, rngs=rngs)
        self.head = parts.head(hidden, num_classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        zero, window = np.zeros((), x.dtype), (1, *self.window, 1)
        x = lax.reduce_window(self.activation(x), zero, lax.add, window, (1, 3, 3, 1), "VALID")
        x = x / jnp.asarray(np.prod(self.window), x.dtype)
        x = layer_norm_act(x, self.project, self.project_norm, self.activation)
        x = layer_norm_act(x, self.hidden, self.hidden_norm, self.activation)
        return self.head(parts.global_mean(x))


class Cells(nnx.Module):
    """3x3 `stem` to 3 F channels, L + 2 `cells`, activation, global mean, `head`.

    Cells have F features, twice as many from each reduction cell on. A cell reads the values of the
    two cells in front of it; the first one reads the stem twice.

    Batch norms of a shared net are by operand, operation and input, for all precisions together, as
    ENAS has its scales and biases; so are running averages. Those are of all architectures that
    were trained, so make them anew for the one that is evaluated: `layers.batch_moments`, which is
    compiled once for all of them, or train mode, as ENAS does.

    Args:
      image_shape: `(H, W, C)`, at least 2^reductions pixels.
      num_classes: Number of logits.
      arc: The architecture, a string that `space.Space.parse` reads; '' is the shared net of all.
      nodes: B, of a cell.
      layers: L; the net has two cells more.
      features: F.
      width: Multiplies F.
      reductions: How many reduction cells, a key of `REDUCTIONS`, which says where they are.
      ops: What tokens of operations mean, texts of `operations`.
      precisions: What tokens of precisions mean, short forms; of what the operations' layers round.
      shared_precision: Whether all operands have one precision.
      stem_precision: A short form, of the stem.
      mix_precision: Likewise, of all 1x1 convolutions that are no operands; '' is the first one of
        `precisions`.
      auxiliary: Weight of an auxiliary head's loss, behind the cell that follows the last reduction
        cell, or the last one; 0: none. `layers.collecting("auxiliary")` gets its logits.
      drop_path: 1 - p, the probability with which the last cell leaves an operand that is not the
        identity out for a sample in training; cell i (from 0) of n with (i + 1) / n of that.
        Of mixtures the whole is left out, as the operand that it is.
      drop_path_steps: Steps over which it grows from 0; 0: it is there from the first one on.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`. Where a layer rounds its
        input, that is its activation.
      mixes: Whether a shared net is the mixture of all its operations on all states, by the
        probabilities `choices`, which are uniform at first; see `operands.Mixture`. Each loose end
        then counts as it is probable.
      rngs: Source of the initial values.

    Attributes:
      gates: What multiplies operands in the calls that follow, `(2, B, 2)` by cell, node and
        operand, or None. An array as it is, which checkpoints do not expect: whoever takes a
        gradient to them sets it on a net that is merged for that call.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        arc: str = ENAS_ARC,
        nodes: int = 5,
        layers: int = 15,
        features: int = 16,
        width: float = 1.0,
        reductions: int = 3,
        ops: tuple[str, ...] = OPS,
        precisions: tuple[str, ...] = ("float",),
        shared_precision: bool = False,
        stem_precision: str = "float",
        mix_precision: str = "",
        auxiliary: float = 0.0,
        drop_path: float = 0.0,
        drop_path_steps: int = 0,
        activation: str = "relu",
        mixes: bool = False,
        rngs: nnx.Rngs,
    ):
        self.space = Space(nodes, tuple(ops), tuple(precisions), shared_precision)
        style = Style(self.space, activation, mix_precision, mixes)
        self.places = reduction_places(layers, reductions)
        parts.check_size(image_shape, halvings=len(self.places))
        for field, value, high in (("auxiliary", auxiliary, None), ("drop_path", drop_path, 1)):
            if value < 0 or (high is not None and value >= high):
                allowed = "0 or more" if high is None else f"0 or more, below {high}"
                raise UserError(f"model.{field}={value}: must be {allowed}")
        for field, value, least in (
            ("drop_path_steps", drop_path_steps, 0),
            ("features", features, 1),
        ):
            if value < least:
                raise UserError(f"model.{field}={value}: must be at least {least}")
        self.activation, self.auxiliary = style.activation, float(auxiliary)
        self.drop_path, self.drop_path_steps = float(drop_path), drop_path_steps
        self.deterministic = False
        if arc and mixes:
            raise UserError("model.mixes=True: allowed of the shared net alone, arc=''")
        if not arc:
            style.check_shared()
        tokens = self.space.parse(arc) if arc else None
        self.arc = "" if tokens is None else self.space.text(tokens)
        self.architecture = self.choices = self.gates = nnx.data(None)
        if mixes:
            uniform = self.space.uniform._asdict()
            self.choices = nnx.Dict({name: Probabilities(x) for name, x in uniform.items()})
        if not arc:  # of a mixture too, whose state is then that of any shared net, and more
            self.architecture = Architecture(jnp.zeros(self.space.shape, jnp.int32))
        self.seed = self.calls = nnx.data(None)
        channels, features = STEM * parts.scaled(features, width), parts.scaled(features, width)
        spec = spec_of("stem_precision", stem_precision)
        self.stem = Conv(
            image_shape[-1],
            channels,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=operations.kernel_init(spec),
            spec=spec,
            rngs=rngs,
        )
        self.stem_norm = BatchNorm(channels, rngs=rngs)
        shapes = ((channels, 0), (channels, 0))
        unused = None if tokens is None else _unused(self.space, tokens)
        cells = []
        self.auxiliary_head = nnx.data(None)
        self.auxiliary_at = min(self.places[-1] + 1, layers + 1)
        for number in range(layers + 2):
            reduces = number in self.places
            features *= 1 + reduces
            kind = int(reduces)
            given = (None, None) if tokens is None else (tokens[kind], unused[kind])
            cell = Cell(shapes, features, style, *given, reduces=reduces, rngs=rngs)
            cells.append(cell)
            shapes = cell.shapes
            if auxiliary and number == self.auxiliary_at:
                size = [-(-side // 2 ** shapes[1][1]) for side in image_shape[:2]]
                self.auxiliary_head = AuxiliaryHead(
                    features, size, num_classes, self.activation, rngs=rngs
                )
        self.cells = nnx.List(cells)
        self.head = parts.head(features, num_classes, rngs=rngs)
        if drop_path:
            self.seed = Draws(jax.random.key_data(rngs.params()))
            self.calls = Draws(jnp.zeros((), jnp.int32))

    @property
    def tokens(self) -> Array | np.ndarray | Choices:
        """int32 `(2, B, 2, 3)`: the architecture's; `Choices` of a net that mixes."""
        if self.choices is not None:
            return Choices(**{name: array[...] for name, array in self.choices.items()})
        return self.space.parse(self.arc) if self.arc else self.architecture[...]

    def choose(self, choices: Choices) -> None:
        """Sets the probabilities of a net that mixes."""
        for name, array in choices._asdict().items():
            self.choices[name][...] = array

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        return self.classified(self.stemmed(images))

    def stemmed(self, images: Array) -> Array:
        """What the first cell reads, the same for all architectures."""
        return layer_norm_act(images, self.stem, self.stem_norm)

    def classified(self, x: Array) -> Array:
        """What the stem gave to logits."""
        tokens = self.tokens
        mixes = self.choices is not None
        unused = tokens.unused if mixes else self.space.unused(jnp.asarray(tokens))
        before, drop = x, self._drop(tokens, len(x))
        for number, cell in enumerate(self.cells):
            kind = int(number in self.places)
            factors = None if drop is None else drop[number]
            if self.gates is not None:
                gates = self.gates[kind][..., None]
                factors = gates if factors is None else factors.astype(gates.dtype) * gates
            before, x = cell(before, x, _at(tokens, kind), unused[kind], factors)
            if self.auxiliary_head is not None and number == self.auxiliary_at:
                if wanted("auxiliary"):
                    add("auxiliary", self, self.auxiliary_head(x))
        return self.head(parts.global_mean(self.activation(x)))

    def _drop(self, tokens, samples: int) -> Array | None:
        """Factors `(cells, B, 2, N)`: 0, or 1 / keep; 1 for identities. None if nothing drops.

        keep = 1 - (i + 1) / n * drop_path of cell i of n, times the share of the ramp that is over
        (arXiv 1605.07648; ENAS's code).
        """
        if self.calls is None or self.deterministic:
            return None
        count = len(self.cells)
        key = jax.random.fold_in(jax.random.wrap_key_data(self.seed[...]), self.calls[...])
        ramp = jnp.ones((), jnp.float32)
        if self.drop_path_steps:
            made = (self.calls[...] + 1).astype(jnp.float32)
            ramp = jnp.minimum(made / self.drop_path_steps, 1.0)
        self.calls[...] = self.calls[...] + 1
        depth = jnp.arange(1, count + 1, dtype=jnp.float32) / count
        keep = (1 - depth * self.drop_path * ramp)[:, None, None, None]
        shape = (count, self.space.nodes, 2, samples)
        keep = jnp.broadcast_to(keep, shape)
        factor = jnp.where(jax.random.uniform(key, shape, jnp.float32) < keep, 1 / keep, 0.0)
        if self.choices is not None:  # a mixture is no identity
            return factor
        stays = [operations.parse(op).name == operations.IDENTITY for op in self.space.ops]
        stays = jnp.asarray(stays)[jnp.asarray(tokens)[..., OP]]
        kinds = jnp.asarray([int(number in self.places) for number in range(count)], jnp.int32)
        return jnp.where(jnp.broadcast_to(stays[kinds][..., None], shape), 1.0, factor)


def _unused(space: Space, tokens: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():  # a net is made under jit too
        return np.asarray(space.unused(jnp.asarray(tokens)))


def reduction_places(layers: int, reductions: int = 3) -> tuple[int, ...]:
    """Which of the L + 2 cells are reduction cells, see `REDUCTIONS`; fewer in very short nets.

    Raises:
      UserError: on fewer than one layer, or another number of reductions.
    """
    if layers < 1:
        raise UserError(f"model.layers={layers}: must be at least 1")
    if reductions not in REDUCTIONS:
        raise UserError(f"model.reductions={reductions}: allowed {', '.join(map(str, REDUCTIONS))}")
    d = layers // (4 if reductions == 3 else 3)
    return tuple(sorted({d, 2 * d + 1, layers} if reductions == 3 else {d, 2 * d + 1}))


def extract(net: Cells, architecture) -> Cells:
    """The fixed net of an architecture, with the weights that a shared net has for it.

    It has the modules and the names of `models.create("cells", arc=net.space.text(architecture))`.

    Args:
      net: A shared net; it is left as it is.
      architecture: Tokens, as concrete numbers.

    Raises:
      UserError: on a net that is fixed already, or tokens that are not of its space.
    """
    if net.arc:
        raise UserError("the net has an architecture already: extract from a shared one, arc=''")
    tokens = net.space.check(architecture)
    unused = _unused(net.space, tokens)
    fixed = nnx.clone(net)
    fixed.arc = net.space.text(tokens)
    fixed.architecture = fixed.choices = fixed.gates = nnx.data(None)
    for number, cell in enumerate(fixed.cells):
        kind = int(number in fixed.places)
        for index, node in enumerate(cell.nodes):
            node.x, node.y = (
                operand.chosen(own)
                for operand, own in zip((node.x, node.y), tokens[kind, index], strict=True)
            )
            if not unused[kind, index]:
                setattr(cell, f"end{index}", nnx.data(None))
    return fixed
