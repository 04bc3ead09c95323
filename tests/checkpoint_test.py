"""Checkpoints: what comes back is what was saved, bit for bit, or an error that says why not."""

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_nets.checkpoint import CheckpointError, Checkpoints, restore_params
from efficient_nets.ops.checksum import checksum


class Scale(NamedTuple):
    value: jax.Array
    count: jax.Array


@flax.struct.dataclass
class TrainState:
    params: dict
    opt: tuple
    scale: Scale
    key: jax.Array
    nothing: None = None


def mesh(devices: int):
    return jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def spread(tree, devices: int):
    """The first axis over `devices` where they divide it, whole on each of them where not."""

    def put(x):
        spec = ("d",) if x.ndim and x.shape[0] % devices == 0 else ()
        return jax.device_put(x, NamedSharding(mesh(devices), PartitionSpec(*spec)))

    return jax.tree.map(put, tree)


def state(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(16, 500)).astype(np.float32)
    params = {"kernel": kernel, "bias": kernel[0], "fill": np.full((16, 300), seed, np.float32)}
    return spread({"params": params, "momentum": {"kernel": 2 * kernel}, "step": np.int32(seed)}, 8)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree) -> list:
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@contextlib.contextmanager
def opened(directory, **options):
    with contextlib.closing(Checkpoints(directory, **options)) as checkpoints:
        yield checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with the steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("two")
    with opened(directory) as checkpoints:
        for step in (1, 2):
            metrics = {"validation/accuracy": step / 10}
            checkpoints.save(step, state(step), meta={"position": step}, metrics=metrics)
    return directory


@pytest.fixture
def directory(two, tmp_path):
    return shutil.copytree(two, tmp_path / "checkpoints")


def found(directory, which="newest") -> int:
    """The step that a reader gets, after a check that its contents belong to it."""
    restored, meta, step = Checkpoints(directory, create=False).restore(abstract(state(0)), which)
    assert bits(restored) == bits(state(step)) and meta == {"position": step}
    return step


# What goes in comes out.


def test_round_trip_is_bit_equal(tmp_path):
    odd = np.array([0x7FC00001, 0x80000000, 1, 0x7F800000], np.uint32).view(np.float32)
    params = {
        "odd": jnp.asarray(odd),  # a NaN with a payload, -0, the smallest denormal, infinity
        "half": jnp.arange(7, dtype=jnp.bfloat16) / 3,
        "bytes": jnp.arange(256, dtype=jnp.uint8),
        "signed": jnp.arange(-4, 4, dtype=jnp.int8),
        "mask": jnp.array([True, False, True]),
        "scalar": jnp.float32(0.1),
    }
    params["list"] = [{"0": jnp.int32(-5)}, jnp.zeros((1, 2, 1))]
    opt = optax.adam(1e-3).init({"kernel": jnp.ones((3, 3))})
    key = jax.random.key_data(jax.random.key(2**40 + 1))
    saved = TrainState(params, opt, Scale(jnp.float16(0.3), jnp.int32(7)), key)
    meta = {"position": [3, 17], "config": {"a.b": 0.1}, "rest": None}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, saved, meta=meta)
        restored, got, step = checkpoints.restore(abstract(saved))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert bits(restored) == bits(saved)
    assert (got, step) == (meta, 5)


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    now = jax.block_until_ready(advance({"x": jnp.arange(2**20, dtype=jnp.float32)}))
    before = bits(now)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, now, meta={})
        for _ in range(3):
            now = jax.block_until_ready(advance(now))
        restored, _, _ = checkpoints.restore(abstract(now))
    assert bits(restored) == before != bits(now)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 2)])
def test_restores_on_other_devices(tmp_path, before, after):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, spread(state(3), before), meta={})
        target = abstract(spread(state(3), after))
        restored, _, _ = checkpoints.restore(target)
    assert bits(restored) == bits(state(3))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )


# Which are kept.


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: float("nan"), 4: None, 5: 0.3, 6: 0.1}
    for opening in ([1, 2, 3], [4, 5, 6]):  # the scores survive a restart
        with opened(tmp_path, keep=2, best_metric="score") as checkpoints:
            for step in opening:
                metrics = None if scores[step] is None else {"score": scores[step]}
                checkpoints.save(step, {"x": jnp.float32(step)}, meta={}, metrics=metrics)
    reader = Checkpoints(tmp_path, best_metric="score", create=False)
    assert reader.steps() == [2, 5, 6]
    target = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    assert [reader.restore(target, which)[2] for which in ("newest", "best", 5)] == [6, 2, 5]
    with pytest.raises(CheckpointError, match=r"none of the steps \[6, 5, 2\] has .* 'loss'"):
        Checkpoints(tmp_path, best_metric="loss", create=False).restore(target, "best")


