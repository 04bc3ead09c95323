"""Whole runs of a tiny quadratic net on digits: resumed, killed, on other devices, diverging."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import data, evaluation, experiment, layers, sharding, workdirs
from efficient_nets import train as training
from efficient_nets.checkpoint import CheckpointError
from efficient_nets.errors import TrainingDiverged, UserError
from efficient_nets.layers import Dense, LayerSpec
from efficient_nets.models import cells
from tests import tiny_config


def tiny(**changes):
    """`tests/tiny_config.py` with some fields changed; `a__b` is field b of section a."""
    config = tiny_config.get_config()
    for field, value in changes.items():
        *sections, name = field.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


def scores_of(run, state):
    return evaluation.evaluate_all(evaluation.evaluators(run), state)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, training.train(tiny(), workdir)


def test_a_run_leaves_all_its_files_and_a_complete_result(whole):
    workdir, result = whole
    assert json.loads((workdir / "result.json").read_text()) == result
    assert set(result) == {
        *("test/accuracy", "test/loss", "params", "macs", "steps", "seconds", "images_per_second"),
        *("dataset", "device", "config_hash", "params_digest"),
    }
    assert result["steps"] == 10 and result["dataset"] == "digits"
    assert len(result["params_digest"]) == len(result["config_hash"]) == 64
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "checkpoints", "summary.txt", "plots"}
    assert json.loads((workdir / "summary.json").read_text())["params"] == result["params"]


def test_metrics_hold_means_of_training_and_one_evaluation_an_epoch(whole):
    lines = metrics(whole[0])
    train = [line for line in lines if "train/loss" in line]
    test = [line for line in lines if "test/accuracy" in line]
    assert [line["step"] for line in train] == [2, 4, 6, 8, 10]
    assert [line["step"] for line in test] == [5, 10]
    assert train[0].keys() >= {"train/accuracy", "train/learning_rate", "train/gradient_norm"}
    assert test[-1]["test/accuracy"] == whole[1]["test/accuracy"]
    assert np.isclose(test[-1]["test/accuracy"] * 100 % 1, 0) or test[-1]["test/accuracy"] == 1


def test_the_same_config_gives_the_same_bits(whole, tmp_path):
    assert training.train(tiny(), tmp_path)["params_digest"] == whole[1]["params_digest"]


@pytest.mark.slow
def test_another_seed_gives_another_net(whole, tmp_path):
    assert training.train(tiny(seed=1), tmp_path)["params_digest"] != whole[1]["params_digest"]


class Killed(Exception):
    pass


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("at", [slow(3), 5, slow(7)])
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, at):
    """Saved every step but evaluated every epoch; the kill falls within, at and after an epoch."""
    config = tiny(checkpoint__every_epochs=0.2)
    save = training.Checkpoints.save

    def saves_until_killed(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Checkpoints, "save", saves_until_killed)
        training.train(config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/loss": 123.0}\n{"step": 1')  # after the checkpoint, and half
    result = training.train(config, tmp_path)
    assert result["params_digest"] == whole[1]["params_digest"]
    assert metrics(tmp_path) == metrics(whole[0])


@pytest.mark.slow
def test_several_steps_in_one_dispatch_train_the_same(whole, tmp_path):
    result = training.train(tiny(train__steps_per_dispatch=3), tmp_path)
    assert result["steps"] == 10
    for one, three in zip(metrics(whole[0]), metrics(tmp_path), strict=True):
        # Another compiled program: float32 rounding, grown over 10 steps.
        assert one.keys() == three.keys()
        np.testing.assert_allclose([*one.values()], [*three.values()], rtol=2e-3, atol=1e-4)


def state_after(config, devices, steps=5):
    """Parameters after some steps on the first `devices` devices, and the losses on the way."""
    dataset = data.load(config.data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:devices])
        run = experiment.build(config, dataset)
    state, losses = run.initial_state(), []
    resident = evaluation.put_resident(run, "train")
    batches = data.train_batches(dataset.train, config.train.batch_size, seed=config.seed)
    step = jax.jit(lambda *a: training.train_step(run, *a))
    for _ in range(steps):
        state, scores = step(state, sharding.put_batch(next(batches), run.mesh), resident)
        losses.append(float(scores["loss"]))
    return sharding.fetch(state.params), losses


def test_the_last_state_is_evaluated_once_on_each_split(tmp_path, monkeypatch):
    evaluated, evaluate = [], evaluation.Evaluator.__call__

    def counted(self, state):
        evaluated.append(self.split)
        return evaluate(self, state)

    monkeypatch.setattr(evaluation.Evaluator, "__call__", counted)
    config = tiny(data__validation="train[160:200]")
    result = training.train(config, tmp_path)
    assert evaluated == ["validation", "validation", "test"]
    assert metrics(tmp_path)[-1]["validation/loss"] == result["validation/loss"]
    again = training.train(config, tmp_path)  # there is nothing left to train
    assert evaluated[3:] == ["validation", "test"]
    assert again["test/loss"] == result["test/loss"]
    assert again["validation/loss"] == result["validation/loss"]


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.slow
def test_one_device_and_eight_train_the_same(fsdp):
    rules = (dict(match="kernel|scale", shard="fsdp"),)
    one, losses_one = state_after(tiny(), 1)
    many, losses_many = state_after(tiny(sharding__fsdp=fsdp, sharding__rules=rules), 8)
    # Sums over the batch in another order, float32, five steps.
    np.testing.assert_allclose(losses_one, losses_many, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


def test_fsdp_keeps_only_a_part_of_a_kernel_and_its_momentum_on_a_device():
    config = tiny(sharding__fsdp=4, sharding__rules=(dict(match="kernel", shard="fsdp"),))
    state = experiment.build(config, data.load(config.data)).initial_state()
    cut = [x for x in jax.tree.leaves((state.params, state.optimizer)) if x.ndim == 4]
    shares = {x.addressable_shards[0].data.size / x.size for x in cut}
    assert 0.25 in shares and len(cut) > 10


def test_evaluation_restores_newest_best_and_a_step_on_other_devices(whole):
    workdir, result = whole
    config = tiny()
    run = experiment.build(config, data.load(config.data))
    for which in ("newest", "best", "5"):
        state = workdirs.restore_for_evaluation(run, workdir, which)
        if which != "best":
            assert int(state.step) == {"newest": 10, "5": 5}[which]
        saved = {line["step"]: line for line in metrics(workdir) if "test/accuracy" in line}
        scores = scores_of(run, state)
        assert scores["test/accuracy"] == saved[int(state.step)]["test/accuracy"]
    with pytest.raises(CheckpointError, match="10"):
        workdirs.restore_for_evaluation(run, workdir, "7")


@pytest.mark.parametrize("size, devices", [(8, 8), (7, 8), (100, 8), (104, 8), (33, 3), (1, 3)])
def test_the_score_depends_neither_on_the_evaluation_batch_nor_on_the_devices(
    whole, monkeypatch, size, devices
):
    """Also where the devices divide neither this batch nor that of training, 32."""
    workdir, result = whole
    config = tiny(evaluate__batch_size=size)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:devices])
    run = experiment.build(config, data.load(config.data), training=False)
    state = workdirs.restore_for_evaluation(run, workdir, "newest")
    assert scores_of(run, state)["test/accuracy"] == result["test/accuracy"]


def test_a_diverging_run_stops_says_the_step_and_saves_nothing_bad(tmp_path):
    config = tiny(optimizer__learning_rate=1e30, schedule__name="constant")
    with pytest.raises(TrainingDiverged, match="parameter_norm is inf at step 1; no checkpoint"):
        training.train(config, tmp_path)
    assert not training.Checkpoints(tmp_path / "checkpoints").steps()
    training.train(tiny(train__epochs=0.2), tmp_path)  # the workdir is not that config's
    assert [line["step"] for line in metrics(tmp_path)] == [1]


def test_a_run_that_diverges_later_keeps_and_names_its_last_good_checkpoint(tmp_path):
    config = tiny(checkpoint__every_epochs=0.2)
    config.schedule.update(name="multistep", milestones=(1.0,), factor=1e30)
    with pytest.raises(TrainingDiverged, match="at step 6; the last good checkpoint is step 5"):
        training.train(config, tmp_path)
    run = experiment.build(config, data.load(config.data))
    state = workdirs.restore_for_evaluation(run, tmp_path, "newest")
    assert int(state.step) == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(sharding.fetch(state.params)))


def test_a_workdir_of_another_config_is_refused(whole):
    with pytest.raises(UserError, match=r"holds a run of another config \(train.epochs: there 2.0"):
        training.train(tiny(train__epochs=3.0), whole[0])


def test_a_workdir_that_cannot_be_written_to_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match=f"workdir {blocked}/run cannot be written to"):
        training.train(tiny(), blocked / "run")


def test_weights_of_another_config_start_a_run(whole, tmp_path):
    config = tiny(checkpoint__init_from=str(whole[0]), data__test="test[100:200]")
    run = experiment.build(config, data.load(config.data))
    started = workdirs.warm_start(run, run.initial_state(), whole[0])
    saved = workdirs.restore_for_evaluation(run, whole[0], "newest")
    assert_equal(started.params, saved.params)
    assert int(started.step) == 0


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_weights_that_do_not_fit_start_fresh_and_are_named(whole, caplog, ema):
    config = tiny(checkpoint__init_from=str(whole[0]), layers=(), train__ema=ema)
    run = experiment.build(config, data.load(config.data))
    fresh = run.initial_state()
    head, conv = np.asarray(fresh.params["head"]["w"]["kernel"]), "stage3/0/conv1/w/kernel"
    started = workdirs.warm_start(run, fresh, whole[0])
    assert not np.array_equal(started.params["head"]["w"]["kernel"], head)
    assert conv in caplog.text and "ema" not in caplog.text
    assert_equal(started.ema.get("params", started.params), started.params)


def test_no_step_compiles_twice(tmp_path, caplog):
    with jax.log_compiles():
        training.train(tiny(), tmp_path)
    compiled = [
        r for r in caplog.messages if r.startswith("Finished XLA compilation of jit(train_")
    ]
    assert len(compiled) == 1


@pytest.mark.slow
def test_averaged_weights_are_what_is_evaluated(tmp_path):
    config = tiny(train__ema=0.5, train__epochs=1.0)
    result = training.train(config, tmp_path)
    run = experiment.build(config, data.load(config.data))
    state = workdirs.restore_for_evaluation(run, tmp_path, "newest")
    assert scores_of(run, state)["test/loss"] == pytest.approx(result["test/loss"])
    plain = state._replace(ema={})
    for part, same in (({}, False), ({"params"}, False), ({"params", "stats"}, True)):
        mixed = plain._replace(**{name: state.ema[name] for name in part})
        loss = scores_of(run, mixed)["test/loss"]
        assert (loss == pytest.approx(result["test/loss"])) == same, part


def test_the_average_moves_weights_and_statistics_by_the_same_decay():
    config = tiny(train__ema=0.75)
    run = experiment.build(config, data.load(config.data))
    before = sharding.fetch(run.initial_state())
    batch = next(data.train_batches(run.dataset.train, 32, seed=0))
    step = jax.jit(lambda *a: training.train_step(run, *a)[0])
    after = step(run.initial_state(), batch, run.dataset.train.resident)
    for name in ("params", "stats"):
        old, new = jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name))
        for a, b, average in zip(old, new, jax.tree.leaves(after.ema[name]), strict=True):
            np.testing.assert_allclose(average, 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_run_starts_from_the_averaged_net_of_another_which_it_reported(tmp_path, caplog):
    training.train(tiny(train__ema=0.5, train__epochs=1.0), tmp_path)
    source = experiment.build(tiny(train__ema=0.5), data.load(tiny().data))
    saved = workdirs.restore_for_evaluation(source, tmp_path, "newest")
    for ema in (0.0, 0.5):
        config = tiny(train__ema=ema, checkpoint__init_from=str(tmp_path))
        run = experiment.build(config, data.load(config.data))
        started = workdirs.warm_start(run, run.initial_state(), tmp_path)
        assert_equal(started.params, saved.ema["params"])
        assert_equal(started.stats, saved.ema["stats"])
        assert_equal(started.ema, saved.ema if ema else {})
    assert "starts fresh" not in caplog.text


@pytest.mark.slow
def test_bfloat16_trains_with_float32_parameters(tmp_path):
    config = tiny(dtype="bfloat16", train__epochs=1.0)
    training.train(config, tmp_path)
    run = experiment.build(config, data.load(config.data))
    state = workdirs.restore_for_evaluation(run, tmp_path, "newest")
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.slow
def test_the_workdir_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training.train(tiny(train__epochs=0.4), pathlib.Path("here"))
    assert (tmp_path / "here" / "result.json").exists()


@pytest.mark.parametrize("epoch, most", [(97, 16), (45, 16), (32, 16), (5, 16), (7, 1)])
def test_every_epoch_has_the_same_dispatches_also_when_resumed(epoch, most):
    counts = list(training._counts(0, 6 * epoch, [epoch, 2 * epoch], most))
    assert set(counts) == {most, epoch % most or most} - ({most} if epoch < most else set())
    assert counts == counts[: len(counts) // 6] * 6
    for done in range(len(counts)):
        step = sum(counts[:done])
        assert list(training._counts(step, 6 * epoch, [epoch, 2 * epoch], most)) == counts[done:]


def test_the_last_checkpoint_is_complete_before_a_sigterm_may_end_the_process(
    tmp_path, monkeypatch
):
    events = []

    def noting(owner, name):
        original = getattr(owner, name)

        def noted(*args, **kwargs):
            result = original(*args, **kwargs)
            events.append(name)
            return result

        monkeypatch.setattr(owner, name, noted)

    noting(training.Checkpoints, "save")
    noting(training.Checkpoints, "wait")
    noting(training.Preemption, "__exit__")
    training.train(tiny(train__epochs=1.0), tmp_path)
    assert events[: events.index("__exit__")][-2:] == ["save", "wait"]


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_peak_of_a_layer_that_is_called_twice_is_that_of_both_calls(scale):
    class Twice(nnx.Module):
        def __init__(self):
            self.dense = Dense(1, 1, spec=LayerSpec("t3"), use_bias=False, rngs=nnx.Rngs(0))
            self.dense.a.kernel[...] = jnp.ones((1, 1))

        def __call__(self, x):
            self.dense(x)
            return self.dense(scale * x)

    _, peaks = training._watched(Twice(), jnp.full((1, 1), 3.0))
    assert peaks.keys() == {"dense/product_max"}
    np.testing.assert_allclose(peaks["dense/product_max"], 9 * max(scale, 1) ** 2, rtol=1e-6)


def test_an_auxiliary_head_has_its_weight_in_the_loss(monkeypatch):
    """Of a net of a normal and a reduction cell, of identities, which compiles in no time."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    monkeypatch.setattr(cells, "reduction_places", lambda layers, reductions: (1,))
    arc = "0 4 1 4 0 4 1 4"
    model = configs.model("cells", arc=arc, nodes=1, layers=0, features=2, auxiliary=0.4)
    config = tiny(layers=(), model=model, train__batch_size=8, data__crop=0)
    run = experiment.build(config, data.load(config.data))
    draws, state = np.random.default_rng(0), run.abstract
    params = jax.tree.map(lambda x: np.float32(draws.normal(0, 0.3, x.shape)), state.params)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)._replace(params=params)
    batch = next(data.train_batches(run.dataset.train, 8, seed=0))
    batch = data.gather(run.dataset.train.resident, batch)

    def cross_entropy(logits, labels):
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=1)) - own)

    def expected(params, stats):
        model = nnx.merge(run.graph, params, stats)
        with layers.collecting("auxiliary") as heads:
            logits = model(data.normalise(batch["image"], run.dataset.info))
        ((_, own),) = heads
        parts = [cross_entropy(z, batch["label"]) for z in (logits, own)]
        return parts[0] + 0.4 * parts[1], parts

    @jax.jit
    def both(state):
        found = training.train_step(run, state, batch, None)
        return *found, *jax.grad(expected, has_aux=True)(state.params, state.stats)

    new, metrics, gradient, (loss, of_head) = both(state)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["auxiliary_loss"], 0.4 * of_head, rtol=1e-6)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["auxiliary_head"]))
    # The first step of SGD. In float32, behind norms that divide by small deviations.
    rate = float(metrics["learning_rate"])
    moved = jax.tree.map(lambda old, new: (old - new) / rate, state.params, new.params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4), moved, gradient
    )
