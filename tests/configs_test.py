"""Every file in configs/: what it says of itself is true, and it takes a step at tiny size."""

import functools
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from efficient_nets import analysis, data, evaluation, experiment, layers, sharding
from efficient_nets import config as configs
from efficient_nets import train as training

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
# The size of the train split, where a config's schedule or batch needs more than a few images.
CLASSES, IMAGES = 10, 16

each_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def load(path):
    module = runpy.run_path(str(path))
    return module["get_config"](), module["__doc__"]


def generated(name, shape, classes=CLASSES):
    """A data set of random images, in memory."""
    rng = np.random.default_rng(0)
    resident = {
        "image": rng.integers(0, 256, (IMAGES, *shape), np.uint8),
        "label": rng.integers(0, classes, IMAGES, np.int32),
    }
    source = data.Source(name, range(IMAGES), shape, classes, False, 0, resident)
    channels = shape[-1]
    info = data.Info(name, classes, shape, (0.5,) * channels, (0.25,) * channels)
    return data.Dataset(info, source, None, source)


def test_there_are_configs():
    assert len(FILES) >= 8


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


@each_config
def test_the_net_has_as_many_parameters_and_macs_as_the_docstring_says(path):
    config, docstring = load(path)
    info = data.describe(config.data)
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


@each_config
def test_a_config_takes_a_step_at_tiny_size(path, monkeypatch):
    config, _ = load(path)
    config.model.width = 1 / 16
    config.train.batch_size = config.evaluate.batch_size = 8
    config.data.crop = min(config.data.crop, 1)
    side = 32 if config.model.name == "vgg" else 8
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])  # compiles faster
    channels = data.describe(config.data).image_shape[-1]
    run = experiment.build(config, generated(config.data.name, (side, side, channels)))
    before = run.initial_state()
    batch = next(data.train_batches(run.dataset.train, 8, seed=config.seed))
    step = jax.jit(functools.partial(training.train_step, run))
    state, metrics = step(before, sharding.put_batch(batch, run.mesh), put(run))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    assert int(state.step) == 1
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before.stats, state.stats)
    assert all(jax.tree.leaves(moved))  # every norm saw the batch


def put(run):
    return evaluation.put_resident(run, "train")