def test_the_best_may_be_the_least(tmp_path):
    scores = {1: 30.0, 2: 5.0, 3: float("nan"), 4: float("-inf"), 5: 20.0, 6: 40.0}
    for opening in ([1, 2, 3], [4, 5, 6]):  # the scores survive a restart
        with opened(tmp_path, keep=1, best_metric="fid", best_mode="min") as checkpoints:
            for step in opening:
                given = {"fid": scores[step]}
                checkpoints.save(step, {"x": jnp.float32(step)}, meta={}, metrics=given)
    target = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    reader = Checkpoints(tmp_path, best_metric="fid", best_mode="min", create=False)
    assert reader.steps() == [2, 6] and reader.restore(target, "best")[2] == 2
    _, _, step = restore_params(tmp_path, target, "best", best_metric="fid", best_mode="min")
    assert step == 2
    with pytest.raises(ValueError, match="best_mode='least': allowed are max, min"):
        Checkpoints(tmp_path, best_mode="least")


def test_saving_the_same_again_does_nothing_and_a_change_replaces(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    written = lambda: (tmp_path / "1" / "record" / "metadata").stat().st_mtime_ns  # noqa: E731
    with opened(tmp_path) as checkpoints:
        metrics = {"validation/accuracy": 0.5}
        checkpoints.save(1, state(1), meta={"position": 1}, metrics=metrics)
        checkpoints.wait()
        first = written()
        checkpoints.save(1, state(1), meta={"position": 1})  # unchanged, and keeps its metrics
        checkpoints.wait()
        assert written() == first
    with opened(tmp_path) as checkpoints:
        checkpoints.restore(abstract(state(1)))
        checkpoints.save(1, state(1), meta={"position": 1})
        checkpoints.wait()
        assert written() == first
        checkpoints.save(1, state(2), meta={"position": 1})
        restored, _, _ = checkpoints.restore(abstract(state(2)))
        assert bits(restored) == bits(state(2))
    with opened(tmp_path) as checkpoints:  # which does not know what the step holds
        checkpoints.save(1, state(1), meta={"position": 1})
    assert found(tmp_path) == 1
    assert not caplog.records  # Orbax reports every step it takes


# Damage.


def data_file(step_directory):
    """The one with most of the arrays in it."""
    return max(
        step_directory.glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size
    )


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def of_another_step(path):
    """Sound in itself, and so nothing that Orbax could notice."""
    shutil.rmtree(path)
    shutil.copytree(path.parents[1] / "1" / path.name, path)


def named_as_another_step(path):
    shutil.rmtree(path)
    shutil.copytree(path.parent / "1", path)


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def forged(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"meta": {"position": 7}}))


DAMAGES = {
    "data cut": lambda step: cut(data_file(step)),
    "data flipped": lambda step: flip(data_file(step)),
    "data gone": lambda step: data_file(step).unlink(),
    "data of another step": lambda step: of_another_step(step / "state"),
    "index cut": lambda step: cut(step / "state" / "manifest.ocdbt"),
    "index gone": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "metadata cut": lambda step: cut(step / "state" / "_METADATA"),
    "record cut": lambda step: cut(step / "record" / "metadata"),
    "record flipped": lambda step: flip(step / "record" / "metadata"),
    "record forged": lambda step: forged(step / "record" / "metadata"),
    "record gone": lambda step: (step / "record" / "metadata").unlink(),
    "record of another step": lambda step: of_another_step(step / "record"),
    "all of another step": named_as_another_step,
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "empty": emptied,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_passed_over_with_a_warning_and_saved_over(directory, caplog, damage):
    damage(directory / "2")
    assert found(directory) == 1
    assert found(directory, "best") == 1
    warnings = [x.message for x in caplog.records if x.levelno == logging.WARNING]
    assert len(warnings) == 2 and all(f"{directory}/2 is damaged: " in x for x in warnings)
    assert "See full TensorStore details" not in caplog.text  # two pages, without the reason
    with pytest.raises(CheckpointError, match="2 is damaged: "):
        found(directory, 2)
    with opened(directory, keep=2) as checkpoints:  # the run goes on from 1 and comes to 2 again
        assert checkpoints.restore(abstract(state(0)))[2] == 1
        checkpoints.save(2, state(2), meta={"position": 2})
    assert found(directory) == 2
    with opened(directory, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]


def test_damaged_checkpoints_do_not_count_and_go(directory):
    flip(data_file(directory / "2"))
    with opened(directory, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(state(0)))[2] == 1
        checkpoints.save(3, state(3), meta={"position": 3})
    assert Checkpoints(directory, create=False).steps() == [1, 3]


def test_all_damaged_is_an_error_and_no_fresh_start(directory):
    for step in ("1", "2"):
        cut(data_file(directory / step))
    for which in ("newest", "best"):
        with pytest.raises(CheckpointError, match=rf"no sound .* \[2, 1\]: {directory}/1 is damag"):
            found(directory, which)


def test_what_a_kill_left_unfinished_does_not_disturb(directory, caplog):
    half = directory / "7.orbax-checkpoint-tmp"
    shutil.copytree(directory / "2", half)
    (directory / "notes.txt").touch()
    assert found(directory) == 2
    assert half.exists() and not caplog.records  # a reader leaves alone what may be a save going on
    with opened(directory) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, state(3), meta={"position": 3})
    assert "never finished" in caplog.text
    assert not half.exists() and found(directory) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "uint8", "bool"])
