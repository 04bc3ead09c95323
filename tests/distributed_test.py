"""Two processes of the real command train as this one does on eight devices."""

import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from efficient_nets import data, evaluation, experiment, sharding, workdirs
from efficient_nets import train as training
from efficient_nets.analysis import history
from efficient_nets.search import cell_search
from tests import tiny_search

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "tests/tiny_config.py"


class Pair:
    """Two processes of one run, which meet at a free port of this machine."""

    def __init__(self, *arguments, devices, config=CONFIG):
        with socket.create_server(("localhost", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
        xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        env = os.environ | {
            "XLA_FLAGS": xla,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
        }
        command = [sys.executable, "-m", "efficient_nets.main", "--distributed"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self.processes = [
            subprocess.Popen(
                [*command, f"--config={config}", *arguments],
                env=env | {"JAX_PROCESS_ID": str(number)},
                **pipes,
            )
            for number in range(2)
        ]

    def finish(self, status=0) -> list[str]:
        """Waits for both; what each wrote to stdout."""
        try:
            outputs = [process.communicate(timeout=600) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert [p.returncode for p in self.processes] == [status] * 2, outputs
        return [out for out, _ in outputs]


def config(**train):
    config = runpy.run_path(str(ROOT / CONFIG))["get_config"]()
    config.train.update(train)
    return config


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def restored(workdir):
    run = experiment.build(config(), data.load(config().data))
    return run, workdirs.restore_for_evaluation(run, workdir, "newest")


def assert_silent(second, first):
    """That the second process printed nothing that the first did, and no line of training.

    Threads of Gloo print too, into each other's lines: these do not count.
    """
    own = {line for line in first.splitlines() if line.strip() and "Gloo" not in line}
    assert own and not own & set(second.splitlines())
    assert "epoch" not in second and "result" not in second


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, fsdp",
    [
        (2, 4),  # kernels and their momentum are cut over both processes
        (4, 1),
    ],
)
def test_two_processes_train_as_one_does(tmp_path, devices, fsdp):
    one, two = tmp_path / "one", tmp_path / "two"
    pair = Pair(
        f"--workdir={two}",
        f"--config.sharding.fsdp={fsdp}",
        "--config.log.histograms_every_epochs=1",
        devices=devices,
    )
    recorded = config()
    recorded.log.histograms_every_epochs = 1.0
    training.train(recorded, one)
    first, second = pair.finish()

    for line, expected in zip(metrics(two), metrics(one), strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - {"train/accuracy", "test/accuracy"}:
            # Sums over the batch in another order, float32, ten steps.
            np.testing.assert_allclose(line[name], expected[name], rtol=2e-3, atol=1e-4)
    run, state = restored(two)  # saved by two processes, restored on one
    assert int(state.step) == 10
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(restored(one)[1].params), strict=True
    ):
        np.testing.assert_allclose(sharding.fetch(a), sharding.fetch(b), rtol=2e-2, atol=1e-3)
    result = json.loads((two / "result.json").read_text())
    assert training.digest(state.params) == result["params_digest"]  # the same bits
    scores = evaluation.evaluate_all(evaluation.evaluators(run), state)
    assert scores["test/accuracy"] == result["test/accuracy"]

    # Only the first process prints and writes.
    assert "epoch 2" in first and f"{two}/result.json" in first
    assert_silent(second, first)
    (_, heads), (_, expected) = (
        history.read_history(folder)["activations/head"] for folder in (two, one)
    )
    for head, other in zip(heads, expected, strict=True):
        # The net's rounding, as above.
        np.testing.assert_allclose(head.edges, other.edges, rtol=2e-2, atol=2e-2)
    assert names(two) == names(one) and names(two / "checkpoints") == ["10", "5"]


@pytest.mark.slow
def test_two_processes_search_as_one_does(tmp_path):
    """Each device measures its own architectures, and every process is told all rewards."""
    one, two = tmp_path / "one", tmp_path / "two"
    pair = Pair(f"--workdir={two}", devices=4, config="tests/tiny_search.py")
    expected = cell_search.build(tiny_search.get_config(), one)
    first, second = pair.finish()
    report = json.loads((two / "result.json").read_text())
    assert report["arc"] == expected["arc"]
    for record, other in zip(report["history"], expected["history"], strict=True):
        assert record["arc"] == other["arc"]
        assert [one["arc"] for one in record["shown"]] == [one["arc"] for one in other["shown"]]
        for name in record.keys() - {"arc", "shown"}:
            # Sums over the batch in another order, float32, six steps.
            np.testing.assert_allclose(record[name], other[name], rtol=2e-3, atol=1e-3)
    assert "Here are" in first
    assert_silent(second, first)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def terminated(stream, mark, *arguments) -> int:
    """Sends SIGTERM to one of two processes when the first says `mark`; the step of the stop."""
    run = Pair(*arguments, devices=2)
    for line in getattr(run.processes[0], stream):
        if mark in line:
            run.processes[1].send_signal(signal.SIGTERM)
            break
    first, _ = run.finish(128 + signal.SIGTERM)
    return int(first.partition("saved step ")[2].partition(".")[0])


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(tmp_path):
    """Where several steps make a dispatch too, and in a resumed run before its first dispatch."""
    most = 3
    arguments = f"--workdir={tmp_path}", "--config.train.epochs=2000"
    arguments += (f"--config.train.steps_per_dispatch={most}",)
    step = terminated("stdout", "epoch 2 ", *arguments)
    assert step > 10
    longer = config(epochs=2000.0)
    dataset = data.load(longer.data)
    state = workdirs.restore_for_evaluation(experiment.build(longer, dataset), tmp_path, "newest")
    assert int(state.step) == step
    again = terminated("stderr", "Goes on from the checkpoint", *arguments)
    assert step < again <= step + 3 * most
