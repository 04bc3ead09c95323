"""Architectures by gradient: each token a distribution whose logits are trained.

    DARTS    probabilities(logits)              mixtures, arXiv 1806.09055
    Gumbel   sample(logits, key, temperature)   one-hots, straight-through, as GDAS, 1910.04465

Either gives `Choices`, of which the supernet makes a mixture, and which a cost is linear in:

    operand = sum_i inputs[i] sum_k ops[k] sum_p precisions[p] op_kp(x_i)

Of one-hots all terms but one are zero, and it need compute that one alone, times `gates`: 1, with
the gradient of what was chosen. Logits train on other images than weights do.

Both papers have a distribution over ops for each pair of nodes, and add all inputs up until the net
is derived. Here inputs are tokens as ops are: what is trained is of two operands a node, as what is
derived is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.models.space import INPUT, OP, PRECISION, Choices, Space


def one_hots(space: Space, architecture: Array, dtype=jnp.float32) -> Choices:
    """The architecture `(2, B, 2, 3)` as zeros and ones."""
    sizes = (space.nodes + 2, len(space.ops), len(space.precisions))
    return Choices(
        *(
            jax.nn.one_hot(architecture[..., field], size, dtype=dtype)
            for field, size in zip((INPUT, OP, PRECISION), sizes, strict=True)
        )
    )


def most_probable(choices: Choices) -> Array:
    """The architecture of the greatest number at each token: int32 `(2, B, 2, 3)`."""
    return jnp.stack([each.argmax(-1).astype(jnp.int32) for each in choices], axis=-1)


def gates(choices: Choices, architecture: Array) -> Array:
    """What each operand of that architecture is multiplied with: `(2, B, 2)`.

    The product of what `choices` have at its tokens. For one-hots of `sample` it is 1, and passes
    the gradient on to the logits, as in GDAS: that of what was chosen alone.
    """
    picked = [
        jnp.take_along_axis(each, architecture[..., field, None], axis=-1)[..., 0]
        for field, each in zip((INPUT, OP, PRECISION), choices, strict=True)
    ]
    return picked[0] * picked[1] * picked[2]


def annealed(progress: Array, start: float = 10.0, end: float = 0.1) -> Array:
    """The temperature, linear in progress, of 0 to 1; the ends are those of GDAS."""
    return start + (end - start) * progress


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """The logits of a space.

    Attributes:
      space: Of the architectures.
      noise: Standard deviation of the logits at the start, so that a node's operands differ.
      distinct_inputs: Whether the two operands of a derived node have two inputs, as in DARTS.
    """

    space: Space
    noise: float = 1e-3
    distinct_inputs: bool = True

    def __post_init__(self):
        if self.noise < 0:
            raise UserError(f"relaxation.noise={self.noise}: must be at least 0")

    def init(self, key: Array) -> Choices:
        """Logits where all is about as probable, float32."""
        space, operands = self.space, self.space.shape[:-1]
        shared = space.shared_precision
        shapes = Choices(
            (*operands, space.nodes + 2),
            (*operands, len(space.ops)),
            (len(space.precisions),) if shared else (*operands, len(space.precisions)),
        )
        keys = Choices(*jax.random.split(key, len(shapes)))
        logits = Choices(
            *(
                self.noise * jax.random.normal(one, shape)
                for one, shape in zip(keys, shapes, strict=True)
            )
        )
        return self._masked(logits)

    def _masked(self, logits: Choices) -> Choices:
        """Whatever an optimizer made of -inf, it is again."""
        size = self.space.nodes + 2
        there = jnp.arange(size)[None] < 2 + jnp.arange(self.space.nodes)[:, None]
        there = jnp.broadcast_to(there[:, None], logits.inputs.shape)
        return logits._replace(inputs=jnp.where(there, logits.inputs, -jnp.inf))

    def _for_operands(self, choices: Choices) -> Choices:
        operands = self.space.shape[:-1]
        precisions = jnp.broadcast_to(choices.precisions, (*operands, choices.precisions.shape[-1]))
        return choices._replace(precisions=precisions)

    def probabilities(self, logits: Choices) -> Choices:
        """softmax(logits), of each token."""
        return self._for_operands(jax.tree.map(jax.nn.softmax, self._masked(logits)))

    def sample(self, logits: Choices, key: Array, temperature: Array | float) -> Choices:
        """One-hots, each as probable as softmax(logits) has it.

            forward     one_hot(argmax(logits + noise))
            backward    that of softmax((logits + noise) / temperature)

        The noise is Gumbel's (arXiv 1611.01144). The lower the
        temperature, the nearer is what the gradient is of to the one-hot, and the more it varies.
        """
        logits = self._masked(logits)
        keys = Choices(*jax.random.split(key, len(logits)))

        def chosen(key, logits):
            noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
            soft = jax.nn.softmax(noisy / temperature)
            hard = jax.nn.one_hot(noisy.argmax(-1), noisy.shape[-1], dtype=logits.dtype)
            return hard + (soft - jax.lax.stop_gradient(soft))

        return self._for_operands(jax.tree.map(chosen, keys, logits))

    def entropy(self, logits: Choices) -> Array:
        """Of the architectures, in nats: the sum over tokens, as these are independent. ()."""

        def of(logits):
            logs = jax.nn.log_softmax(logits)
            return -jnp.sum(jnp.exp(logs) * jnp.where(jnp.isfinite(logs), logs, 0))

        return sum(map(of, self._masked(logits)))

    def derive(self, logits: Choices) -> Array:
        """The most probable architecture: int32 `(2, B, 2, 3)`.

        With `distinct_inputs` the most probable of those whose nodes have two different inputs.
        """
        logits = self._for_operands(self._masked(logits))
        found = most_probable(logits)
        if not self.distinct_inputs:
            return found
        logs = jax.nn.log_softmax(logits.inputs)
        pairs = logs[..., 0, :, None] + logs[..., 1, None, :]
        size = self.space.nodes + 2
        same = jnp.broadcast_to(jnp.eye(size, dtype=bool), pairs.shape)
        flat = jnp.where(same, -jnp.inf, pairs).reshape(*pairs.shape[:-2], -1).argmax(-1)
        inputs = jnp.stack(jnp.divmod(flat, size), axis=-1).astype(jnp.int32)
        return found.at[..., INPUT].set(inputs)