def test_checksum_sees_every_flipped_bit_and_swapped_word(dtype):
    # Words that repeat at distance 512 and differ in high bits only: a sum of word * index, modulo
    # 2**32, would miss swaps among them.
    x = np.where(np.arange(1024) < 512, 1, 0).astype(jnp.dtype(dtype))
    sums = lambda x: [int(part) for part in checksum(jnp.asarray(x))]  # noqa: E731
    before = sums(x)
    swapped = x.copy()
    swapped[[0, 512]] = x[[512, 0]]
    assert sums(swapped)[0] == before[0] and sums(swapped)[1] != before[1]
    for bit in [0] if dtype == "bool" else range(8 * x.itemsize):
        flipped = x.copy()
        flipped.view(f"u{x.itemsize}")[700] ^= 1 << bit
        assert sums(flipped)[0] != before[0] and sums(flipped)[1] != before[1]
    assert sums(x.reshape(32, 32)) == before
    assert sums(spread(x.reshape(32, 32), 8)) == sums(spread(x, 2)) == before


# Bad input and bad disks.


def test_which(directory, tmp_path):
    assert [found(directory, which) for which in (1, 2, "best")] == [1, 2, 2]
    for which in (3, "last"):
        with pytest.raises(CheckpointError, match=rf"which={which!r}: .* its steps \[2, 1\]"):
            found(directory, which)
    empty = Checkpoints(tmp_path / "none", create=False)
    assert empty.restore(abstract(state(0))) is None and empty.steps() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="create=False"):
        empty.save(1, state(1), meta={})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path / "none", keep=0)


def test_another_state_is_an_error_and_not_damage(directory, caplog):
    target = abstract(state(0))
    target["params"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    target["ema"] = target.pop("momentum")
    with pytest.raises(CheckpointError) as error:
        Checkpoints(directory, create=False).restore(target)
    for part in (
        f"{directory}/2 holds another state (3 leaves)",
        "params/bias is ['float32', [500]] in the checkpoint and ['float32', [3]] here",
        "momentum/kernel is only in the checkpoint",
        "ema/kernel is not in the checkpoint",
    ):
        assert part in str(error.value)
    assert not caplog.records


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (np.ones(3), r"got ndarray \['float64', \[3\]\]"),
        (0.5, "got float 0.5"),
        (lambda: jax.random.key(0), "got PRNGKeyArray"),
        (lambda: jnp.ones((0, 3)), r"got ArrayImpl \['float32', \[0, 3\]\]"),
    ],
)
def test_a_leaf_that_cannot_be_saved(tmp_path, leaf, reason):
    with (
        opened(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=f"'a/b': need .*, {reason}"),
    ):
        checkpoints.save(1, {"a": {"b": leaf() if callable(leaf) else leaf}}, meta={})


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/self"])
def test_a_directory_that_cannot_be_written(tmp_path, place):
    """/proc stands for a read-only disk: root may not write there either."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"cannot open {tmp_path / place}: .*Errno"):
        Checkpoints(tmp_path / place)


@pytest.fixture
def full_disk():
    """Within it no file can grow beyond 100 kB."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def test_a_full_disk_is_reported_at_wait_and_at_the_next_save(tmp_path, full_disk):
    big = lambda seed: {"x": jax.random.normal(jax.random.key(seed), (2**16,))}  # noqa: E731
    failure = rf"cannot save step 2 in {tmp_path}: (?s:.)*File too large"
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, big(1), meta={})
        checkpoints.wait()
        with full_disk():
            checkpoints.save(2, big(2), meta={})
            with pytest.raises(CheckpointError, match=failure):
                checkpoints.wait()
            checkpoints.save(2, big(2), meta={})
            with pytest.raises(CheckpointError, match=failure):
                checkpoints.save(3, big(3), meta={})
        assert checkpoints.restore(abstract(big(0)))[2] == 1
        checkpoints.save(2, big(2), meta={})  # there is room again
        restored, _, step = checkpoints.restore(abstract(big(0)))
    assert step == 2 and bits(restored) == bits(big(2))


