"""Which precision each layer gets, under a budget: a multiple-choice knapsack, solved exactly."""

import math
from collections.abc import Mapping

import numpy as np

from efficient_nets.errors import UserError


def assign(
    losses: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, Mapping[str, float]],
    limit: float,
) -> dict[str, str]:
    """The choice of each layer whose losses have the least sum, and whose costs are in the limit.

        min sum_l loss[l][c_l]   so that   sum_l cost[l][c_l] <= limit

    That losses of layers add up is an assumption (as in HAWQ-V3, arXiv 2011.10680, eq. 8); given
    it, the answer is the best one, of an integer linear program.

    Args:
      losses: What each layer costs in accuracy, or in loss, by choice.
      costs: What it costs in bytes or operations; the same layers and choices.
      limit: Of the sum of costs.

    Choices whose loss is not finite are left out.

    Raises:
      UserError: if the cheapest choices are above the limit, or a layer has none with a loss.
    """
    # SciPy's optimizers take a quarter of a second to import, which only who assigns needs.
    from scipy.optimize import LinearConstraint, milp

    able = {
        layer: {choice: loss for choice, loss in own.items() if math.isfinite(loss)}
        for layer, own in losses.items()
    }
    if lost := [layer for layer, own in able.items() if not own]:
        raise UserError(f"the loss is not finite, whatever is chosen for {', '.join(lost)}")
    cheapest = sum(min(costs[layer][choice] for choice in own) for layer, own in able.items())
    if cheapest > limit:
        raise UserError(
            f"the cheapest choices take {cheapest:,}, above the limit of {math.floor(limit):,}"
        )
    pairs = [(layer, choice) for layer, own in able.items() for choice in own]
    of_layer = np.array([[layer == other for layer, _ in pairs] for other in able], float)
    # Scaled, as bit operations are beyond what the solver's tolerances are made for.
    scale = max(limit, 1.0)
    cost = np.array([costs[layer][choice] for layer, choice in pairs]) / scale
    bound = limit / scale
    while True:
        found = milp(
            np.array([able[layer][choice] for layer, choice in pairs]),
            constraints=[LinearConstraint(of_layer, 1, 1), LinearConstraint(cost, -np.inf, bound)],
            integrality=np.ones(len(pairs)),
            bounds=(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"the solver found no assignment: {found.message}")
        chosen = dict(pair for pair, x in zip(pairs, found.x, strict=True) if x > 0.5)
        total = sum(costs[layer][choice] for layer, choice in chosen.items())
        if total <= limit:
            return chosen
        bound -= 2 * (total - limit) / scale  # what the solver's tolerance let through
