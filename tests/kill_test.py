"""The real command, killed at random moments and started again, ends as if nothing had happened."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
COMMAND = [
    *(sys.executable, "-m", "efficient_nets.main", "--config=tests/tiny_config.py"),
    *("--config.train.epochs=24", "--config.checkpoint.every_epochs=0.4"),
    "--config.evaluate.every_epochs=3",
]
STEPS = 120


def start(workdir, *arguments, devices=1):
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [*COMMAND, f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": xla}, cwd=ROOT, **pipes)


def finish(process):
    """What it printed; it must succeed."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def read(path):
    return json.loads(path.read_text())


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    return json.loads(complete[-1])["step"] if complete else 0


def wait_for(process, workdir, step):
    """Until metrics.jsonl tells of this step."""
    while process.poll() is None and last_step(workdir) < step:
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be stopped"


def restored_from(out):
    return int(out.partition("Goes on from the checkpoint of step ")[2].partition(".")[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir))
    return workdir


def test_killed_twice_and_terminated_once_it_ends_bit_equal(whole, tmp_path):
    moments = random.Random()
    for low, high in (10, 40), (55, 75):
        process = start(tmp_path)
        wait_for(process, tmp_path, moments.randrange(low, high))
        time.sleep(moments.uniform(0, 0.2))  # anywhere in a step, a save or an evaluation
        process.kill()
        process.communicate()
        assert last_step(tmp_path) < STEPS

    process = start(tmp_path)
    wait_for(process, tmp_path, 85)
    process.terminate()
    out, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    saved = int(out.partition("Stopped by SIGTERM; saved step ")[2].partition(".")[0])
    assert 85 <= saved < STEPS and str(saved) in os.listdir(tmp_path / "checkpoints")

    out = finish(start(tmp_path))
    assert restored_from(out) == saved  # not a step is done again
    found, expected = read(tmp_path / "result.json"), read(whole / "result.json")
    for name in "params_digest", "test/accuracy", "test/loss", "steps", "config_hash":
        assert found[name] == expected[name]
    assert (tmp_path / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_it_goes_on_with_other_devices_and_passes_over_a_damaged_checkpoint(whole, tmp_path):
    process = start(tmp_path)
    wait_for(process, tmp_path, 30)
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    *_, before, newest = sorted(map(int, os.listdir(tmp_path / "checkpoints")))
    arrays = (tmp_path / "checkpoints" / str(newest) / "state").glob("ocdbt.process_0/d/*")
    damaged = max(arrays, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])

    out = finish(start(tmp_path, "--config.sharding.fsdp=2", devices=4))
    assert f"checkpoints/{newest} is damaged" in out and "Traceback" not in out
    assert restored_from(out) == before
    found, expected = read(tmp_path / "result.json"), read(whole / "result.json")
    assert found["steps"] == STEPS and found["params_digest"] != expected["params_digest"]
    # Float32 sums in another order, grown over 90 steps: the same net, but for noise.
    assert abs(found["test/accuracy"] - expected["test/accuracy"]) <= 0.1
