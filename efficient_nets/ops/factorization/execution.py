"""How a factorized map runs: core after core, or as a dense one with the kernel that they make.

Core after core, a convolution has three parts. Cores in front contract with the input position by
position; the window's cores, and others joined with them, are a small convolution between bonds;
cores behind contract with its output. A bond that is needed in all three is a group of the
convolution. One that only passes by is too where the convolution sums over the window alone, and
else a part of its batch. So CP is Lebedev's 1x1, depthwise, 1x1, and Tucker-2 is Kim's 1x1, kxk,
1x1. Which cores go where, and in which order they contract, is chosen once, by counting operations
and bytes. A matrix product that would hold more than the dense layer does runs in parts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.ops import linear_maps
from efficient_nets.ops.factorization import order, slicing
from efficient_nets.ops.factorization.factored import Factored, dense
from efficient_nets.ops.factorization.network import Cores, Network, contract, reconstruct

MOST_PLACINGS = 2000  # of cores, beyond which those of the window stay alone
# Times what a pass keeps: the backward pass holds it, its gradient, and copies in another order.
HELD = 3.5
LITTLE = 2**18  # numbers, which are nowhere too many to hold


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one forward pass: multiply-accumulates, numbers read and written, and kept in between."""

    macs: int = 0
    moved: int = 0
    kept: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.moved + other.moved, self.kept + other.kept)

    @property
    def time(self) -> float:
        """As `order.time` has it."""
        return order.time(self.macs, self.moved)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Names of the cores in front, of the window, and behind, and what the pass costs.

    A plan without any is for the reconstructed kernel. One of several parts is computed part after
    part, along the index `cut`; it keeps what one of them does.
    """

    front: tuple[str, ...] = ()
    window: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    cost: Cost = Cost()
    cut: str = ""
    parts: int = 1

    @property
    def reconstructs(self) -> bool:
        return not (self.front or self.window or self.behind)


def plan(network: Network, run: str, positions: tuple[int, int], *, grouped: bool = False) -> Plan:
    """How a map of these numbers of positions, of its input and its output, is computed.

    Args:
      network: The kernel's.
      run: 'auto', 'factorized' or 'reconstructed'.
      positions: Of the whole batch.
      grouped: A convolution with groups reads its kernel as a whole: it is reconstructed.
    """
    whole = Plan(cost=reconstructed_cost(network, positions))
    if grouped or run == "reconstructed":
        return whole
    best = cheapest(network, positions)
    if not network.spatial:
        best = _in_parts(network, best, positions)
    held = HELD * (whole.cost.kept + network.dense_params)
    fits = network.spatial or held <= _spared(network, positions)
    # Making the kernel first is one of the orders of a matrix product, and then the same.
    return whole if run == "auto" and fits and whole.cost.time <= best.cost.time else best


def makes_kernel(network: Network, run: str, positions: tuple[int, int]) -> bool:
    """Whether a kernel that is made once, and held, takes less time than going core after core.

    Args:
      network: The kernel's.
      run: As of `plan`.
      positions: Of all calls together.
    """
    whole = reconstructed_cost(network, positions)
    return run == "reconstructed" or (
        run == "auto" and whole.time <= cheapest(network, positions).cost.time
    )


def reconstructed_cost(network: Network, positions: tuple[int, int]) -> Cost:
    """Of making the kernel, and of the dense map."""
    size = network.dense_params
    inputs, features = network.kernel_shape[-2:]
    made = contraction(network, [of for _, of in network.cores], network.modes, {})
    moved = positions[0] * inputs + positions[1] * features + size
    return made + Cost(positions[1] * size, moved, 0)


@functools.lru_cache(maxsize=4096)
def cheapest(network: Network, positions: tuple[int, int]) -> Plan:
    """Of all placings of the cores."""
    return min(
        (_placed(network, placing, positions) for placing in _placings(network)),
        key=lambda found: found.cost.time,
    )


def _spared(network: Network, positions: tuple[int, int]) -> int:
    """Numbers that the dense map holds beyond this one: kernel and gradient; with one x and y."""
    inputs, features = network.kernel_shape[-2:]
    passing = positions[0] * inputs + positions[1] * features
    return max(2 * (network.dense_params - network.params) + passing, LITTLE)


@functools.lru_cache(maxsize=4096)
def _in_parts(network: Network, whole: Plan, positions: tuple[int, int]) -> Plan:
    """The plan, or the cheapest in parts that holds no more than the dense map."""
    most = _spared(network, positions)
    if HELD * whole.cost.kept <= most:
        return whole
    found = []
    for index, size in network.sizes:
        for parts in slicing.numbers_of_parts(size):
            smaller = slicing.part(network, index, parts)
            one = _placed(smaller, (whole.front, (), ()), positions)
            if HELD * one.cost.kept <= most:
                cost = Cost(parts * one.cost.macs, parts * one.cost.moved, one.cost.kept)
                found.append(dataclasses.replace(one, cost=cost, cut=index, parts=parts))
                break
    return min(found, key=lambda plan: plan.cost.time, default=whole)


def _placings(network: Network) -> Iterable[tuple[tuple[str, ...], ...]]:
    every = network.indices
    if not network.spatial:
        return [(tuple(every), (), ())]
    fixed = [name for name, of in every.items() if set(of) & set(network.spatial)]
    free = [name for name in every if name not in fixed]
    able = []
    for name in free:
        reads, writes = (
            bool(set(every[name]) & set(modes)) for modes in (network.inputs, network.outputs)
        )
        places = "fwb" if reads == writes else "fw" if reads else "wb"
        able.append(places)
    if math.prod(map(len, able)) > MOST_PLACINGS:
        able = [places.replace("w", "") for places in able]
    placings = [
        tuple(
            (*(n for n, p in zip(free, placing, strict=True) if p == part),)
            + (tuple(fixed) if part == "w" else ())
            for part in "fwb"
        )
        for placing in itertools.product(*able)
    ]
    # With all cores in the window the kernel would be made as a whole.
    return [placing for placing in placings if len(placing[1]) < len(every)] or placings


@dataclasses.dataclass(frozen=True)
class _Flow:
    """Indices that the window meets: of what comes, of its own, and of what goes on.

    contracted are summed in it, made by it; grouped are in all three, passing not in it.
    """

    came: tuple[str, ...]
    passing: tuple[str, ...]
    grouped: tuple[str, ...]
    contracted: tuple[str, ...]
    made: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _flow(network: Network, front, window, behind) -> _Flow:
    of = network.indices

    def have(names: Sequence[str]) -> dict[str, None]:
        return dict.fromkeys(index for name in names for index in of[name])

    later = have(behind) | dict.fromkeys(network.outputs)
    own = [index for index in have(window) if index not in network.spatial]
    reached = dict.fromkeys(network.inputs) | have(front)
    came = tuple(i for i in reached if i in own or i in later)
    return _Flow(
        came,
        tuple(i for i in came if i not in own),
        tuple(i for i in came if i in own and i in later),
        tuple(i for i in came if i in own and i not in later),
        tuple(i for i in own if i not in came and i in later),
    )


def contraction(network: Network, operands, out, more: dict[str, int]) -> Cost:
    """Of a contraction of these indices; `more` are sizes that the network has not."""
    if not operands:
        return Cost()
    left = [tuple(indices) for indices in operands]
    cost = Cost()
    sizes = dict(network.sizes) | more
    for step in order.best(operands, out, sizes):
        taken = [left.pop(index) for index in sorted(step, reverse=True)]
        rest = {index for indices in left for index in indices} | set(out)
        joint = dict.fromkeys(index for indices in taken for index in indices)
        made = tuple(index for index in joint if index in rest)
        macs = math.prod(sizes[index] for index in joint) if len(taken) > 1 else 0
        numbers = [math.prod(sizes[index] for index in indices) for indices in (*taken, made)]
        cost += Cost(macs, sum(numbers), numbers[-1] if left else 0)
        left.append(made)
    return cost


BATCH = "positions"


def _placed(network: Network, placing, positions: tuple[int, int]) -> Plan:
    front, window, behind = placing
    before, after = positions
    of, flow = network.indices, _flow(network, front, window, behind)
    outputs = network.outputs
    if not network.spatial:
        operands = [(BATCH, *network.inputs), *(of[name] for name in front)]
        cost = contraction(network, operands, (BATCH, *outputs), {BATCH: before})
        return Plan(front, window, behind, cost)
    operands = [(BATCH, *network.inputs), *(of[name] for name in front)]
    cost = Cost()
    if front:
        cost += contraction(network, operands, (BATCH, *flow.came), {BATCH: before})
        cost += Cost(kept=before * network.size(*flow.came))
    kernel = (*network.spatial, *flow.grouped, *flow.contracted, *flow.made)
    cost += contraction(network, [of[name] for name in window], kernel, {})
    size = network.size(*flow.passing)
    made = (BATCH, *flow.passing, *flow.grouped, *flow.made)
    cost += Cost(
        after * size * network.size(*kernel),
        before * network.size(*flow.came) + after * network.size(*made[1:]),
    )
    if behind:
        cost += Cost(kept=after * network.size(*made[1:]))
        operands = [made, *(of[name] for name in behind)]
        cost += contraction(network, operands, (BATCH, *outputs), {BATCH: after})
    return Plan(front, window, behind, cost)


def run(network: Network, found: Plan, linear_map, x: Array, cores: Cores) -> Array:
    """`linear_map(x, [kernel])` core after core: `(N, *spatial', features)`, in x's type.

    Args:
      network: The kernel's.
      found: Of `plan`; one that reconstructs makes the kernel.
      linear_map: A `DenseMap`, or a `ConvMap` without groups.
      x: `(N, *spatial, in)`.
      cores: By name, cast to x's type.
    """
    if found.reconstructs:
        return linear_map(x, [reconstruct(network, cores)])
    cores = {name: core.astype(x.dtype) for name, core in cores.items()}
    inputs, features = network.kernel_shape[-2:]
    if missing := network.size(*network.inputs) - inputs:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    lead = tuple(f"axis{i}" for i in range(x.ndim - 1))
    if found.parts > 1:
        whole = dataclasses.replace(found, cut="", parts=1)
        one = functools.partial(_part, whole, linear_map)
        y = slicing.in_parts(network, found.cut, found.parts, one, x, cores)
        return y[..., :features]
    y = x.reshape(*x.shape[:-1], *map(network.size, network.inputs))
    have = (*lead, *network.inputs)
    front, window, behind = found.front, found.window, found.behind
    flow = _flow(network, front, window, behind)
    if front:
        out = flow.came if window else network.outputs
        y, have = _contract(network, y, have, lead, front, cores, out)
    if window:
        y, have = _convolve(network, flow, window, linear_map, y, have, lead, cores)
    if behind:
        y, have = _contract(network, y, have, lead, behind, cores, network.outputs)
    if have != (out := (*lead, *network.outputs)):
        y = contract([(y, have)], out)
    return y.reshape(*y.shape[: len(lead)], network.size(*network.outputs))[..., :features]


def _part(found: Plan, linear_map, network: Network, x: Array, cores: Cores) -> Array:
    return run(network, found, linear_map, x, cores)


def _contract(network: Network, y: Array, have, lead, names, cores: Cores, out):
    """With these cores, in the order that the plan counted with: y, and the indices it has."""
    own = (BATCH, *have[len(lead) :])
    operands = (own, *(network.indices[name] for name in names))
    positions = y.shape[: len(lead)]
    batch = math.prod(positions)
    path = order.best(operands, (BATCH, *out), dict(network.sizes) | {BATCH: batch})
    arrays = [y.reshape(batch, *y.shape[len(lead) :]), *(cores[name] for name in names)]
    made = contract(list(zip(arrays, operands, strict=True)), (BATCH, *out), optimize=path)
    return made.reshape(*positions, *made.shape[1:]), (*lead, *out)


def _convolve(network: Network, flow: _Flow, window, linear_map, y, have, lead, cores):
    """The small convolution, and the indices that its output has."""
    kernel_size = linear_map.kernel_size
    # Passing indices are groups with the same kernel where it sums over the window alone, and
    # nothing has to move; else a part of the batch.
    repeated = flow.passing if network.size(*flow.contracted) == 1 else ()
    passing = () if repeated else flow.passing
    grouped = (*repeated, *flow.grouped)
    needed = (lead[0], *passing, *lead[1:], *grouped, *flow.contracted)
    y = contract([(y, have)], needed) if needed != have else y
    batch = y.shape[: 1 + len(passing)]
    spatial = y.shape[len(batch) : len(batch) + len(kernel_size)]
    channels = network.size(*grouped, *flow.contracted)
    y = y.reshape(math.prod(batch), *spatial, channels)
    made = (*network.spatial, *flow.contracted, *flow.grouped, *flow.made)
    operands = [(cores[name], network.indices[name]) for name in window]
    path = order.best([of for _, of in operands], made, dict(network.sizes))
    kernel = contract(operands, made, optimize=path)
    groups, own = network.size(*grouped), network.size(*flow.grouped, *flow.made)
    kernel = kernel.reshape(*kernel_size, network.size(*flow.contracted), own)
    kernel = jnp.tile(kernel, network.size(*repeated))
    y = dataclasses.replace(linear_map, groups=groups)(y, [kernel])
    have = (lead[0], *passing, *lead[1:], *grouped, *flow.made)
    y = y.reshape(*batch, *y.shape[1:-1], *map(network.size, (*grouped, *flow.made)))
    out = (*lead, *passing, *grouped, *flow.made)
    return (contract([(y, have)], out) if out != have else y), out


def factorized_map(linear_map, x: Array, kernels: Sequence[Factored]) -> Array:
    """`linear_map(x, kernels)`, computed as they say: `(N, *spatial', B * features)`.

    What a pass keeps for the backward pass it computes again there where that is more than the
    dense kernel and its gradient, which such a layer has not.
    """
    before = math.prod(x.shape[:-1])
    after = before
    if isinstance(linear_map, linear_maps.ConvMap):
        after = x.shape[0] * math.prod(linear_map.output_size(x))
    plans = [
        plan(kernel.network, kernel.run, (before, after), grouped=linear_map.groups > 1)
        for kernel in kernels
    ]
    if all(found.reconstructs for found in plans):
        return linear_map(x, [dense(kernel) for kernel in kernels])
    parts = []
    for kernel, found in zip(kernels, plans, strict=True):
        part = functools.partial(run, kernel.network, found, linear_map)
        if found.parts == 1 and found.cost.kept > 2 * kernel.network.dense_params:
            part = jax.checkpoint(part)
        parts.append(part(x, kernel.cores))
    return linear_maps.fuse(parts, linear_map.groups)
