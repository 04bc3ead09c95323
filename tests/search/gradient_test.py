"""DARTS and Gumbel: a step is Adam's, what they find is best, and what they propose is drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import models
from efficient_nets.errors import UserError
from efficient_nets.models import cells
from efficient_nets.models.space import Space
from efficient_nets.search import relaxation, rewards
from efficient_nets.search.gradient import Darts, Gumbel

SPACE = Space(nodes=2, ops=("sep3", "max3"), precisions=("a", "b"))
SHARED = Space(nodes=1, ops=("sep3", "max3"), precisions=("a", "b", "c"), shared_precision=True)
BOTH = pytest.mark.parametrize("kind", [Darts, Gumbel])


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@BOTH
def test_the_cheapest_architecture_is_found(kind):
    strategy = kind(SPACE, learning_rate=0.1, distinct_inputs=False)
    rng = np.random.default_rng(0)
    # A sum over tokens: where an op is cheap at one precision alone, gradients may not find it.
    table = sum(rng.uniform(size=(2, 2, 2, *shape)) for shape in ((4, 1, 1), (1, 2, 1), (1, 1, 2)))
    ends = rng.uniform(0, 0.3, size=(2, 2))
    cost = rewards.ArchitectureCost(*(jnp.asarray(x, jnp.float32) for x in (1.0, table, ends)))

    @jax.jit
    def searched(state):
        def step(state, number):
            def loss(logits):
                choices, tokens = strategy.relaxed(logits, keys[number], number / 300)
                assert (tokens is None) == strategy.mixes
                return cost.of(choices)

            return strategy.descend(state, jax.grad(loss)(state.logits))

        keys = jax.random.split(jax.random.key(1), 300)
        return jax.lax.scan(step, state, jnp.arange(300))

    start = strategy.init(jax.random.key(0))
    state, metrics = searched(start)
    assert finite((start, state, metrics)) and int(state.step) == 300
    # The cells' costs add up: of each the best of all, the other one being whatever it is.
    every = itertools.product(*(range(number) for number in SPACE.choices[0].flat))
    every = np.array(list(every), np.int32).reshape(-1, *SPACE.shape[1:])
    of = jax.jit(jax.vmap(lambda one: cost.of(relaxation.one_hots(SPACE, one))))
    both = np.zeros((2, len(every), *SPACE.shape), np.int32)
    both[0, :, 0], both[1, :, 1] = every, every
    best = np.stack([every[np.argmin(of(each))] for each in both])
    first, *others = np.asarray(strategy.finalists(state, jax.random.key(2), 3))
    np.testing.assert_array_equal(first, best)
    assert len(others) == 2
    assert metrics["entropy"][0] > 0.9 * np.log(SPACE.size) > metrics["entropy"][-1]


@BOTH
def test_a_step_is_adam_s_with_decay(kind):
    """As PyTorch's, which both papers use: the decay is part of the gradient."""
    strategy = kind(SPACE, learning_rate=0.1, weight_decay=0.5, noise=1.0)
    rng = np.random.default_rng(0)
    state = strategy.init(jax.random.key(0))
    logits = [np.array(leaf, np.float64) for leaf in state.logits]
    first, second = ([np.zeros_like(leaf) for leaf in logits] for _ in range(2))
    step = jax.jit(strategy.descend)
    for number in (1, 2):
        given = [rng.normal(size=leaf.shape) for leaf in logits]
        state, metrics = step(state, type(state.logits)(*map(jnp.float32, given)))
        for i, gradient in enumerate(given):
            gradient = gradient + 0.5 * logits[i]
            first[i] = 0.5 * first[i] + 0.5 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            mean, square = first[i] / (1 - 0.5**number), second[i] / (1 - 0.999**number)
            logits[i] = logits[i] - 0.1 * mean / (np.sqrt(square) + 1e-8)
        norm = np.sqrt(sum(np.sum(each**2) for each in given))
        assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    for found, expected in zip(state.logits, logits, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # single precision
    assert metrics["learning_rate"] == np.float32(0.1)


def test_proposals_are_drawn_by_the_probabilities():
    space, number = SHARED, 2000
    strategy = Gumbel(space, noise=1.0)
    state = strategy.init(jax.random.key(0))
    p = strategy.probabilities(state)
    found = jax.jit(strategy.propose, static_argnums=2)(state, jax.random.key(1), number)
    for one in np.asarray(found[:50]):
        space.check(one)
    hots = jax.vmap(lambda one: relaxation.one_hots(space, one))(found)
    for hot, share in zip(hots, p, strict=True):
        deviation = np.sqrt(share * (1 - share) / number)
        np.testing.assert_array_less(np.abs(hot.mean(0) - share), 5 * deviation + 1e-6)
    choices, tokens = strategy.relaxed(state.logits, jax.random.key(3), jnp.float32(0.5))
    space.check(tokens)
    for each, hot in zip(choices, relaxation.one_hots(space, tokens), strict=True):
        np.testing.assert_allclose(each, hot, atol=1e-6)


def test_the_temperature_goes_from_the_start_to_the_end():
    """The gradient at either progress is that of a sample at that temperature."""
    strategy = Gumbel(SHARED, noise=1.0, temperature_start=4.0, temperature_end=0.5)
    logits, key = strategy.init(jax.random.key(0)).logits, jax.random.key(1)

    def gradient(sample):
        of = jax.grad(lambda logits: jnp.sum(jnp.sin(sample(logits).inputs[0, 0])))
        return np.asarray(of(logits).inputs[0, 0, 0])

    for progress, temperature in ((0.0, 4.0), (1.0, 0.5)):
        found = gradient(lambda logits, t=progress: strategy.relaxed(logits, key, t)[0])
        own = gradient(lambda logits, t=temperature: strategy.relaxation.sample(logits, key, t))
        np.testing.assert_allclose(found, own, rtol=1e-6)
        assert found.any()


@BOTH
def test_a_net_of_cells_gives_the_gradient(kind, monkeypatch):
    """Of a loss of its logits, as the module says: to what a token is of, and is there."""
    options = dict(nodes=1, ops=("avg3", "identity"), precisions=("float",))
    strategy = kind(Space(**options), noise=0.5)
    shape = dict(image_shape=(4, 4, 1), num_classes=2, layers=0, features=4)
    monkeypatch.setattr(cells, "reduction_places", lambda layers, reductions: (1,))  # two cells
    made = dict(arc="", mixes=strategy.mixes, **shape, **options)
    net = nnx.eval_shape(lambda: models.create("cells", **made, rngs=nnx.Rngs(0)))
    graph, params, others = nnx.split(net, nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), others)
    images = jax.random.normal(jax.random.key(0), (4, 4, 4, 1))

    @jax.jit
    @jax.value_and_grad
    def loss(logits):
        net = nnx.merge(graph, params, others, copy=True)
        choices, tokens = strategy.relaxed(logits, jax.random.key(1), jnp.float32(0.9))
        if strategy.mixes:
            net.choose(choices)
        else:
            net.architecture[...] = tokens
            net.gates = nnx.data(relaxation.gates(choices, tokens))
        return jnp.sum(jnp.sin(net(images)))

    logits = strategy.init(jax.random.key(2)).logits
    _, gradient = loss(logits)
    assert finite(gradient) and not gradient.inputs[..., 2].any()
    assert np.all(np.abs(gradient.ops) > 1e-6)
    for leaf in gradient:  # what is added to all logits of a token changes nothing
        np.testing.assert_allclose(leaf.sum(-1), np.zeros(leaf.shape[:-1]), atol=1e-6)
    if strategy.mixes:  # central differences in single precision
        step = 1e-2
        ends = (logits.ops.at[1, 0, 1, 0].add(sign * step) for sign in (1, -1))
        high, low = (float(loss(logits._replace(ops=ops))[0]) for ops in ends)
        expected = pytest.approx((high - low) / (2 * step), rel=0.01, abs=1e-5)
        assert float(gradient.ops[1, 0, 1, 0]) == expected and abs(high - low) > 1e-5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Darts, dict(learning_rate=0.0), r"darts\.learning_rate=0\.0: must be above 0"),
        (Darts, dict(weight_decay=-1.0), r"darts\.weight_decay=-1\.0: must be at least 0"),
        (Gumbel, dict(beta1=1.0), r"gumbel\.beta1=1\.0: must be in \[0, 1\)"),
        (Gumbel, dict(noise=-1.0), r"gumbel\.noise=-1\.0: must be at least 0"),
        (Gumbel, dict(temperature_end=0.0), r"gumbel\.temperature_end=0\.0: must be above 0"),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(SPACE, **options)
