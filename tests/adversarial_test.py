"""The step of a generator and its discriminator against one written out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_nets import adversarial, data, experiment, optim, paths
from efficient_nets import config as configs
from efficient_nets.errors import UserError

RATE, FACTOR = 0.01, 3.0  # of Adam, and of the discriminator's
# Of biases in front of a batch norm, whose gradient of 0 Adam divides by its size.
ROUNDING = re.compile(r"generator/(?!image).*/w/bias")


def tiny():
    config = configs.defaults()
    config.task = "generation"
    config.model = configs.model("sngan", latent=3, width=1 / 64, discriminator_blocks=2)
    config.layers = (dict(match="discriminator/blocks/1/conv2", neuron="t4"),)
    config.data.name = "digits"
    config.data.train, config.data.test = "train[:64]", "test[:40]"
    config.data.mean = config.data.std = (0.5,)
    config.generation.critic_updates = 2
    config.optimizer.name, config.optimizer.learning_rate = "adam", RATE
    config.optimizer.b1, config.optimizer.b2 = 0.0, 0.9
    config.optimizer.rules = (dict(match="^discriminator/", learning_rate=FACTOR),)
    config.schedule.name = "constant"
    config.train.batch_size, config.train.ema = 32, 0.5
    return config


def written_out(run, state, images, made_from, generated_from):
    """Two updates of the discriminator and one of the generator, all on one device."""
    model = nnx.merge(run.graph, state.params, state.stats)
    model.train()
    made = model.generator(made_from)
    model = nnx.merge(run.graph, state.params, state.stats)  # whose averages have not moved
    model.train()
    critic = optax.adam(FACTOR * RATE, 0.0, 0.9)
    of_critic = critic.init(nnx.state(model.discriminator, nnx.Param))

    def hinge(discriminator, index):
        real = discriminator(images[index::2])
        return jnp.mean(nnx.relu(1 - real)) + jnp.mean(nnx.relu(1 + discriminator(made[index::2])))

    losses = []
    for index in range(2):
        for _, layer in nnx.iter_graph(model.discriminator):
            if hasattr(layer, "advance") and hasattr(layer, "spec"):
                layer.advance()
        model.discriminator.eval()  # one step of the power iteration for both halves
        loss, gradient = nnx.value_and_grad(hinge)(model.discriminator, index)
        params = nnx.state(model.discriminator, nnx.Param)
        change, of_critic = critic.update(gradient, of_critic)
        nnx.update(model.discriminator, optax.apply_updates(params, change))
        model.train()
        losses.append(loss)
    generator = optax.adam(RATE, 0.0, 0.9)
    of_critic = nnx.split(model.discriminator)

    def fools(generator):
        critic = nnx.merge(*of_critic, copy=True)
        critic.train()
        return -jnp.mean(critic(generator(generated_from)))

    loss, gradient = nnx.value_and_grad(fools)(model.generator)
    params = nnx.state(model.generator, nnx.Param)
    change, _ = generator.update(gradient, generator.init(params))
    nnx.update(model.generator, optax.apply_updates(params, change))
    nnx.update(model.discriminator, of_critic[1])
    return model, sum(losses) / 2, loss


def a_state(run):
    """Of random numbers; compiling the real one's start takes as long as the step."""
    rng = np.random.default_rng(0)

    def fill(leaf, x):
        kind = leaf.rpartition("/")[2] if leaf.startswith(("params", "stats")) else ""
        if kind in ("kernel", "u"):
            value = rng.normal(0, 0.3, x.shape)
            return (value / np.linalg.norm(value) if kind == "u" else value).astype(x.dtype)
        return np.full(x.shape, kind in ("scale", "var"), x.dtype)

    state = paths.map_named(fill, run.abstract)
    state = state._replace(ema={"params": state.params, "stats": state.stats})
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, run.abstract))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_is_the_updates_one_after_the_other(devices, monkeypatch):
    every = jax.local_devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: every)
    config = tiny()
    run = experiment.build(config, data.load(config.data, config.task))
    state = a_state(run)
    batch = next(data.train_batches(run.dataset.train, 32, seed=0))
    new, metrics = jax.jit(lambda *given: adversarial.train_step(run, *given))(
        state, batch, run.dataset.train.resident
    )
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    inputs_key, *keys = jax.random.split(key, 3)
    gathered = data.gather(run.dataset.train.resident, batch)
    images, _ = run.task.inputs(
        inputs_key, gathered, config_data=config.data, info=run.dataset.info
    )
    drawn = [jax.random.normal(key, (32, 3)) for key in keys]
    on_one = jax.device_put((jax.device_get(state), images, *drawn), jax.devices()[0])
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes int and float
        written = jax.jit(lambda *given: _split(written_out(run, *given)))
        model, critic_loss, generator_loss = written(*on_one)
    # float32, through ten layers and an optimizer that divides by the gradient's size.
    np.testing.assert_allclose(metrics["discriminator_loss"], critic_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["generator_loss"], generator_loss, rtol=1e-4, atol=1e-5)
    params, stats = model
    for ours, expected in ((new.params, params), (new.stats, stats)):
        ours, expected = paths.named_leaves(ours), paths.named_leaves(expected)
        assert ours.keys() == expected.keys()
        for name, value in ours.items():
            if ROUNDING.fullmatch(name):
                continue
            np.testing.assert_allclose(
                value, expected[name], rtol=1e-3, atol=RATE / 100, err_msg=name
            )
    moved = paths.named_leaves(
        jax.tree.map(lambda old, new: bool(np.any(old != new)), state.params, new.params)
    )
    assert all(moves for name, moves in moved.items() if not ROUNDING.fullmatch(name))
    for name, value in paths.named_leaves(new.ema["params"]).items():
        old, fresh = (paths.named_leaves(of.params)[name] for of in (state, new))
        np.testing.assert_allclose(value, (old + fresh) / 2, rtol=1e-5, atol=1e-6)
    assert int(new.step) == 1 and jax.tree.structure(new) == jax.tree.structure(run.abstract)


