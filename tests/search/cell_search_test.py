"""A search over tiny cells on a handful of digits: all it leaves, killed, on several devices."""

import contextlib
import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import data, evaluation, reporting, sharding
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.models import cells
from efficient_nets.search import cell_costs, cell_report, cell_search, cell_steps, judging, ranking
from tests import tiny_search

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


ALL_DEVICES = jax.devices


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """What is slow here is compiling, and more so for eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        yield


def tiny_config(strategy="enas", **fields):
    config = tiny_search.get_config(strategy)
    config.search.update(fields)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("search")
    programs = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (cell_steps, "weight_steps"),
            (cell_steps, "propose"),
            (cell_steps, "tell"),
            (judging, "accuracies"),
            (judging.Judge, "_joined"),
            (evaluation, "_step"),
        ):
            function = getattr(module, name)

            def counted(*arguments, function=function, name=name, **options):
                programs.append(name)
                return function(*arguments, **options)

            patch.setattr(module, name, counted)
        report = cell_search.build(tiny_config(), workdir)
    return workdir, report, programs


def test_a_search_leaves_an_architecture_its_picture_and_a_config(whole):
    workdir, report, _ = whole
    assert json.loads((workdir / "result.json").read_text()) == report
    space = cell_costs.space_of(tiny_config())
    assert space.lists(space.parse(report["arc"])) == report["lists"]
    for name in ("search.txt", "plots/search.png", "plots/cells.png", "metrics.jsonl"):
        assert (workdir / name).stat().st_size
    config = runpy.run_path(str(workdir / "built_config.py"))["get_config"]()
    configs.check(config)
    assert config.model.arc == report["arc"] and not config.search.strategy
    chosen = [finalist for finalist in report["finalists"] if finalist["chosen"]]
    assert [finalist["arc"] for finalist in chosen] == [report["arc"]]
    best = max(finalist["validation/accuracy"] for finalist in report["finalists"])
    assert report["validation/accuracy"] == best == chosen[0]["validation/accuracy"]
    assert 0 <= report["test/accuracy"] <= 1
    assert report["architectures"] == 2 * 2 * 8
    assert chosen[0]["cost"] == report["costs"]["bops"]


def test_every_architecture_has_one_program(whole):
    once = ["_joined", "_step", "accuracies", "propose", "tell", "weight_steps"]
    assert sorted(whole[2]) == once


def test_an_evaluation_tells_what_the_source_does(whole):
    workdir, report, _ = whole
    assert [record["step"] for record in report["history"]] == [3, 6]
    of_both = {"strategy/baseline", "strategy/entropy", "shown_accuracy", "test/accuracy"}
    assert of_both <= report["history"][0].keys()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert of_both <= next(line for line in lines if line["step"] == 3).keys()
    assert {"train/loss", "train/learning_rate"} <= lines[0].keys()


def test_each_cycle_prints_training_updates_architectures_and_accuracies(tmp_path, capsys):
    search = cell_steps.prepare(tiny_config(), data.load(tiny_config().data))
    reporter = reporting.Reporter(tmp_path, 0, 6, tensorboard=False)
    with contextlib.closing(reporter):
        log = cell_report.Log(search, reporter, {})
        means = dict(loss=2.5, learning_rate=0.05, gradient_norm=1.5, accuracy=0.25)
        reporter.line(log.training_line(3, means))
        for _ in range(10):
            log.push(3, {"reward": 0.5})
        log.settle()
        architecture = np.asarray(search.space.random(jax.random.key(0)))
        scores = {"validation/accuracy": 0.5, "test/accuracy": 0.4}
        log.evaluation(3, architecture[None], np.array([0.75]), scores)
    out = capsys.readouterr().out
    assert "step 3  loss 2.5  lr 0.05  |g| 1.5  train accuracy 25.00%" in out
    assert "update 10  reward 0.5" in out
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 3, "update": 10, "update/reward": 0.5}
    lists = "\n".join(search.space.lists(architecture))
    assert f"Here are 1 architectures\n{lists}\nval_acc=0.7500" in out
    assert "validation/accuracy 50.00%  test/accuracy 40.00%" in out


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch):
    """Killed between two phases, a step before the second."""
    config = tiny_config()
    config.checkpoint.every_epochs = 1 / 3
    save = training.Checkpoints.save

    def saves_until_killed(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cell_search.Checkpoints, "save", saves_until_killed)
        cell_search.build(config, tmp_path)
    report = cell_search.build(config, tmp_path)
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, whole[0])
    ]
    assert lines[0] == lines[1]
    differ = {"seconds", "images_per_second", "architectures_per_second", "config_hash"}
    of_both = [
        {name: x for name, x in one.items() if name not in differ} for one in (report, whole[1])
    ]
    assert of_both[0] == of_both[1]


@pytest.mark.slow
def test_devices_share_architectures_and_measure_as_one_does(monkeypatch):
    monkeypatch.setattr(jax, "devices", ALL_DEVICES)
    config = tiny_config()
    dataset = data.load(config.data)
    search = cell_steps.prepare(config, dataset)
    state = search.run.initial_state()
    keys = jax.random.split(jax.random.key(0), 11)  # which 8 devices do not divide
    architectures = jax.vmap(search.space.random)(keys)
    batch = {"index": np.arange(64)}
    resident = dataset.validation.resident
    found = jax.jit(lambda a: judging.accuracies(search.run, state, a, batch, resident))
    found = found(sharding.put_replicated(np.asarray(architectures), search.run.mesh))
    model = nnx.merge(search.run.graph, state.params, state.stats)
    images = data.normalise(jnp.asarray(resident["image"][:64]), dataset.info)
    for tokens, accuracy in zip(architectures, found, strict=True):
        fixed = cells.extract(model, np.asarray(tokens))
        fixed.train()  # batch statistics; nothing drops
        hits = fixed(images).argmax(-1) == resident["label"][:64]
        assert float(accuracy) == pytest.approx(float(hits.mean()), abs=1e-6)
    assert search.run.mesh.size == 8 and len(set(map(float, found))) > 3
    # A net that diverged has nothing right, not the first class.
    state = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    lost = jax.jit(lambda a: judging.accuracies(search.run, state, a, batch, resident))
    assert not np.any(lost(sharding.put_replicated(np.asarray(architectures), search.run.mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["nsga2", "darts", "gumbel"])
def test_every_strategy_searches_and_goes_on(tmp_path, monkeypatch, strategy):
    report = cell_search.build(tiny_config(strategy), tmp_path / "one")
    assert report["strategy"] == strategy and report["finalists"]
    assert "strategy/accuracy" in report["history"][-1]
    config = tiny_config(strategy)
    config.checkpoint.every_epochs = 1 / 3
    save = training.Checkpoints.save

    def saves_until_killed(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cell_search.Checkpoints, "save", saves_until_killed)
        cell_search.build(config, tmp_path / "two")
    again = cell_search.build(config, tmp_path / "two")
    for name in ("arc", "finalists", "history", "params_digest"):
        assert again[name] == report[name]


@pytest.mark.slow
def test_the_net_that_was_found_starts_from_the_shared_weights(whole, tmp_path):
    workdir, report, _ = whole
    config = cell_search.built(tiny_config(), report["arc"])
    config.checkpoint.convert_from = str(workdir)
    config.calibration.norm_batches, config.train.epochs = 2, 1.0
    config.calibration.batch_size = 0
    training.train(config, tmp_path / "built")
    first = json.loads((tmp_path / "built" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["validation/accuracy"] == report["validation/accuracy"]


@pytest.mark.slow
def test_shared_and_separate_accuracies_are_compared(whole, tmp_path):
    config = tiny_config(ranked=3, ranked_epochs=1.0)
    config.model.drop_path_steps = 10
    report = ranking.rank(config, tmp_path, whole[0])
    alone = json.loads((tmp_path / "ranked" / "0" / "config.json").read_text())
    assert alone["train"]["epochs"] == 1 and alone["model"]["drop_path_steps"] == 5  # half as long
    assert len(report["architectures"]) == 3 and -1 <= report["kendall"] <= 1
    assert (tmp_path / "plots" / "rank.png").stat().st_size


def test_modes_of_a_search(command, monkeypatch):
    called = []
    for module, name in ((cell_search, "build"), (cell_search, "measure"), (ranking, "rank")):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    config = "--config=tests/tiny_search.py"
    for mode in ("train", "search", "latency", "rank"):
        assert command(config, f"--mode={mode}")[0] == 0
    assert called == ["build", "build", "measure", "rank"]
    status, _, err = command(config, "--mode=eval")
    assert status == 2 and "search.strategy='enas': --mode is one of train, search" in err


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.validation", "", "data.validation"),
        ("model.arc", "0 1 0 1 0 1 0 1", "model.arc"),
        ("search.reward", "speed", "search.reward"),
        ("search.cost", "joules", "joules"),
        ("search.cost_weight", 0.5, "nothing heeds it"),
        ("search.evolution.population", 7, "nothing heeds it"),
        ("search.exponents", (1.0, 1.0), "nothing heeds it"),
        ("search.exponents", ("a", 1.0), "give two numbers"),
        ("search.target", 5.0, "nothing heeds it"),
        ("log.histograms_every_epochs", 1.0, "log.histograms_every_epochs=1.0: a search has none"),
        ("search.interval", 7, "the strategy would learn nothing in 6 steps"),
        ("model.mixes", True, "model.mixes=True: a search sets it"),
        ("search.batch_size", 96000, "the validation split has only"),
        ("train.ema", 0.9, "train.ema"),
        ("search.warmup_epochs", 2.0, "below train.epochs"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, field, value, message):
    config = tiny_config()
    *sections, name = field.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    with pytest.raises(UserError, match=message):
        cell_search.build(config, tmp_path)
    assert not list(tmp_path.iterdir())
