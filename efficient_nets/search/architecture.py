"""Architecture parameters: what is sampled from them, and their gradient (ProxylessNAS, wiNAS).

L layers choose from K candidates each: `logits` `(L, K)`, of which p = softmax(logits) along K.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def sample(key: Array, logits: Array) -> Array:
    """A candidate a layer, from p: `(L,)` int32."""
    return jax.random.categorical(key, logits).astype(jnp.int32)


def sample_pairs(key: Array, logits: Array) -> Array:
    """Two different candidates a layer, `(L, 2)` int32: the one whose gate is open comes first.

    The two are drawn from p one after the other, without replacement (the greatest two of the
    logits with Gumbel noise are that); which of them is open, from p renormalised over the two.
    """
    of_pair, of_gate = jax.random.split(key)
    noise = jax.random.gumbel(of_pair, logits.shape, logits.dtype)
    _, pairs = lax.top_k(logits + noise, 2)
    second = jax.random.categorical(of_gate, _at(logits, pairs)) == 1
    return jnp.where(second[:, None], pairs[:, ::-1], pairs).astype(jnp.int32)


def gate_gradient(logits: Array, pairs: Array, of_gates: Array) -> Array:
    """dL/dlogits `(L, K)` of dL/dgates, `(L, 2)`: zero for what was not sampled.

        dL/dlogit_i = sum_j dL/dg_j dp_j/dlogit_i = sum_j dL/dg_j p_j (delta_ij - p_i)

    for the two sampled i and j, whose p is renormalised over both (ProxylessNAS, arXiv 1812.00332,
    equation 4 and section 3.2.1). The paper then rescales the two so that the others' p stay, which
    is left out: the gradient of the cost moves all of them.
    """
    p = jax.nn.softmax(_at(logits, pairs))
    mean = jnp.sum(p * of_gates, axis=-1, keepdims=True)
    return jnp.put_along_axis(
        jnp.zeros_like(logits), pairs, p * (of_gates - mean), axis=-1, inplace=False
    )


def expected_cost(logits: Array, costs: Array) -> Array:
    """`sum_l sum_k p[l, k] costs[l, k]`: a scalar; costs `(L, K)`."""
    return jnp.sum(jax.nn.softmax(logits) * costs)


def entropy(logits: Array) -> Array:
    """Of p, the mean over layers, in nats: log K where nothing is decided, 0 where all is."""
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(logs) * logs, axis=-1))


def _at(logits: Array, pairs: Array) -> Array:
    return jnp.take_along_axis(logits, pairs, axis=-1)
