"""ENAS: a recurrent net that writes architectures, taught by policy gradient (arXiv 1802.03268).

An LSTM takes a step for each token. Of a cell it takes two first, which stand for the cell's two
inputs; of each node then two that choose inputs, by attention over all that is there, two that
choose ops, two that choose precisions where the space has several, and one whose state is the
node's anchor, by which later nodes know it. The reduction cell goes on from the state of the normal
one. With one precision for all, it is chosen first of all, and the rest can build on it.

    logits of inputs      bound tanh(v' tanh(W1 anchor + W2 h) / temperature)
    logits of ops         bound / op_reduction tanh((W h + b) / temperature) + prior

The logits being bounded, no choice is ever sure: with 1.10 an input that is there keeps at least
exp(-2.2) of the best one's probability. `bound=None` takes the bounds away.
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from efficient_nets.errors import UserError
from efficient_nets.models.space import INPUT, OP, PRECISION, Space

Params = dict[str, Array]


class ControllerState(NamedTuple):
    """What a search is resumed from."""

    params: Params
    optimizer: Any
    baseline: Array  # () float32
    step: Array  # () int32, updates made


class Walk(NamedTuple):
    """An architecture under a controller.

    Attributes:
      architecture: int32 `(2, B, 2, 3)`.
      log_probability: Its logarithm, (), in nats.
      entropy: Of what each of its tokens was drawn from, given those before it: their sum, ().
    """

    architecture: Array
    log_probability: Array
    entropy: Array


@dataclasses.dataclass(frozen=True)
class Controller:
    """The strategy "enas", see `strategies.Strategy`.

    Attributes:
      space: Of the architectures.
      size: Of the LSTM.
      spread: Parameters start uniformly in [-spread, spread].
      bound: Of the logits of inputs; None for none, and none of ops either.
      op_reduction: How much smaller that of ops and of precisions is.
      temperature: What logits are divided by, within the tanh.
      favoured: Pattern of the ops that are more probable at first; "" for none.
      op_bias: Where these ops' bias b starts. Without a bound, where nothing tames it, it starts at
        0 as others do.
      op_prior: What is added to these ops' logits in the normal cell, for good, and taken from
        those of the others.
      entropy_weight: Of the entropy, beside the reward.
      baseline_decay: Of the moving mean of rewards, a reward.
      learning_rate, beta1, epsilon: Of Adam.
    """

    space: Space
    size: int = 64
    spread: float = 0.1
    bound: float | None = 1.10
    op_reduction: float = 2.5
    temperature: float = 1.0
    favoured: str = r"^sep"
    op_bias: float = 10.0
    op_prior: float = 0.25
    entropy_weight: float = 1e-4
    baseline_decay: float = 0.99
    learning_rate: float = 3.5e-3
    beta1: float = 0.0
    epsilon: float = 1e-3

    def __post_init__(self):
        for name, above in (("size", 1), ("spread", 0), ("entropy_weight", 0), ("epsilon", 0)):
            if getattr(self, name) < above:
                raise UserError(f"enas.{name}={getattr(self, name)}: must be at least {above}")
        for name in ("bound", "op_reduction", "temperature", "learning_rate"):
            if (given := getattr(self, name)) is not None and given <= 0:
                raise UserError(f"enas.{name}={given}: must be above 0")
        for name in ("baseline_decay", "beta1"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"enas.{name}={getattr(self, name)}: must be in [0, 1)")
        try:
            re.compile(self.favoured)
        except re.error as error:
            raise UserError(
                f"enas.favoured={self.favoured!r} is no regular expression: {error}"
            ) from error

    def init(self, key: Array) -> ControllerState:
        """Before anything is learned."""
        params = self.start(key)
        step, baseline = jnp.zeros((), jnp.int32), jnp.zeros(())
        return ControllerState(params, self._optimizer.init(params), baseline, step)

    def propose(self, state: ControllerState, key: Array, number: int) -> Array:
        """Architectures drawn from the policy: int32 `(number, 2, B, 2, 3)`."""
        walk = jax.vmap(lambda key: self.walk(state.params, key).architecture)
        return walk(jax.random.split(key, number))

    finalists = propose

    def update(self, state: ControllerState, architectures: Array, rewards: Array):
        """A step of REINFORCE up the gradient of `E[reward + entropy_weight entropy]`.

            g = 1/n sum_i (R_i - baseline) dlog p_i + entropy_weight dentropy_i
            R_i = reward_i + entropy_weight entropy_i

        The baseline is that before these rewards, which do not bias g then; of the first update it
        is their mean. (The source starts it at 0, and leaves out the last term of g.)

        Args:
          state: What `architectures` were proposed from; REINFORCE holds for those only.
          architectures: int32 `(n, 2, B, 2, 3)`.
          rewards: float32 `(n,)`; what is not finite, of a net that diverged, counts as 0.

        Returns:
          The new state, and metrics.
        """
        rewards = jnp.where(jnp.isfinite(rewards), rewards, jnp.zeros_like(rewards))
        (loss, aux), gradient = jax.value_and_grad(self.loss, has_aux=True)(
            state.params, state, architectures, rewards
        )
        walks, totals, baseline = aux
        moved = moving_mean(baseline, totals, self.baseline_decay)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "reward": rewards.mean(),
            "baseline": moved,
            "entropy": walks.entropy.mean(),
            "log_probability": walks.log_probability.mean(),
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(self.learning_rate, jnp.float32),
        }
        return ControllerState(params, optimizer, moved, state.step + 1), metrics

    def loss(self, params: Params, state: ControllerState, architectures: Array, rewards: Array):
        """What has the gradient -g of `update`; and the walks, the R `(n,)` and the baseline."""
        walks = jax.vmap(lambda one: self.walk(params, architecture=one))(architectures)
        totals = lax.stop_gradient(rewards + self.entropy_weight * walks.entropy)
        baseline = jnp.where(state.step == 0, totals.mean(), state.baseline)
        gains = (totals - baseline) * walks.log_probability + self.entropy_weight * walks.entropy
        return -gains.mean(), (walks, totals, baseline)

    @property
    def _optimizer(self):
        return optax.adam(self.learning_rate, b1=self.beta1, eps=self.epsilon)

    @property
    def _is_favoured(self) -> list[bool]:
        matches = [bool(re.search(self.favoured, name)) for name in self.space.ops]
        return [self.favoured != "" and match for match in matches]

    @property
    def _precisions(self) -> str:
        """Whether operands have their 'own', all have a 'shared' one, or there is a 'sole' one."""
        if len(self.space.precisions) == 1:
            return "sole"
        return "shared" if self.space.shared_precision else "own"

    def start(self, key: Array) -> Params:
        """Parameters of a fresh controller, float32; matrices `(in, out)`, embeddings `(n, size)`.

        Gates of the LSTM are in the order input, forget, output, candidate; it has no bias.
        """
        size, ops, precisions = self.size, len(self.space.ops), len(self.space.precisions)
        shapes = {
            "start": (size,),
            "lstm": (2 * size, 4 * size),
            "anchor_kernel": (size, size),
            "query_kernel": (size, size),
            "attention": (size,),
            "op_embedding": (ops, size),
            "op_kernel": (size, ops),
        }
        if precisions > 1:
            shapes["precision_embedding"] = (precisions, size)
            shapes["precision_kernel"] = (size, precisions)
        keys = jax.random.split(key, len(shapes))
        spread = dict(minval=-self.spread, maxval=self.spread)
        params = {
            name: jax.random.uniform(one, shape, jnp.float32, **spread)
            for one, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        bias = 0.0 if self.bound is None else self.op_bias
        params["op_bias"] = bias * jnp.array(self._is_favoured, jnp.float32)
        if precisions > 1:
            params["precision_bias"] = jnp.zeros(precisions)
        return params

    def walk(self, params: Params, key: Array | None = None, architecture=None) -> Walk:
        """Draws an architecture with `key`, or follows the one that is given."""
        space, dtype = self.space, params["start"].dtype
        noise = None
        if architecture is None:  # the greatest logit with Gumbel noise is a draw
            width = max(space.nodes + 2, len(space.ops), len(space.precisions))
            noise = jax.random.gumbel(key, (*space.shape, width), dtype)
        favoured = jnp.array(self._is_favoured)
        prior = jnp.where(favoured, self.op_prior, -self.op_prior).astype(dtype)
        priors = jnp.stack([prior, jnp.zeros_like(prior)])
        zeros = jnp.zeros((self.size,), dtype)
        carry, first = ((zeros, zeros), params["start"]), None
        if self._precisions == "shared":
            given = _at((noise, architecture), (0, 0, slice(1), PRECISION))
            carry, first = self._chosen(params, carry, self._head(params, "precision"), *given)
        cell = functools.partial(self._cell, params)
        _, (tokens, logs, entropies) = lax.scan(cell, carry, (noise, architecture, priors))
        log_probability, entropy = logs.sum(), entropies.sum()
        if self._precisions != "own":
            last = jnp.zeros((), jnp.int32)
            if first is not None:
                last, log_probability = first[0][0], log_probability + first[1][0]
                entropy = entropy + first[2][0]
            last = jnp.broadcast_to(last, (*tokens.shape[:-1], 1))
            tokens = jnp.concatenate([tokens, last], axis=-1)
        return Walk(tokens, log_probability, entropy)

    def _cell(self, params: Params, carry, each):
        """A cell's tokens `(B, 2, 2 or 3)`, their log-probabilities and entropies."""
        noise, given, prior = each
        nodes = self.space.nodes

        def warm_up(carry, _):
            memory = _lstm(params["lstm"], *carry)
            return (memory, params["start"]), memory[1] @ params["anchor_kernel"]

        def node(carry, each):
            carry, anchors, anchor_keys = carry
            number, noise, given = each

            def of_inputs(hidden):
                query = anchor_keys + (hidden @ params["query_kernel"])[None]
                logits = self._bounded(jnp.tanh(query) @ params["attention"])
                return jnp.where(jnp.arange(nodes + 2) < number + 2, logits, -jnp.inf)

            heads = {INPUT: (of_inputs, anchors), OP: self._head(params, "op", prior)}
            if self._precisions == "own":
                heads[PRECISION] = self._head(params, "precision")
            found = []
            for field, head in heads.items():
                of_field = _at((noise, given), (slice(None), field))
                carry, chosen = self._chosen(params, carry, head, *of_field)
                found.append(chosen)
            memory = _lstm(params["lstm"], *carry)
            anchors = anchors.at[number + 2].set(memory[1])
            anchor_keys = anchor_keys.at[number + 2].set(memory[1] @ params["anchor_kernel"])
            found = tuple(jnp.stack(each, axis=-1) for each in zip(*found, strict=True))
            return ((memory, params["start"]), anchors, anchor_keys), found

        # The inputs' anchors are zero, so it is by the states behind their keys that they differ.
        carry, of_inputs = lax.scan(warm_up, carry, length=2)
        anchors = jnp.zeros((nodes + 2, self.size), of_inputs.dtype)
        start = (carry, anchors, anchors.at[:2].set(of_inputs))
        (carry, *_), found = lax.scan(node, start, (jnp.arange(nodes), noise, given))
        return carry, found

    def _chosen(self, params: Params, carry, head, noise, given):
        """A token after the other, `(n,)`, with log-probabilities and entropies.

        Args:
          params: Of the controller.
          carry: Of the LSTM: its memory, and what the next step takes in.
          head: What makes logits of the hidden state, and what is taken in after each token.
          noise: `(n, at least as many as there are logits)`, or None where tokens are given.
          given: `(n,)`, or None.
        """
        logits_of, embedding = head

        def step(carry, each):
            noise, token = each
            memory = _lstm(params["lstm"], *carry)
            logits = logits_of(memory[1])
            if token is None:
                token = jnp.argmax(logits + noise[: len(logits)]).astype(jnp.int32)
            logs = jax.nn.log_softmax(logits)
            finite = jnp.where(jnp.isfinite(logs), logs, 0)  # -inf times 0 is no number
            entropy = -jnp.sum(jnp.exp(logs) * finite)
            return (memory, embedding[token]), (token, logs[token], entropy)

        return lax.scan(step, carry, (noise, given))

    def _head(self, params: Params, kind: str, prior: Array | float = 0.0):
        def logits_of(hidden):
            logits = hidden @ params[f"{kind}_kernel"] + params[f"{kind}_bias"]
            return self._bounded(logits, self.op_reduction) + prior

        return logits_of, params[f"{kind}_embedding"]

    def _bounded(self, logits: Array, reduction: float = 1.0) -> Array:
        logits = logits / self.temperature
        return logits if self.bound is None else self.bound / reduction * jnp.tanh(logits)


def moving_mean(mean: Array, values: Array, decay: float) -> Array:
    """`decay mean + (1 - decay) value`, for each of the values `(n,)` in turn: ()."""
    number = len(values)
    fades = decay ** jnp.arange(number - 1, -1, -1, dtype=values.dtype)
    return decay**number * mean + (1 - decay) * jnp.sum(fades * values)


def _at(tree, place):
    return jax.tree.map(lambda leaf: leaf[place], tree)


def _lstm(kernel: Array, memory: tuple[Array, Array], x: Array) -> tuple[Array, Array]:
    """The next cell and hidden state."""
    cell, hidden = memory
    gates = jnp.concatenate([x, hidden]) @ kernel
    enters, stays, leaves, candidate = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(enters) * jnp.tanh(candidate) + jax.nn.sigmoid(stays) * cell
    return cell, jax.nn.sigmoid(leaves) * jnp.tanh(cell)
