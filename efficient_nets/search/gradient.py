"""The strategies "darts" and "gumbel": the logits of a relaxed space, trained by gradient.

    darts     of a mixture of all operations on all states     arXiv 1806.09055
    gumbel    of one that is drawn, through its gates          GDAS, arXiv 1910.04465

Nothing is rewarded: the caller has a loss of a validation batch, to which it may add a
differentiable cost, such as `rewards.ArchitectureCost.of(choices)`, and the gradient to the logits:

    def loss_fn(logits):
        choices, tokens = strategy.relaxed(logits, key, progress)
        if strategy.mixes:
            net.choose(choices)  # of models.create("cells", arc="", mixes=True, ...)
        else:
            net.architecture[...] = tokens
            net.gates = nnx.data(relaxation.gates(choices, tokens))
        return task.loss(net(images), labels) + weight * cost.of(choices)

    state, metrics = strategy.descend(state, jax.grad(loss_fn)(state.logits))

Between such steps weights are trained: of "darts" with `choose(strategy.probabilities(state))`, of
"gumbel" on architectures of `propose`. Of DARTS this is the first-order form.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.models.space import Choices, Space
from efficient_nets.search import relaxation
from efficient_nets.search.relaxation import Relaxation


class GradientState(NamedTuple):
    """What a search is resumed from, all of it finite.

    Attributes:
      logits: See `Relaxation`; of inputs that are not there 0, which nothing reads.
      optimizer: Of the logits.
      step: () int32, steps made.
    """

    logits: Choices
    optimizer: Any
    step: Array


@dataclasses.dataclass(frozen=True)
class ByGradient:
    """What both have.

    Attributes:
      space: Of the architectures.
      learning_rate, beta1, beta2: Of Adam; both papers have these.
      weight_decay: Times the logits, added to their gradient.
      noise: Standard deviation of the logits at the start.
      distinct_inputs: Whether both operands of a derived node have inputs of their own.
    """

    name: ClassVar[str]
    mixes: ClassVar[bool]

    space: Space
    learning_rate: float = 3e-4
    beta1: float = 0.5
    beta2: float = 0.999
    weight_decay: float = 1e-3
    noise: float = 1e-3
    distinct_inputs: bool = True

    def __post_init__(self):
        for name in ("weight_decay", "noise"):
            if getattr(self, name) < 0:
                raise UserError(f"{self.name}.{name}={getattr(self, name)}: must be at least 0")
        for name in ("learning_rate", "temperature_start", "temperature_end"):
            if getattr(self, name, 1) <= 0:
                raise UserError(f"{self.name}.{name}={getattr(self, name)}: must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{self.name}.{name}={getattr(self, name)}: must be in [0, 1)")

    def init(self, key: Array) -> GradientState:
        """All is about as probable."""
        # An optimizer would make NaN of -inf.
        logits = jax.tree.map(
            lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), self.relaxation.init(key)
        )
        return GradientState(logits, self._optimizer.init(logits), jnp.zeros((), jnp.int32))

    def probabilities(self, state: GradientState) -> Choices:
        """Of each token, float32: `softmax(logits)`."""
        return self.relaxation.probabilities(state.logits)

    def propose(self, state: GradientState, key: Array, number: int) -> Array:
        """Architectures, each token drawn by its probabilities: int32 `(number, 2, B, 2, 3)`."""

        def drawn(key):
            return relaxation.most_probable(self.relaxation.sample(state.logits, key, 1.0))

        return jax.vmap(drawn)(jax.random.split(key, number))

    def finalists(self, state: GradientState, key: Array, number: int) -> Array:
        """The derived architecture, and then drawn ones: int32 `(number, 2, B, 2, 3)`."""
        derived = self.relaxation.derive(state.logits)
        return jnp.concatenate([derived[None], self.propose(state, key, number)])[:number]

    def relaxed(self, logits: Choices, key: Array, progress: Array):
        """What the loss is taken of, differentiable in the logits.

        Args:
          logits: Of a state.
          key: Of what is drawn.
          progress: Of the search, () from 0 to 1.

        Returns:
          `Choices` of each operand, and the architecture int32 `(2, B, 2, 3)` whose one-hots they
          are: None of mixtures.
        """
        raise NotImplementedError

    def descend(self, state: GradientState, gradient: Choices) -> tuple[GradientState, dict]:
        """A step of Adam (arXiv 1412.6980) down the gradient `+ weight_decay logits`.

        Args:
          state: Whose logits it is the gradient to.
          gradient: Of the loss.

        Returns:
          The new state, and metrics: "entropy" in nats of the architectures there, "gradient_norm"
          without the decay, and "learning_rate".
        """
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.logits)
        logits = optax.apply_updates(state.logits, updates)
        metrics = {
            "entropy": self.relaxation.entropy(logits),
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(self.learning_rate, jnp.float32),
        }
        return GradientState(logits, optimizer, state.step + 1), metrics

    @property
    def relaxation(self) -> Relaxation:
        return Relaxation(self.space, self.noise, self.distinct_inputs)

    @property
    def _optimizer(self):
        adam = optax.adam(self.learning_rate, b1=self.beta1, b2=self.beta2)
        return optax.chain(optax.add_decayed_weights(self.weight_decay), adam)


@dataclasses.dataclass(frozen=True)
class Darts(ByGradient):
    """The strategy "darts", see `strategies.Differentiable`.

    Attributes:
      space, learning_rate, beta1, beta2, weight_decay, noise, distinct_inputs: See `ByGradient`.
    """

    name = "darts"
    mixes = True

    def relaxed(self, logits: Choices, key: Array, progress: Array) -> tuple[Choices, None]:
        """The probabilities."""
        del key, progress
        return self.relaxation.probabilities(logits), None


@dataclasses.dataclass(frozen=True)
class Gumbel(ByGradient):
    """The strategy "gumbel", see `strategies.Differentiable`.

    Attributes:
      space, learning_rate, beta1, beta2, weight_decay, noise, distinct_inputs: See `ByGradient`.
      temperature_start, temperature_end: Of the gradient, at the progress 0 and 1; linear between.
    """

    name = "gumbel"
    mixes = False

    temperature_start: float = 10.0
    temperature_end: float = 0.1

    def relaxed(self, logits: Choices, key: Array, progress: Array) -> tuple[Choices, Array]:
        """One-hots that are drawn, with the gradient of a softmax, see `Relaxation.sample`."""
        temperature = relaxation.annealed(progress, self.temperature_start, self.temperature_end)
        choices = self.relaxation.sample(logits, key, temperature)
        return choices, relaxation.most_probable(choices)
