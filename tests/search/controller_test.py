"""The ENAS controller against a scalar reference, and against all architectures of a tiny space."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.models.space import Space
from efficient_nets.search.controller import Controller, ControllerState, moving_mean

TINY = Space(nodes=1, ops=("sep3", "identity"))  # 256 architectures
SHARED = Space(nodes=1, ops=("sep3",), precisions=("a", "b", "c"), shared_precision=True)  # 48
OWN = Space(nodes=3, ops=("sep3", "max3", "identity"), precisions=("a", "b"))


def wide(space, **options):
    """A small controller far from its start, in float64, whose choices depend on each other."""
    controller = Controller(space, size=4, spread=1.5, **options)
    params = controller.start(jax.random.key(5))
    return controller, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def every(space):
    """All architectures of a space: `(n, *shape)`."""
    free = [range(n) for n in space.choices.flat]
    found = np.array(list(itertools.product(*free)), np.int32).reshape(-1, *space.shape)
    if space.shared_precision:
        found = found[(found[..., 2] == found[:, :1, :1, :1, 2]).all((1, 2, 3))]
    assert len(found) == space.size
    return found


def reference(controller, params, architecture):
    """Log-probability and entropy of an architecture, a number after the other."""
    space, logs, entropies = controller.space, [], []
    size, zeros = controller.size, np.zeros(controller.size)
    memory, x = (zeros, zeros), params["start"]

    def step(x, memory):
        gates = np.concatenate([x, memory[1]]) @ params["lstm"]
        i, f, o = (1 / (1 + np.exp(-gates[n * size : (n + 1) * size])) for n in range(3))
        cell = i * np.tanh(gates[3 * size :]) + f * memory[0]
        return cell, o * np.tanh(cell)

    def bounded(x, bound):
        x = x / controller.temperature
        return x if controller.bound is None else bound * np.tanh(x)

    def choose(logits, token):
        p = np.exp(logits) / np.exp(logits).sum()
        logs.append(np.log(p[token]))
        entropies.append(-sum(each * np.log(each) for each in p))

    def linear(kind, token, prior=0.0):
        logits = memory[1] @ params[f"{kind}_kernel"] + params[f"{kind}_bias"]
        bound = controller.bound and controller.bound / controller.op_reduction
        choose(bounded(logits, bound) + prior, token)
        return params[f"{kind}_embedding"][token]

    prior = np.array([0.25 if name.startswith("sep") else -0.25 for name in space.ops])
    own = len(space.precisions) > 1 and not space.shared_precision
    if space.shared_precision:
        memory = step(x, memory)
        x = linear("precision", architecture[0, 0, 0, 2])
    for cell in range(2):
        anchors, keys = [], []
        for _ in range(2):
            memory = step(x, memory)
            x = params["start"]
            anchors.append(zeros)
            keys.append(memory[1] @ params["anchor_kernel"])
        for node in range(space.nodes):
            tokens = architecture[cell, node]
            for token in tokens[:, 0]:
                memory = step(x, memory)
                query = memory[1] @ params["query_kernel"]
                scores = [np.tanh(key + query) @ params["attention"] for key in keys]
                choose(bounded(np.array(scores), controller.bound), token)
                x = anchors[token]
            for token in tokens[:, 1]:
                memory = step(x, memory)
                x = linear("op", token, prior * (cell == 0))
            for token in tokens[:, 2] if own else ():
                memory = step(x, memory)
                x = linear("precision", token)
            memory = step(x, memory)
            x = params["start"]
            anchors.append(memory[1])
            keys.append(memory[1] @ params["anchor_kernel"])
    return sum(logs), sum(entropies)


@pytest.mark.parametrize(
    ("space", "options"), [(OWN, {}), (SHARED, dict(bound=None, temperature=2.0))]
)
def test_logits_are_those_of_the_equations(space, options):
    controller, params = wide(space, **options)
    architecture = np.asarray(space.random(jax.random.key(1)))
    with jax.enable_x64(True):
        found = jax.jit(lambda params, one: controller.walk(params, architecture=one))(
            params, jnp.asarray(architecture)
        )
        log, entropy = reference(controller, params, architecture)
        # Some hundred sums of products in double precision.
        assert float(found.log_probability) == pytest.approx(log, rel=1e-12)
        assert float(found.entropy) == pytest.approx(entropy, rel=1e-12)


def test_draws_have_the_probability_that_they_are_said_to_have():
    controller, params = wide(SHARED, bound=None)
    architectures, number = every(SHARED), 20_000
    walk = jax.jit(jax.vmap(lambda one: controller.walk(params, architecture=one)))
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        p = np.exp(walk(jnp.asarray(architectures)).log_probability)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p.max() > 3 * p.min()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    draw = jax.jit(jax.vmap(lambda key: controller.walk(params, key).architecture))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), number)))
    counts = [(drawn == one).all((1, 2, 3, 4)).sum() for one in architectures]
    deviation = np.sqrt(number * p * (1 - p))
    np.testing.assert_array_less(np.abs(counts - number * p), 5 * deviation)


def test_the_expected_step_is_the_exact_gradient():
    weight = 0.3
    controller, params = wide(TINY, entropy_weight=weight)
    architectures = every(TINY)
    rewards = np.random.default_rng(0).normal(size=len(architectures))
    with jax.enable_x64(True):
        given = jnp.asarray(architectures), jnp.asarray(rewards)
        params = jax.tree.map(jnp.asarray, params)
        state = controller.init(jax.random.key(0))._replace(
            step=jnp.ones((), jnp.int32), baseline=jnp.asarray(0.7)
        )

        def objective(params):
            logs = jax.vmap(lambda one: controller.walk(params, architecture=one).log_probability)
            logs = logs(given[0])
            return jnp.sum(jnp.exp(logs) * (given[1] - weight * logs)), jnp.exp(logs)

        def of_one(architecture, reward):
            one = architecture[None], reward[None]
            return jax.grad(controller.loss, has_aux=True)(params, state, *one)[0]

        exact, p = jax.jit(jax.grad(objective, has_aux=True))(params)
        each = jax.jit(jax.vmap(of_one))(*given)
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        for name, gradient in exact.items():
            mean = -np.tensordot(p, each[name], 1)
            # 256 terms of some ten.
            np.testing.assert_allclose(mean, gradient, atol=1e-11, err_msg=name)
            assert np.abs(gradient).max() > 1e-4


def test_the_baseline_is_the_moving_mean_of_rewards():
    values, mean = [1.0, 2.0, 4.0], 0.5
    found = moving_mean(jnp.array(mean), jnp.array(values), 0.9)
    for value in values:
        mean = 0.9 * mean + 0.1 * value
    assert float(found) == pytest.approx(mean, rel=1e-6)  # float32


@pytest.mark.slow
def test_a_net_that_diverged_counts_as_nothing_right():
    controller = Controller(Space(nodes=1, ops=("a", "b")), size=4)
    state = controller.init(jax.random.key(0))
    architectures = controller.propose(state, jax.random.key(1), 2)
    told = [
        controller.update(state, architectures, jnp.asarray(rewards, jnp.float32))[0]
        for rewards in ([0.5, np.nan], [0.5, 0.0])
    ]
    jax.tree.map(np.testing.assert_array_equal, *told)


def test_the_first_baseline_is_the_mean():
    controller, params = wide(TINY, entropy_weight=0.5)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        state = ControllerState(params, None, jnp.array(7.0), jnp.zeros((), jnp.int32))
        architectures, rewards = jnp.asarray(every(TINY)[:3]), jnp.array([1.0, 2.0, 6.0])
        loss = jax.jit(lambda params: controller.loss(params, state, architectures, rewards))
        _, (walks, totals, baseline) = jax.tree.map(np.asarray, loss(params))
    np.testing.assert_allclose(totals, [1, 2, 6] + 0.5 * walks.entropy, rtol=1e-12)
    assert float(baseline) == pytest.approx(float(np.mean(totals)), rel=1e-12)


@pytest.mark.slow
def test_it_finds_the_ops_of_a_hidden_architecture():
    space = Space(nodes=2)
    hidden = space.random(jax.random.key(9))
    options = dict(bound=None, learning_rate=0.01, entropy_weight=0.03)
    controller = Controller(space, size=32, **options)

    @functools.partial(jax.jit, static_argnums=1)
    def learned(state, steps):
        def step(state, key):
            found = controller.propose(state, key, 20)
            hits = (found[..., 1] == hidden[None, ..., 1]).mean((1, 2, 3))
            return controller.update(state, found, hits)[0], hits.mean()

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), steps))

    _, rewards = learned(controller.init(jax.random.key(0)), 300)
    # A fifth of random ops are right.
    assert rewards[:5].mean() < 0.4 and rewards[-20:].mean() > 0.9


def test_bounded_logits_cannot_commit():
    controller, params = wide(TINY, favoured="")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(100 * leaf), params)
        walk = jax.vmap(lambda one: controller.walk(params, architecture=one).log_probability)
        logs = np.asarray(walk(jnp.asarray(every(TINY))))
    # Eight tokens of two values, four of inputs, each at most twice the bound from the other.
    assert logs.max() - logs.min() < 4 * 2 * 1.10 + 4 * 2 * 0.44 + 1e-9


def test_the_start_favours_convolutions():
    space = Space(ops=("max3", "sep3", "identity", "sep5"))
    bias = [0.0, 10.0, 0.0, 10.0]
    assert Controller(space).start(jax.random.key(0))["op_bias"].tolist() == bias
    none = Controller(space, favoured="").start(jax.random.key(0))["op_bias"]
    unbounded = Controller(space, bound=None).start(jax.random.key(0))["op_bias"]
    assert not none.any() and not unbounded.any()


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("options", "part"),
    [
        (dict(size=0), "enas.size=0: must be at least 1"),
        (dict(bound=0.0), "enas.bound=0.0: must be above 0"),
        (dict(baseline_decay=1.0), r"enas.baseline_decay=1.0: must be in \[0, 1\)"),
        (dict(favoured="["), r"enas.favoured='\[' is no regular expression: "),
    ],
)
def test_options_that_make_no_sense_are_named(options, part):
    with pytest.raises(UserError, match=part):
        Controller(TINY, **options)
