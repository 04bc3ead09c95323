"""Every file in configs/: what it says of itself is true, and it takes a step at tiny size."""

import dataclasses
import functools
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from efficient_nets import analysis, data, experiment, paths, pretraining
from efficient_nets import config as configs
from efficient_nets import train as training

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
each_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# Large nets, those of cells first of all, take long to trace.
LARGE = ("enas_cifar", "enas_mnist", "enas_arc", "ssd_voc", "qssd_voc")
each_config_of_a_size = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in LARGE else path for path in FILES],
    ids=lambda path: path.stem,
)


def load(path):
    module = runpy.run_path(str(path))
    return module["get_config"](), module["__doc__"]


def generated(info, side, boxes=0):
    """The config's data set, but for 16 random images of another size; boxes on each."""
    shape = (side, side, info.image_shape[-1])
    rng = np.random.default_rng(0)
    resident = {
        "image": rng.integers(0, 256, (16, *shape), np.uint8),
        "label": rng.integers(0, info.num_classes, 16, np.int32),
    }
    if boxes:
        corners = np.sort(rng.random((16, boxes, 2, 2), np.float32), 2).reshape(16, boxes, 4)
        label = np.tile(resident["label"][:, None], boxes)
        difficult = np.zeros(label.shape, bool)
        resident |= {"boxes": corners, "label": label, "difficult": difficult}
    source = data.Source("generated", range(16), shape, info.num_classes, False, 0, resident)
    return data.Dataset(dataclasses.replace(info, image_shape=shape), source, None, source)


def test_there_are_configs():
    assert len(FILES) >= 8


@pytest.mark.every_case
@each_config
def test_a_config_passes_the_check_and_names_the_command_that_runs_it(path):
    config, docstring = load(path)
    configs.check(config)
    assert re.search(
        rf"^    (\./launch/local\.sh|python -m efficient_nets\.main) --config=configs/{path.name}",
        docstring,
        re.MULTILINE,
    )
    assert "RESULT" not in docstring  # the mark of a figure that is still to be filled in


def arguments(path):
    return re.findall(rf"--config=configs/{path.name}:(\S+)", path.read_text())


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("path", "argument"),
    [(path, argument) for path in FILES for argument in arguments(path)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_argument_that_a_config_names_gives_a_config(path, argument):
    configs.check(runpy.run_path(str(path))["get_config"](argument))


def test_winograd_s_adaptation_is_the_experiment_stretched():
    get_config = runpy.run_path(str(ROOT / "configs" / "winograd.py"))["get_config"]
    config, adapts = get_config("direct,bits=0"), get_config("flex,adapt=120")
    assert config.train.epochs == 120 and config.schedule.milestones == (72.0, 96.0)
    assert adapts.train.epochs == 20 and adapts.schedule.milestones == (12.0, 16.0)
    plain = pretraining.float_config(adapts)
    differs = {line.split(":")[0] for line in configs.differences(plain, configs.to_json(config))}
    # Rules that say nothing, and a period that this schedule does not have.
    assert differs == {"layers", "schedule.period"}
    assert all(rule.keys() == {"match"} for rule in plain.layers)


@pytest.mark.every_case
@each_config_of_a_size
def test_the_net_has_as_many_parameters_and_macs_as_the_docstring_says(path):
    config, docstring = load(path)
    info = data.describe(config.data, config.task)
    found = analysis.summary_dict(experiment.abstract_model(config, info), info.image_shape)
    said = re.search(r"([\d,]+|[\d.]+ M) parameters(?:, ([\d.]+) ([MG]) MACs)?", docstring)
    assert said, "the docstring gives no number of parameters"
    parameters, macs, unit = said.groups()
    if parameters.endswith("M"):
        assert f"{found['params'] / 1e6:.2f} M" == parameters
    else:
        assert f"{found['params']:,}" == parameters
    if macs:
        digits = len(macs.partition(".")[2])
        assert f"{found['macs'] / {'M': 1e6, 'G': 1e9}[unit]:.{digits}f}" == macs


@pytest.fixture
def one_device(monkeypatch):
    """What is slow here is compiling, and more so for eight devices."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])


def random_state(run):
    """A state of the right shapes; compiling the real one's start takes as long as the step."""
    rng = np.random.default_rng(0)

    def fill(leaf, x):
        if leaf.startswith("params") and len(x.shape) > 1:
            return rng.normal(0, 0.1, x.shape).astype(x.dtype)
        return (np.ones if leaf.startswith(("params", "stats")) else np.zeros)(x.shape, x.dtype)

    return paths.map_named(fill, run.abstract)


@each_config_of_a_size
def test_a_config_fits_eight_devices(path):
    config, _ = load(path)
    info = data.describe(config.data, config.task)
    source = data.Source("2000", range(2000), info.image_shape, info.num_classes, False, 0)
    assert experiment.build(config, data.Dataset(info, source, None, source)).mesh.size == 8


@pytest.mark.every_case
@pytest.mark.parametrize(
    "path",
    [
        path
        if path.stem in ("qresnet", "quantized")
        else pytest.param(path, marks=pytest.mark.slow)
        for path in FILES
    ],
    ids=lambda path: path.stem,
)
def test_a_config_takes_a_step_at_tiny_size(path, one_device):
    config, _ = load(path)
    config.model.width = 1 / 16
    if config.model.name == "cells":
        config.model.layers = 3  # all cells of a kind are alike
        if config.search.strategy:  # whose operands are all ops at once
            config.model.layers, config.model.nodes = 1, 2
    config.train.batch_size = config.evaluate.batch_size = 8
    if config.task == "generation":
        config.train.batch_size = 2 * config.generation.critic_updates
    info = data.describe(config.data, config.task)
    side = 32 if config.model.name in ("vgg", "ssd") or config.data.cutout else 8
    run = experiment.build(config, generated(info, side, boxes=2 * (config.task == "detection")))
    batch = next(data.train_batches(run.dataset.train, config.train.batch_size, seed=config.seed))
    step = jax.jit(functools.partial(training.STEPS[config.task], run))
    state, metrics = step(random_state(run), batch, run.dataset.train.resident)
    assert int(state.step) == 1
    losses = [value for name, value in metrics.items() if name.endswith("loss")]
    assert losses and np.all(np.isfinite(losses)) and 0 < metrics["gradient_norm"] < np.inf
    assert jax.tree.structure(state) == jax.tree.structure(run.abstract)