# Part of a state.


def test_restore_params_without_the_rest_of_the_state(directory):
    like = {"params": abstract(state(0))["params"]}
    tree, left, step = restore_params(directory, like)
    assert (left, step) == ({}, 2)
    assert bits(tree) == bits({"params": state(2)["params"]})
    assert restore_params(directory, like, 1)[2] == 1
    like["params"]["extra"] = like["params"]["bias"]
    with pytest.raises(CheckpointError, match="params/extra is not in the checkpoint"):
        restore_params(directory, like)


def test_restore_params_that_fit(directory, tmp_path):
    like = {"params": {**state(0)["params"], "bias": jnp.ones((10,)), "new": jnp.ones((2,))}}
    tree, left, _ = restore_params(directory, like, partial=True)
    expected = {**state(2)["params"], "bias": jnp.ones((10,)), "new": jnp.ones((2,))}
    assert bits(tree) == bits({"params": expected})
    assert left.keys() == {"params/bias", "params/new"}
    assert left["params/bias"].startswith("is ['float32', [500]] in the checkpoint")
    with pytest.raises(CheckpointError, match="nothing/at/all is not in the checkpoint"):
        restore_params(directory, {"nothing": {"at": {"all": jnp.ones(2)}}}, partial=True)
    with pytest.raises(CheckpointError, match="none holds no checkpoint"):
        restore_params(tmp_path / "none", like)


# Several processes, and sudden death.

SAVE_FOREVER = """
import itertools, sys
import jax.numpy as jnp
from efficient_nets.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
make = lambda step: {"x": jnp.full((2**18,), step, jnp.int32), "y": jnp.arange(9) * step}
target = __import__("jax").eval_shape(lambda: make(1))
before = checkpoints.restore(target)
for step in itertools.count(before[2] + 1 if before else 1):
    checkpoints.save(step, make(step), meta={"position": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_in_the_middle_of_saving(tmp_path):
    rng, last = random.Random(0), 0
    target = {
        "x": jax.ShapeDtypeStruct((2**18,), jnp.int32),
        "y": jax.ShapeDtypeStruct((9,), jnp.int32),
    }
    for _ in range(5):
        command = [sys.executable, "-W", "error", "-c", SAVE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(3):
                printed = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.1))  # anywhere in the save that is now going on
            process.send_signal(signal.SIGKILL)
        restored, meta, step = Checkpoints(tmp_path, create=False).restore(target)
        assert step >= printed - 1 > last  # all but the save under way when it died
        assert meta == {"position": step}
        assert (np.asarray(restored["x"]) == step).all() and restored["y"][8] == 8 * step
        last = step


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import jax, numpy as np
process, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, process)
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from efficient_nets.checkpoint import Checkpoints

mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(AxisType.Auto,))
def put(x, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
def state(seed):
    x = np.random.default_rng(seed).normal(size=(64, 500)).astype(np.float32)
    return {"x": put(x, "d"), "step": put(np.int32(seed))}
def check(which, expected):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                          state(0))
    restored, meta, step = checkpoints.restore(target, which)
    assert (step, meta) == (expected, {"position": expected}), step
    for name, x in state(step).items():
        for mine, theirs in zip(x.addressable_shards, restored[name].addressable_shards):
            assert np.array_equal(mine.data, theirs.data)

checkpoints = Checkpoints(directory, keep=2)
for step in (1, 2, 3):
    metrics = {"validation/accuracy": -step}
    checkpoints.save(step, state(step), meta={"position": step}, metrics=metrics)
check("newest", 3); check("best", 1); check(2, 2)

# Only one process cannot read: all take the one before.
restore = ocp.PyTreeCheckpointHandler.restore
def broken(self, path, **options):
    if process == 1 and "/3/" in str(path):
        raise OSError("lost")
    return restore(self, path, **options)
ocp.PyTreeCheckpointHandler.restore = broken
check("newest", 2)
ocp.PyTreeCheckpointHandler.restore = restore
checkpoints.save(3, state(3), meta={"position": 3}); check("newest", 3)

# A byte of what process 1 wrote.
multihost_utils.sync_global_devices("sound")
if process == 0:
    files = directory.glob("3/state/ocdbt.process_1/d/*")
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes()); data[len(data) // 2] ^= 4; path.write_bytes(data)
multihost_utils.sync_global_devices("flipped")
check("newest", 2)
checkpoints.save(4, state(4), meta={"position": 4}); check("newest", 4)
checkpoints.close()
assert checkpoints.steps() == [1, 2, 4], checkpoints.steps()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    script = [sys.executable, "-W", "error", "-c", TWO_PROCESSES]
    running = [
        subprocess.Popen([*script, str(i), port, str(tmp_path)], env=environment) for i in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
            process.wait()
