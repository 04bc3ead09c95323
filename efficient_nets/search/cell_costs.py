"""What architectures of nets of cells cost: counted, or of a table of times, as data for a search.

    cost = architecture_cost(config, "bops")
    cost.of(relaxation.one_hots(space, architecture))  # of any architecture, in a compiled step
    cost.of(probabilities)  # expected, with gradients

What an operand costs depends on the cell that it is in, its operation and its precision, not on the
state that it reads, nor on its node. So one fixed net of shapes tells it all: its operands are each
operation at each precision, once, all on the cell's first input.
"""

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, layers, names, reporting
from efficient_nets.errors import UserError
from efficient_nets.layers import Layer, rules
from efficient_nets.models import cells, operations, parts
from efficient_nets.models.space import INPUT, Space
from efficient_nets.search import costs, latency, rewards

LATENCY = "latency"
COSTS = {
    "macs": "multiply-accumulates of one image",
    "bops": "bit operations of one image",
    "packed_bytes": "bytes of the layers in the file of a deployed net",
    "params": "parameters of the layers",
    LATENCY: "seconds of a forward batch, from the table search.latency",
}
CELL, NODE, OPERAND, END = range(1, 5)  # groups of
_PLACE = re.compile(r"cells/(\d+)/(?:nodes/(\d+)/([xy])/.*|end(\d+))")


def architecture_cost(
    config: ConfigDict, kind: str, table: dict[str, Any] | None = None
) -> rewards.ArchitectureCost:
    """The cost of every architecture of a config's space.

    Args:
      config: Of an experiment, its model 'cells'; `model.arc` says nothing here.
      kind: A key of `COSTS`; counted ones as `counted` has them.
      table: For latency, one of `measure_cells`. Its times add up, though they were measured apart:
        what XLA does across operands, and their sum in each node but the first one, is not in them.

    Returns:
      A `table` of the shape `(2, 1, 1, 1, ops, precisions)`, and `ends` `(2, B)`.

    Raises:
      UserError: on another kind or model, no table or one that lacks times, or a rule of
        `config.layers` that tells operands of one cell or its loose ends apart.
    """
    names.pick("search.cost", kind, COSTS)
    if kind != LATENCY:
        return counted(config)[kind]
    if table is None:
        raise UserError("search.cost='latency': give search.latency, a file of --mode=latency")
    return _measured(_net(config), table["seconds"])


def counted(config: ConfigDict) -> dict[str, rewards.ArchitectureCost]:
    """All `COSTS` but latency, which one net of shapes tells; arguments as above.

    They are sums over `analysis.layer_costs`, of layers alone: batch norms behind these have
    parameters and bytes too, and an auxiliary head is no part of a net for use. They are exact but
    for float32: sums of whole numbers above 2^24 are rounded, by about 1e-7 of them a term. The
    exceptions are `params` and `packed_bytes` where a rule of `config.layers` makes operands or
    loose ends share cores (`joint`): shared ones count once, for the first layer of them that a net
    has, and which one that is depends on more than one operand.
    """
    net = _net(config)
    found = analysis.layer_costs(net.model, net.image_shape)
    return {kind: _counted(net, found, kind) for kind in COSTS if kind != LATENCY}


def space_of(config: ConfigDict) -> Space:
    """The space of a config's net of cells."""
    own = config.model
    return Space(own.nodes, tuple(own.ops), tuple(own.precisions), own.shared_precision)


class _Net(NamedTuple):
    """A fixed net of shapes whose operands are all that there are.

    Attributes:
      model: The net.
      config: Its config.
      image_shape: `(H, W, C)`.
      space: That of the config which was given.
      operands: The (op, precisions) of each, precisions a position or all of them; of node n they
        are 2 n and 2 n + 1. Of an odd number the last is there twice.
    """

    model: cells.Cells
    config: ConfigDict
    image_shape: tuple[int, int, int]
    space: Space
    operands: list[tuple[int, int | slice]]


