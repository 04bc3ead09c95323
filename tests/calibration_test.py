"""Runs whose nets are rounded: where ranges start, and what the steps do with schedules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import calibration, data, evaluation, experiment, layers, sharding
from efficient_nets import train as training
from efficient_nets.errors import UserError
from tests.train_test import tiny

PRECISION = dict(
    kernel=dict(method="lsq", bits=4, loss=0.1, stop_epoch=3.0),
    input=dict(method="lsq", bits=2, float_epochs=1.0, stages=((0, 16), (2, 4))),
)


@pytest.fixture(scope="module")
def run():
    rules = (dict(match="conv1", precision=PRECISION),)
    config = tiny(layers=rules, train__epochs=3.0, calibration__batch_size=64)
    return experiment.build(config, data.load(config.data))


@pytest.fixture(scope="module")
def started(run):
    return calibration.calibrated_start(run, run.initial_state(), trained=False)


def ranges_of(run, state):
    model = nnx.merge(run.graph, state.params, state.stats)
    return dict(layers.ranges(model))


def test_ranges_start_from_training_images(run, started):
    fresh, state = run.initial_state(), started
    batch = next(data.train_batches(run.dataset.train, 64, seed=run.config.seed))
    images = data.gather(run.dataset.train.resident, batch)["image"]
    model = nnx.merge(run.graph, fresh.params, fresh.stats)
    expected = layers.calibrate(model, data.normalise(jnp.asarray(images), run.dataset.info))
    found = ranges_of(run, state)
    assert len(found) == 2 * 3
    for path, wanted in layers.ranges(expected):
        # Sums of up to 64 * 8 * 8 * 16 numbers, on eight devices and on one.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            found[path].arrays(),
            wanted.arrays(),
        )
    before = ranges_of(run, fresh)["stage2/0/conv1/ranges/input"].step[0]
    assert before != found["stage2/0/conv1/ranges/input"].step[0]


def test_a_step_follows_the_schedules_and_adds_the_losses(run, started):
    state, resident = started, evaluation.put_resident(run, "train")
    batch = next(data.train_batches(run.dataset.train, 32, seed=0))
    batch = sharding.put_batch(batch, run.mesh)
    step = jax.jit(functools.partial(training.train_step, run))
    phases = {}
    for epoch in (0, 1, 2, 3):
        before = ranges_of(run, state)["stage1/0/conv1/ranges/w"]
        now = np.asarray(epoch * run.epoch_steps, np.int32)
        at = state._replace(step=jax.device_put(now, state.step.sharding))
        # Once it is compiled, nothing of the schedule is decided on the host.
        with jax.transfer_guard("disallow" if epoch else "allow"):
            state, metrics = step(at, batch, resident)
        found = ranges_of(run, state)["stage1/0/conv1/ranges/input"]
        phases[epoch] = int(found.active[...]), int(found.stage[...])
        # In the last epoch kernels are not rounded any more.
        assert (float(metrics["quantization_loss"]) > 0) == (epoch < 3)
        assert float(metrics["loss"]) > 0
        kernel = ranges_of(run, state)["stage1/0/conv1/ranges/w"]
        assert int(kernel.active[...]) == int(not kernel.stopped[...]) == (epoch < 3)
        assert (kernel.step[0] != before.step[0]) == (epoch < 3)
    assert phases == {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (1, 1)}
    assert step._cache_size() == 1


def test_the_averaged_net_follows_the_schedules_too(run, started):
    config = run.config.copy_and_resolve_references()
    config.train.ema = 0.999
    averaged = experiment.build(config, run.dataset)
    ema = {"params": started.params, "stats": started.stats}
    at = jnp.asarray(2 * run.epoch_steps, jnp.int32)
    state = started._replace(ema=ema, step=at)
    batch = next(data.train_batches(run.dataset.train, 32, seed=0))
    step = jax.jit(functools.partial(training.train_step, averaged))
    state, _ = step(state, batch, evaluation.put_resident(run, "train"))
    ranges = [
        nnx.merge(run.graph, net["params"], net["stats"]).stage1[0].conv1.ranges["input"]
        for net in (state.net, {"params": state.params, "stats": state.stats})
    ]
    assert [int(found.stage[...]) for found in ranges] == [1, 1]
    # Steps of the new levels, five times as wide: an average over 1,000 steps would be the old one.
    np.testing.assert_allclose(ranges[0].step[...], ranges[1].step[...], rtol=0.1)


def test_nothing_is_calibrated_where_nothing_is_rounded_or_asked_for(run):
    config = run.config.copy_and_resolve_references()
    config.calibration.batch_size = 0
    fresh = run.initial_state()
    off = dataclasses.replace(run, config=config)
    assert calibration.calibrated_start(off, fresh, trained=False) is fresh
    plain = experiment.build(tiny(), run.dataset)
    state = plain.initial_state()
    assert calibration.calibrated_start(plain, state, trained=False) is state


def test_norms_get_the_moments_of_training_batches(run, started):
    config = run.config.copy_and_resolve_references()
    config.checkpoint.init_from = "elsewhere"
    config.calibration.update(batch_size=0, norm_batches=2)
    state = calibration.calibrated_start(
        dataclasses.replace(run, config=config), started, trained=True
    )
    source = data.train_batches(run.dataset.train, 32, seed=config.seed)
    images = [data.gather(run.dataset.train.resident, next(source))["image"] for _ in range(2)]
    images = [data.normalise(jnp.asarray(batch), run.dataset.info) for batch in images]
    model = nnx.merge(run.graph, started.params, started.stats)
    expected = nnx.state(layers.recalibrate_norms(model, images), nnx.Not(nnx.Param))
    # Steps at which values are rounded lie apart by the rounding of sums on 8 devices and on one.
    close = functools.partial(np.testing.assert_allclose, rtol=0.02, atol=1e-3)
    jax.tree.map(close, state.stats, nnx.to_pure_dict(expected))
    stem = [stats["stem_norm"] for stats in (state.stats, nnx.to_pure_dict(expected))]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *stem)
    jax.tree.map(np.testing.assert_array_equal, state.params, started.params)
    assert np.any(state.stats["stem_norm"]["mean"] != started.stats["stem_norm"]["mean"])


def test_norms_of_a_fresh_net_have_nothing_to_keep():
    with pytest.raises(UserError, match="calibration.norm_batches=2: .*init_from"):
        experiment.build(tiny(calibration__norm_batches=2), data.load(tiny().data))


def test_inputs_below_0_that_a_quantizer_loses_are_named(caplog):
    rules = (
        dict(match="^stem$", precision="w=lsq:4,a=lsq:4"),  # a normalised image
        dict(match="stage1/0/conv1", precision="w=lsq:4,a=lsq:4s"),
        dict(match="stage1/0/conv2", precision="lsq:w4a4"),  # behind a ReLU
        dict(match="shortcut", precision="lsq+:a4"),
    )
    config = tiny(layers=rules)
    run = experiment.build(config, data.load(config.data))
    calibration.calibrated_start(run, run.initial_state(), trained=False)
    named = [message for message in caplog.messages if "lies below 0" in message]
    assert len(named) == 1 and named[0].startswith("stem: ") and "'lsq:w4a4s'" in named[0]


def test_an_unknown_calibration():
    with pytest.raises(UserError, match="calibration.how='max' is not known.*minmax"):
        experiment.build(tiny(calibration__how="max"), data.load(tiny().data))
