"""The strategies that propose architectures and are told how good they are.

Each is a frozen dataclass of options with four pure functions. All that changes is in their states,
trees of arrays: a search that is stopped and resumed equals the one that was not.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from jax import Array

from efficient_nets.models.space import Space
from efficient_nets.search.controller import Controller
from efficient_nets.search.evolution import Evolution, Random
from efficient_nets.search.nsga2 import NSGA2


class Strategy(Protocol):
    """What all of them have. Each function can be jitted, `number` being static.

    Architectures are int32 `(n, 2, B, 2, 3)`, n of them, see `space.Space`.
    """

    space: Space

    def init(self, key: Array) -> Any:
        """The state before anything is known."""

    def propose(self, state: Any, key: Array, number: int) -> Array:
        """So many architectures to be measured next."""

    def update(self, state: Any, architectures: Array, rewards: Array) -> tuple[Any, dict]:
        """The state once these are measured, and metrics: scalars by name.

        Rewards are float32, the greater the better: `(n,)`, for "nsga2" `(n, M)` of M objectives.
        Those that were proposed together are told together.
        """

    def finalists(self, state: Any, key: Array, number: int) -> Array:
        """So many architectures to be measured more closely in the end; some may be alike."""


STRATEGIES: Mapping[str, type[Strategy]] = {
    "enas": Controller,
    "evolution": Evolution,
    "nsga2": NSGA2,
    "random": Random,
}