def _net(config: ConfigDict) -> _Net:
    if config.model.name != "cells":
        raise UserError(f"model.name={config.model.name!r}: architectures are of 'cells' alone")
    config, info = config.copy_and_resolve_references(), data.describe(config.data)
    own, space = config.model, space_of(config)
    operands: list[tuple[int, int | slice]] = []
    for number, op in enumerate(map(operations.parse, space.ops)):
        # What has no layers is the same at all precisions.
        chosen = range(len(space.precisions)) if op.has_layers else [slice(None)]
        operands += [(number, precision) for precision in chosen]
    every = Space(-(-len(operands) // 2), space.ops, space.precisions)
    tokens = [(0, op, 0 if precision == slice(None) else precision) for op, precision in operands]
    tokens += tokens[-1:] * (len(tokens) % 2)
    tokens = np.broadcast_to(np.reshape(tokens, (1, every.nodes, 2, 3)), every.shape)
    own.update(arc=every.text(tokens), nodes=every.nodes, shared_precision=False)
    if config.layers:
        given, config.layers = config.layers, ()
        paths = [path for path, _ in layers.layers(experiment.abstract_model(config, info))]
        _check_rules(given, paths, space.nodes)
        config.layers = rules.with_removals(given, (), paths)
    model = experiment.abstract_model(config, info)
    return _Net(model, config, info.image_shape, space, operands)


def _check_rules(given, paths: list[str], nodes: int) -> None:
    """Raises a UserError if a rule matches an operation's layer in some operands of a cell only."""
    for index, rule in enumerate(given):
        for path in paths:
            place = _PLACE.fullmatch(path)
            if place is None:
                continue
            head, tail = f"cells/{place[CELL]}/", path[place.end(OPERAND) :]
            if place[END]:
                like = [f"{head}end{node}" for node in range(nodes)]
            else:
                like = [f"{head}nodes/{n}/{x}{tail}" for n in range(nodes) for x in "xy"]
            if len({bool(re.search(rule["match"], one)) for one in like}) > 1:
                raise UserError(
                    f"layers[{index}].match={rule['match']!r}: it matches some, but not all of "
                    f"{', '.join(like)}: in a search what is alike in a cell has one cost"
                )


def _counted(net: _Net, found, kind: str) -> rewards.ArchitectureCost:
    constant, table, ends = 0, *_zeros(net)
    for cost in found:
        place, value = _PLACE.fullmatch(cost.name), getattr(cost, kind)
        if place is None:
            constant += value
        elif place[END]:
            ends[int(place[CELL])] = value  # of each node alike
        else:
            number = 2 * int(place[NODE]) + "xy".index(place[OPERAND])
            if number < len(net.operands):
                op, precision = net.operands[number]
                table[int(place[CELL]), ..., op, precision] += value
    return _summed(net, constant, table, ends)


def _zeros(net: _Net) -> tuple[np.ndarray, np.ndarray]:
    """A table and ends, of all cells; exact for whole numbers up to 2^53."""
    count, space = len(net.model.cells), net.space
    operands = np.zeros((count, 1, 1, 1, len(space.ops), len(space.precisions)))
    return operands, np.zeros((count, space.nodes))


def _summed(net: _Net, constant: float, table, ends) -> rewards.ArchitectureCost:
    kinds = [int(number in net.model.places) for number in range(len(net.model.cells))]
    return rewards.cost_of_layers(constant, table, kinds, ends)


class End(nnx.Module):
    """What a cell does with a loose end: [activation, 1x1 convolution]."""

    def __init__(self, activation: parts.Activation, conv: Layer):
        self.activation, self.conv = activation, conv

    def __call__(self, x: Array) -> Array:
        x = operations.activated(x, self.activation, self.conv)
        return layers.layer_norm_act(x, self.conv)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Something that has a time.

    Attributes:
      shape, label: Its keys in a table.
      module: Of shapes.
      input_shape: Without the batch axis.
    """

    shape: str
    label: str
    module: nnx.Module
    input_shape: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.shape, self.label


def _operand_parts(net: _Net, cell: cells.Cell) -> Iterator[tuple[tuple, _Part]]:
    """Of all operands but the identity, which takes no time, with their (op, precisions)."""
    modules = [choice.op for node in cell.nodes for choice in (node.x, node.y)]
    for at, module in zip(net.operands, modules, strict=False):
        name = operations.parse(net.space.ops[at[0]]).name
        if name != operations.IDENTITY:
            yield at, _cell_part(net, cell, name, module)


def _cell_part(net: _Net, cell: cells.Cell, name: str, module: nnx.Module) -> _Part:
    features, halvings = cell.shapes[1]
    shape = (*(-(-side // 2**halvings) for side in net.image_shape[:2]), features)
    found = [node for _, node in nnx.iter_graph(module) if isinstance(node, Layer)]
    label = ", ".join([name, *dict.fromkeys(map(_text, found))])
    return _Part(_shape(net, shape), label, module, shape)


def _end_part(net: _Net, cell: cells.Cell) -> _Part:
    return _cell_part(net, cell, "end", End(cell.activation, cell.end0))


def _rest(net: _Net) -> _Part:
    """The net whose only operands are identities, and whose loose ends are not convolved."""
    model = nnx.clone(net.model)
    model.auxiliary_head = nnx.data(None)  # for training alone
    model.space = dataclasses.replace(model.space, nodes=1)
    tokens = np.zeros(model.space.shape, np.int32)
    tokens[..., INPUT] = inputs = (0, 1)  # each is read, or nothing would compute it
    model.arc = model.space.text(tokens)
    same = operations.Function(operations.OPERATIONS[operations.IDENTITY])
    for cell in model.cells:
        for number in range(len(cell.nodes)):
            end = getattr(cell, f"end{number}")
            if number:
                setattr(cell, f"end{number}", nnx.data(None))
            elif not end.removed:
                end.remove(nnx.Rngs(0))
        pair = (cells.Choice(at, same) for at in inputs)
        cell.nodes = nnx.List([cells.Node(*pair)])
    # A table of another net must not pass for one of this, in another process either.
    found = [
        f"{path} {layer.geometry.kernel_shape} {_text(layer)}"
        for path, layer in layers.layers(model)
    ]
    label = f"all else of {len(model.cells)} cells, {zlib.crc32(' '.join(found).encode()):08x}"
    return _Part(_shape(net, net.image_shape), label, model, net.image_shape)


def _shape(net: _Net, shape: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, shape))} {net.config.dtype}, {net.config.model.activation}"


def _text(layer: Layer) -> str:
    """What of a layer its time depends on, beside its geometry."""
    if layer.removed:
        return "removed"
    spec = layer.spec
    shown = [("neuron", "linear"), ("norm", "none"), ("kernel", "dense"), ("algorithm", "direct")]
    own = [(field, str(getattr(spec, field)), default) for field, default in shown]
    return " ".join(
        [str(spec.precision), *(f"{field}={value}" for field, value, no in own if value != no)]
    )


def _parts(net: _Net) -> dict[tuple[str, str], _Part]:
    """All that has a time, once each, the net's rest last."""
    found = [
        part
        for cell in net.model.cells
        for part in (*(part for _, part in _operand_parts(net, cell)), _end_part(net, cell))
    ]
    return {part.key: part for part in (*found, _rest(net))}


def measure_cells(config: ConfigDict, batch_size: int, repeats: int) -> dict[str, Any]:
    """Times of all that nets of a config's space are made of, on one device.

    Forward passes of nets for use, as in `latency.measure`, each a median over repeats: each
    operation but the identity at each precision, in the shape that a cell has, the convolution of a
    loose end, and the net around them. Of times of parts that of a call which computes nothing is
    subtracted. All weights are 0.1: times do not depend on them.

    Args:
      config: Of an experiment, its model 'cells'; `model.arc` says nothing here.
      batch_size: Images of a call.
      repeats: Calls whose median is taken.

    Returns:
      A table for `architecture_cost`, its `seconds` by shape and by what was measured in it.
    """
    net = _net(config)
    every, dtype = _parts(net), config.dtype
    nothing = latency.seconds_of(operations.Function(jnp.negative), (1,), dtype, repeats)
    seconds: dict[str, dict[str, float]] = {}
    with reporting.progress(len(every), desc="measuring", unit="operation") as bar:
        for part in every.values():
            shape, whole = (batch_size, *part.input_shape), isinstance(part.module, cells.Cells)
            took = latency.seconds_of(_with_arrays(part.module), shape, dtype, repeats)
            own = took if whole else max(took - nothing, 1e-9)
            seconds.setdefault(part.shape, {})[part.label] = own
            bar.update()
    return latency.with_conditions(seconds, batch_size, repeats, dtype)


def _with_arrays(module: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(module)

    def filled(x):
        value = 0.1 if jnp.issubdtype(x.dtype, jnp.floating) else 0
        return jnp.full(x.shape, value, x.dtype)

    return layers.transform_kernels(nnx.merge(graph, jax.tree.map(filled, state)))


def _measured(net: _Net, seconds: dict[str, dict[str, float]]) -> rewards.ArchitectureCost:
    costs.check_times("search.latency", seconds, list(_parts(net)))

    def of(part):
        return seconds[part.shape][part.label]

    table, ends = _zeros(net)
    for number, cell in enumerate(net.model.cells):
        for (op, precision), part in _operand_parts(net, cell):
            table[number, ..., op, precision] = of(part)
        ends[number] = of(_end_part(net, cell))
    return _summed(net, of(_rest(net)), table, ends)


def read(path: str) -> dict[str, Any]:
    """A table that `latency.write` has written of `measure_cells`.

    Args:
      path: Of the file, the value of `config.search.latency`.

    Raises:
      UserError: if it is no table of times.
    """
    return costs.read(f"search.latency={path!r}", pathlib.Path(path))
