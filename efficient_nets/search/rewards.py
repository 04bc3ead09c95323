"""How good an architecture is: accuracy, its cost, both as one number, and fronts of the two."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.models.space import Choices

HARD = (0.0, -1.0)  # exponents below and above the target: a bound, above which it costs dearly
SOFT = (-0.07, -0.07)  # twice the cost for 5% more accuracy


def cost_aware(
    accuracy: Array, cost: Array, target: float, exponents: tuple[float, float] = SOFT
) -> Array:
    """`accuracy (cost / target)^w`, w the first exponent up to the target, the second above it.

    MnasNet, arXiv 1807.11626, equations 2 and 3.

    Args:
      accuracy: Of any shape, in [0, 1].
      cost: Of the same shape, in any unit.
      target: The cost to aim at, in that unit.
      exponents: `SOFT`, `HARD`, or others.

    Raises:
      UserError: on a target that is not above 0.
    """
    if not target > 0:
        raise UserError(f"reward.target={target}: must be above 0")
    below, above = exponents
    share = cost / target
    return accuracy * jnp.where(share <= 1, share**below, share**above)


def objectives(accuracy: Array, cost: Array) -> Array:
    """`(n, 2)`, each the greater the better: what the strategy "nsga2" is told."""
    return jnp.stack([accuracy, -cost], axis=-1)


REWARDS = {
    "accuracy": "the accuracy, whatever the cost",
    "cost_aware": "accuracy (cost / target)^w, see `cost_aware`",
}


class ArchitectureCost(NamedTuple):
    """What architectures cost, in any unit: bit operations, bytes, seconds.

    Attributes:
      constant: (), of all that every architecture has.
      table: `(2, B, 2, B + 2, ops, precisions)`, of an operand by cell, node, operand, input, op
        and precision; an axis of 1 stands for all alike.
      ends: `(2, B)`, of each node that is a loose end, in the layer that mixes these.
    """

    constant: Array
    table: Array
    ends: Array

    def of(self, choices: Choices) -> Array:
        """The cost, () float: of one-hots that of the architecture, of probabilities the expected.

            constant + sum inputs[i] ops[k] precisions[p] table[i, k, p]
                     + sum_n ends[n] prod of all operands (1 - inputs[n])

        The first sum goes over all operands. It is linear in each of the three, and the second in
        each operand's inputs; as tokens are independent, expectations are exact.
        """
        sizes = [each.shape[-1] for each in choices]
        table = jnp.broadcast_to(self.table, (*choices.ops.shape[:-1], *sizes))
        operands = jnp.einsum("cnoi,cnok,cnop,cnoikp->", *choices, table)
        return self.constant + operands + jnp.sum(self.ends * choices.unused)


def cost_of_layers(
    constant: float, tables: np.ndarray, cells: Sequence[int], ends: np.ndarray | None = None
) -> ArchitectureCost:
    """The cost of a net, of tables of its layers.

    Args:
      constant: Of what is outside of the cells, or the same in all of them.
      tables: `(L, B, 2, B + 2, ops, precisions)`, or with axes of 1; see `ArchitectureCost`.
      cells: Of each of the L layers which cell it is, a position in `space.CELLS`.
      ends: `(L, B)`; None for no cost.

    Raises:
      UserError: if there are not as many of one as of the others.
    """
    tables, cells = np.asarray(tables), np.asarray(cells)
    ends = np.zeros((len(cells), tables.shape[1])) if ends is None else np.asarray(ends)
    if not len(tables) == len(cells) == len(ends):
        raise UserError(
            f"cost: {len(tables)} tables, {len(cells)} cells and {len(ends)} ends: must be one a "
            "layer of each"
        )

    def summed(values):
        return jnp.asarray([values[cells == cell].sum(0) for cell in range(2)], jnp.float32)

    return ArchitectureCost(jnp.asarray(constant, jnp.float32), summed(tables), summed(ends))


def dominates(objectives: Array) -> Array:
    """Which beats which: bool `(n, n)`, of row and column; nowhere worse, and somewhere better.

    Args:
      objectives: `(n, M)`, the greater the better.
    """
    one, other = objectives[:, None], objectives[None]
    return (one >= other).all(-1) & (one > other).any(-1)


def pareto_front(objectives: Array) -> Array:
    """Which of n are dominated by none: bool `(n,)`; of equals all, of NaNs none."""
    return ~dominates(objectives).any(0) & ~jnp.isnan(objectives).any(-1)


def hypervolume(objectives: np.ndarray, reference: Sequence[float]) -> float:
    """The volume of what n points dominate and the reference does not reach (Zitzler, 1999).

    Points that are not better than the reference everywhere add nothing. Exact, by slices; for a
    few objectives.

    Args:
      objectives: `(n, M)`, the greater the better.
      reference: `(M,)`.
    """
    points = np.asarray(objectives, np.float64) - np.asarray(reference, np.float64)
    points = points[(points > 0).all(-1)]
    if points.shape[-1] == 1 or not len(points):
        return float(points.max(initial=0.0))
    points = points[np.argsort(-points[:, 0])]
    depths = points[:, 0] - np.append(points[1:, 0], 0.0)
    rest = np.zeros(points.shape[-1] - 1)
    return sum(
        float(depth) * hypervolume(points[: number + 1, 1:], rest)
        for number, depth in enumerate(depths)
        if depth
    )


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of n pairs: +1 where both rank alike, -1 where one is the other's reverse.

        (pairs that both order alike - pairs that they order differently)
        / sqrt(pairs that are no tie of one * pairs that are no tie of the other)

    NaN where one of both is constant.
    """
    signs = [np.sign(np.subtract.outer(values, values)) for values in _pair(one, other)]
    # Every pair counts twice, above and below the fraction.
    free = [np.count_nonzero(sign) for sign in signs]
    return float(np.sum(signs[0] * signs[1]) / np.sqrt(free[0] * free[1])) if all(free) else np.nan


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rho: the correlation of ranks, of equals their mean. NaN where one is constant."""
    ranks = [
        np.sum(np.sign(np.subtract.outer(values, values)), axis=1) / 2
        for values in _pair(one, other)
    ]
    norms = [np.sqrt(np.sum(each**2)) for each in ranks]  # their mean is 0
    return float(np.sum(ranks[0] * ranks[1]) / (norms[0] * norms[1])) if all(norms) else np.nan


def _pair(one, other) -> list[np.ndarray]:
    pair = [np.asarray(values, np.float64) for values in (one, other)]
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape or len(pair[0]) < 2:
        raise UserError(
            f"rank correlation: values of the shapes {pair[0].shape} and {pair[1].shape}, must be "
            "two or more pairs"
        )
    return pair