def _split(found):
    model, *losses = found
    _, params, stats = nnx.split(model, nnx.Param, ...)
    return (nnx.to_pure_dict(params), nnx.to_pure_dict(stats)), *losses


def test_each_part_has_its_own_optimizer_and_its_count_of_updates():
    config = configs.defaults().optimizer
    config.clip_norm, config.momentum = 1.0, 0.0
    config.rules = (dict(match="^one/x$", learning_rate=2.0),)
    params = {"one": {"x": jnp.ones(2)}, "two": {"x": jnp.ones(2)}}
    rate = lambda step: jnp.where(step < 1, 1.0, 0.1)  # noqa: E731
    apart = optim.apart(config, rate, params, {"one": 1, "two": 2})
    states = apart.init(params)
    for part, expected in (("one", [-2, -0.2, -0.2]), ("two", [-1, -1, -0.1])):
        for value in expected:
            gradient = {part: {"x": jnp.array([100.0, 0.0])}}
            change, states[part] = apart.chains[part].update(
                gradient, states[part], {part: params[part]}
            )
            np.testing.assert_allclose(change[part]["x"], [value, 0], rtol=1e-6)
    config.rules = (dict(match="three", learning_rate=2.0),)
    with pytest.raises(UserError, match="'three' matches no parameter"):
        optim.apart(config, rate, params, {"one": 1, "two": 2})


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("generation", "critic_updates", 3, "train.batch_size=32: generation.critic_updates=3"),
        ("generation", "critic_updates", 0, "generation.critic_updates=0: must be at least 1"),
        ("optimizer", "accumulate", 2, "optimizer.accumulate=2: task='generation'"),
        ("log", "products", True, "log.products=True: task='generation'"),
        ("data", "mean", (0.4,), r"data.mean=\(0.4,\): images of a generator"),
        ("data", "cutout", 2, "data.cutout=2: only task=classification"),
        ("teacher", "checkpoint", "any", "teacher.checkpoint='any': only task=classification"),
    ],
)
def test_what_does_not_fit(section, field, value, message):
    config = tiny()
    config[section][field] = value
    with pytest.raises(UserError, match=message):
        experiment.build(config, data.load(config.data, config.task))
