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

    Raises:
      UserError: if the cheapest choices are above the limit.
    """
    # SciPy's optimizers take a quarter of a second to import, which only who assigns needs.
    from scipy.optimize import LinearConstraint, milp

    pairs = [(layer, choice) for layer, own in losses.items() for choice in own]
    cheapest = sum(min(own.values()) for own in costs.values())
    if cheapest > limit:
        raise UserError(
            f"the cheapest choices take {cheapest:,}, above the limit of {math.floor(limit):,}"
        )
    cost = np.array([costs[layer][choice] for layer, choice in pairs], float)
    of_layer = np.array([[layer == other for layer, _ in pairs] for other in losses], float)
    # Scaled, as bit operations are beyond what the solver's tolerances are made for.
    scale = max(limit, 1.0)
    found = milp(
        np.array([losses[layer][choice] for layer, choice in pairs]),
        constraints=[
            LinearConstraint(of_layer, 1, 1),
            LinearConstraint(cost[None] / scale, -np.inf, limit / scale),
        ],
        integrality=np.ones(len(pairs)),
        bounds=(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the solver found no assignment: {found.message}")
    return {layer: choice for (layer, choice), x in zip(pairs, found.x, strict=True) if x > 0.5}
