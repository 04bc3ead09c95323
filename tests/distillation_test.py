"""Runs that learn from a trained net beside the labels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import data, distillation, evaluation, experiment
from efficient_nets import train as training
from efficient_nets.errors import UserError
from efficient_nets.tasks.classification import Classification
from tests.train_test import tiny

TEACHER = dict(layers=(), model=configs.model("lenet", width=0.5))
STUDENT = dict(layers=(), model=configs.model("lenet", width=0.25))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A trained net, and a run that learns from it."""
    folder = tmp_path_factory.mktemp("teacher")
    training.train(tiny(**TEACHER, train__epochs=1.0), folder)
    teacher = dict(teacher__checkpoint=str(folder), teacher__weight=0.75)
    config = tiny(**STUDENT, **teacher, train__epochs=1.0)
    return folder, experiment.build(config, data.load(config.data))


def scalar_loss(logits, teacher, temperature):
    """Hinton et al. 2015, in Python's floats."""

    def softmax(row):
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for row, of_teacher in zip(logits, teacher, strict=True):
        p, q = softmax(of_teacher), softmax(row)
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(logits)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_and_its_gradient_are_those_of_the_scalar_reference(temperature):
    rng = np.random.default_rng(0)
    logits, teacher = 3 * rng.standard_normal((2, 5, 7))
    loss = functools.partial(Classification().distillation_loss, temperature=temperature)
    value, gradient = jax.value_and_grad(loss)(jnp.float32(logits), jnp.float32(teacher))
    # float32, sums of 35 terms.
    assert value == pytest.approx(scalar_loss(logits, teacher, temperature), rel=1e-5)
    for index in [(0, 0), (3, 4)]:
        step = np.zeros_like(logits)
        step[index] = 1e-6
        above, below = (scalar_loss(logits + s, teacher, temperature) for s in (step, -step))
        assert gradient[index] == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


def test_a_net_learns_nothing_from_its_own_outputs():
    logits = jax.random.normal(jax.random.key(0), (4, 10))
    loss, gradient = jax.value_and_grad(Classification().distillation_loss)(logits, logits, 4.0)
    assert abs(loss) < 1e-6 and jnp.max(jnp.abs(gradient)) < 1e-6


def test_a_step_weighs_labels_and_teacher(taught):
    folder, run = taught
    teacher = distillation.teacher(run, folder)
    state, resident = run.initial_state(), evaluation.put_resident(run, "train")
    batch = next(data.train_batches(run.dataset.train, 32, seed=0))
    step = jax.jit(functools.partial(training.train_step, run))
    mixed, metrics = step(state, batch, resident, teacher)
    plain, _ = step(state, batch, resident)
    assert metrics["distillation_loss"] > 0
    kernel = [after.params["head"]["w"]["kernel"] for after in (mixed, plain)]
    assert not np.array_equal(*kernel)
    jax.tree.map(np.testing.assert_array_equal, mixed.stats, plain.stats)

    # The gradient is (1 - w) times that of the labels and w times that of the teacher, which are
    # reached by w = 0 and w = 1; after one step of SGD from the same start the weights are too.
    ends = []
    for weight in (1e-9, 1.0):
        config = run.config.copy_and_resolve_references()
        config.teacher.weight = weight
        other = experiment.build(config, run.dataset)
        step = jax.jit(functools.partial(training.train_step, other))
        ends.append(step(state, batch, resident, teacher)[0].params["head"]["w"]["kernel"])
    np.testing.assert_allclose(kernel[0], 0.25 * ends[0] + 0.75 * ends[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kernel[1], ends[0], rtol=1e-4, atol=1e-6)


def test_a_teacher_is_evaluated_and_not_trained(taught):
    folder, run = taught
    teacher = distillation.teacher(run, folder)
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    model = nnx.merge(teacher.graph, teacher.net["params"], teacher.net["stats"])
    model.eval()
    np.testing.assert_array_equal(teacher.logits(images), model(images))
    gradient = jax.grad(lambda net: teacher.replace(net=net).logits(images).sum(), allow_int=True)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient(teacher.net)))


def test_a_whole_run_with_a_teacher(taught, tmp_path):
    folder, run = taught
    result = training.train(run.config, tmp_path)
    assert '"train/distillation_loss"' in (tmp_path / "metrics.jsonl").read_text()
    assert result["steps"] == 5


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(checkpoint="nowhere"), "teacher.checkpoint=nowhere: it is no workdir"),
        (dict(checkpoint="pretrain"), "teacher.checkpoint='pretrain': it takes pretrain.epochs"),
        (dict(weight=0.9), "teacher.checkpoint='': without one"),
        (dict(checkpoint="x", weight=1.5), "teacher.weight=1.5: must be above 0 and at most 1"),
        (dict(checkpoint="x", temperature=0.0), "teacher.temperature=0.0: must be above 0"),
    ],
)
def test_a_teacher_that_cannot_be(fields, words, tmp_path):
    config = tiny(**{f"teacher__{name}": value for name, value in fields.items()})
    with pytest.raises(UserError, match=words):
        training.train(config, tmp_path)


def test_a_teacher_for_other_classes_is_named(taught, tmp_path):
    folder, run = taught
    config = tiny(**STUDENT, teacher__checkpoint=str(folder))
    dataset = data.load(config.data)
    info = dataset.info.__class__(**{**vars(dataset.info), "num_classes": 7})
    other = experiment.build(config, dataset.__class__(**{**vars(dataset), "info": info}))
    with pytest.raises(UserError, match="teacher.checkpoint=.* holds another net.*head"):
        distillation.teacher(other, folder)
