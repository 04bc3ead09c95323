"""The strategies that propose architectures, and learn how good they are.

Each is a frozen dataclass of options with pure functions. All that changes is in their states,
trees of arrays: a search that is stopped and resumed equals the one that was not. Most are told the
rewards of what they proposed, "darts" and "gumbel" the gradient of a loss.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Protocol

from jax import Array

from efficient_nets.models.space import Choices, Space
from efficient_nets.search.controller import Controller
from efficient_nets.search.evolution import Evolution, Random
from efficient_nets.search.gradient import Darts, Gumbel
from efficient_nets.search.nsga2 import NSGA2


class Strategy(Protocol):
    """What all of them have; each is a `Rewarded` or a `Differentiable` besides.

    Each function can be jitted, `number` being static.

    Architectures are int32 `(n, 2, B, 2, 3)`, n of them, see `space.Space`.
    """

    space: Space

    def init(self, key: Array) -> Any:
        """The state before anything is known."""

    def propose(self, state: Any, key: Array, number: int) -> Array:
        """So many architectures to be measured next, or trained."""

    def finalists(self, state: Any, key: Array, number: int) -> Array:
        """So many architectures to be measured more closely in the end; some may be alike."""


class Rewarded(Strategy, Protocol):
    """Those that are told how good architectures are."""

    def update(self, state: Any, architectures: Array, rewards: Array) -> tuple[Any, dict]:
        """The state once these are measured, and metrics: scalars by name.

        Rewards are float32, the greater the better: `(n,)`, for "nsga2" `(n, M)` of M objectives.
        Those that were proposed together are told together.
        """


class Differentiable(Strategy, Protocol):
    """Those whose states have logits, and are told the gradient of a loss, see `gradient`.

    Attributes:
      mixes: Whether the loss is that of a mixture, for which `models.cells` has `mixes`; else it is
        that of one architecture under gates.
    """

    mixes: bool

    def probabilities(self, state: Any) -> Choices:
        """Of each token."""

    def relaxed(self, logits: Choices, key: Array, progress: Array) -> tuple[Choices, Array | None]:
        """What the loss is taken of, and its architecture, if it is one; see `ByGradient`."""

    def descend(self, state: Any, gradient: Choices) -> tuple[Any, dict]:
        """The state a step down the gradient to `state.logits`, and metrics: scalars by name."""


STRATEGIES: Mapping[str, type[Strategy]] = {
    "darts": Darts,
    "enas": Controller,
    "evolution": Evolution,
    "gumbel": Gumbel,
    "nsga2": NSGA2,
    "random": Random,
}
NOT_OPTIONS = ("space", "objectives")  # what follows from the rest of a search


def options() -> dict[str, dict[str, Any]]:
    """By strategy, its options with their defaults, as `config.search` has them: None is 0."""
    return {
        name: {
            field.name: 0.0 if field.default is None else field.default
            for field in dataclasses.fields(strategy)
            if field.name not in NOT_OPTIONS
        }
        for name, strategy in STRATEGIES.items()
    }


def make(name: str, space: Space, given: Mapping[str, Any]) -> Strategy:
    """A strategy of `options`, where 0 stands for None wherever None is allowed."""
    types = {field.name: field.type for field in dataclasses.fields(STRATEGIES[name])}
    none = {key for key, kind in types.items() if type(None) in typing.get_args(kind)}
    found = {key: None if key in none and not value else value for key, value in given.items()}
    return STRATEGIES[name](space, **found)
