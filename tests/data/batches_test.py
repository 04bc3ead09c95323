"""The order of batches as properties: nothing lost, nothing twice, the same for any split."""

import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from efficient_nets.data import digits, eval_batches, gather, load, train_batches
from efficient_nets.data.sources import Source
from efficient_nets.errors import UserError


@pytest.fixture(scope="module")
def make_source(pixels):
    """A source of n images, whose labels are their positions."""

    def make(n, stream=False, workers=0, side=4, varied=False):
        shape = (n, 6, 9, 3) if varied else (n, side, side, 3)
        examples = digits.ArrayExamples(pixels(0, *shape), np.arange(n))
        source = Source("made up", examples, (side, side, 3), n, varied, workers)
        return source if stream else source.decoded()

    return make


def take(batches, n):
    return list(itertools.islice(batches, n))


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


@pytest.mark.parametrize("n, size", [(20, 5), (23, 5), (7, 7), (9, 5), (5, 1)])
def test_an_epoch_is_a_permutation_less_its_remainder(make_source, n, size):
    steps = n // size
    batches = indices(take(train_batches(make_source(n), size, seed=3), 3 * steps))
    epochs = [sum(batches[e * steps : (e + 1) * steps], []) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * size and set(epoch) <= set(range(n))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_each_epoch_drops_other_images(make_source):
    batches = indices(take(train_batches(make_source(9), 8, seed=0), 20))
    assert set(sum(batches, [])) == set(range(9))


def test_the_seed_decides_the_order(make_source):
    source = make_source(50)
    order = [indices(take(train_batches(source, 10, seed=s), 5)) for s in (0, 0, 1)]
    assert order[0] == order[1] != order[2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [0, 1, 3, 4, 11])
def test_starting_at_a_step_is_skipping_to_it(make_source, stream, first):
    source = make_source(14, stream, varied=stream)
    all_batches = take(train_batches(source, 4, seed=5), first + 4)
    assert_equal(all_batches[first:], take(train_batches(source, 4, seed=5, first_step=first), 4))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_are_the_global_batch(make_source, stream, processes):
    source = make_source(30, stream, varied=stream)
    local = 8 // processes
    for make in (
        lambda **k: take(train_batches(source, 8, seed=1, **k), 5),
        lambda **k: list(eval_batches(source, 8, **k)),
    ):
        parts = [make(rows=slice(p * local, (p + 1) * local)) for p in range(processes)]
        merged = [
            {key: np.concatenate([b[key] for b in step]) for key in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_equal(make(), merged)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 13, 14, 40])
@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_counts_each_image_once(make_source, stream, size, processes):
    source, size = make_source(13, stream), size * processes
    seen, steps = [], set()
    for p in range(processes):
        rows = slice(p * size // processes, (p + 1) * size // processes)
        batches = list(eval_batches(source, size, rows=rows))
        steps.add(len(batches))
        for batch in batches:
            labels = batch["label" if stream else "index"]  # in this source they are the same
            assert labels.shape == batch["weight"].shape == (size // processes,)
            assert batch["weight"].dtype == np.float32
            seen += labels[batch["weight"] == 1].tolist()
            assert set(np.unique(batch["weight"])) <= {0, 1}
    assert sorted(seen) == list(range(13))
    assert steps == {-(-13 // size)}  # every process takes part in as many steps


def test_streaming_equals_memory(make_source):
    source = make_source(13)
    stream = make_source(13, stream=True)
    pairs = (
        (take(train_batches(source, 4, seed=0), 7), take(train_batches(stream, 4, seed=0), 7)),
        (list(eval_batches(source, 4)), list(eval_batches(stream, 4))),
    )
    for resident, streamed in pairs:
        assert_equal([gather(source.resident, batch) for batch in resident], streamed)


def test_gather_under_jit(make_source):
    resident = make_source(13).resident
    for batch in eval_batches(make_source(13), 5):
        out = jax.jit(gather)(jax.device_put(resident), batch)
        assert {k: (v.dtype, v.shape) for k, v in out.items()} == {
            "image": (jnp.uint8, (5, 4, 4, 3)),
            "label": (jnp.int32, (5,)),
            "weight": (jnp.float32, (5,)),
        }
        np.testing.assert_array_equal(out["image"], resident["image"][batch["index"]])
        np.testing.assert_array_equal(out["label"], resident["label"][batch["index"]])


def test_random_crops_change_with_the_step_and_not_with_the_run(make_source):
    source = make_source(2, stream=True, varied=True)
    first, again = (take(train_batches(source, 2, seed=0), 6) for _ in range(2))
    assert_equal(first, again)
    crops = {b["image"][list(b["label"]).index(0)].tobytes() for b in first}
    assert len(crops) == 6
    (once,), (twice,) = list(eval_batches(source, 2)), list(eval_batches(source, 2))
    assert_equal([once], [twice])


@pytest.mark.slow
def test_worker_processes_change_nothing_and_end_with_the_iterator(make_source):
    import multiprocessing

    plain = make_source(13, stream=True, varied=True)
    worked = make_source(13, stream=True, varied=True, workers=2)
    batches = train_batches(worked, 4, seed=0, first_step=2)
    assert_equal(take(train_batches(plain, 4, seed=0, first_step=2), 7), take(batches, 7))
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()
    assert_equal(list(eval_batches(plain, 4)), list(eval_batches(worked, 4)))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_outlive_a_sigterm_to_the_whole_process_group(make_source):
    import multiprocessing

    batches = train_batches(make_source(13, stream=True, workers=2), 4, seed=0)
    first = take(batches, 2)  # of both workers
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    rest = take(batches, 40)  # more than they have prefetched
    assert_equal(first + rest, take(train_batches(make_source(13, stream=True), 4, seed=0), 42))
    batches.close()
    assert not multiprocessing.active_children()


def test_digits_from_end_to_end(make_config):
    dataset = load(make_config())
    total = 0.0
    for batch in eval_batches(dataset.test, 100):
        out = gather(dataset.test.resident, batch)
        total += float(out["weight"].sum())
    assert total == 360


def test_errors(make_source):
    source = make_source(13)
    with pytest.raises(UserError, match="batch_size=14 is larger than made up, which has 13"):
        train_batches(source, 14, seed=0)
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        train_batches(source, 0, seed=0)
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        eval_batches(source, 0)
    with pytest.raises(UserError, match=r"rows=slice\(8, 12, None\) selects nothing"):
        eval_batches(source, 8, rows=slice(8, 12))


def test_a_damaged_image_in_a_stream_is_an_error(make_folder, make_config, pixels):
    damaged = Image.fromarray(pixels(0, 64, 64, 3))
    files = {f"train/a/{i}.png": pixels(i, 64, 64, 3) for i in range(4)}
    root = make_folder(files)
    damaged.save(root / "train/a/bad.png")
    content = (root / "train/a/bad.png").read_bytes()
    (root / "train/a/bad.png").write_bytes(content[:3000])
    config = make_config(
        name=f"folder:{root}", test="", storage="stream", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    with pytest.raises(UserError, match="bad.png is not a readable image"):
        list(eval_batches(load(config).train, 2))
