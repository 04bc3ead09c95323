"""RI against a calculation by hand, masks, and what scoring must not touch."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_nets import data, evaluation, experiment, paths, train
from efficient_nets.search import importance, reduction

LAYERS = ["conv1", "conv2", "hidden"]
SAMPLES = 100


@pytest.fixture(scope="module")
def net():
    """The run, its weights at the start and, by layer, parameters and MACs from their formulas."""
    from tests.search.conftest import tiny_config

    config = reduction.reduced(tiny_config(), ())
    run = experiment.build(config, data.load(config.data))
    conv1 = (3 * (25 * 4 + 4), 64 * (3 * 25 * 4 + 4))  # 8 x 8 pixels; three kernels, a product
    conv2 = (3 * (25 * 4 * 8 + 8), 16 * (3 * 25 * 4 * 8 + 8))
    hidden, head = (32 * 16 + 16, 32 * 16), (16 * 10 + 10, 16 * 10)
    return run, run.initial_state(), dict(conv1=conv1, conv2=conv2, hidden=hidden, head=head)


def score(net, candidates=tuple(LAYERS), state=None, **options):
    run, initial, _ = net
    evaluator = evaluation.Evaluator(run, "validation")
    cost = reduction.cost(run.config)
    options = dict(samples=SAMPLES, fraction=0.5, masks=2, seed=0) | options
    return importance.score(evaluator, state or initial, cost, candidates, **options)


def accuracy(run, state, params):
    """Counted image by image."""
    model = nnx.merge(run.graph, params, state.stats)
    model.eval()
    images = data.normalise(run.dataset.validation.resident["image"], run.dataset.info)
    hits = np.argmax(model(images), -1) == run.dataset.validation.resident["label"]
    return np.count_nonzero(hits) / len(hits)


def test_ri_is_what_a_hand_calculates(net):
    run, state, costs = net
    params, macs = (sum(cost[i] for cost in costs.values()) for i in (0, 1))
    whole = accuracy(run, state, state.params)
    for found in score(net):
        layer = found["layer"]
        drops = []
        for mask in range(2):
            masked = importance.masked(state.params, layer, 0.5, (0, mask))
            drops.append(whole - accuracy(run, state, masked))
        assert found["drops"] == drops and any(drops)
        assert found["drop"] == sum(drops) / 2
        ri = costs[layer][0] / params * costs[layer][1] / macs / max(found["drop"], 1 / SAMPLES)
        assert found["ri"] == pytest.approx(ri, rel=1e-12)  # a few roundings in float64


@pytest.mark.parametrize("drop", [-0.3, 0.0, 0.01])
def test_a_drop_below_one_image_counts_as_one(drop):
    assert importance.importance(0.5, 0.25, drop, 100) == 0.5 * 0.25 / 0.01
    assert importance.importance(0.5, 0.25, 0.1, 100) == 0.5 * 0.25 / 0.1


def test_a_mask_zeroes_a_share_of_all_kernels_of_one_layer_and_nothing_else(net):
    _, state, _ = net
    before = paths.named_leaves(state.params)
    masked = paths.named_leaves(importance.masked(state.params, "conv2", 0.25, (0, 0)))
    kernels = [f"conv2/{branch}/kernel" for branch in "abc"]
    for leaf, x in masked.items():
        if leaf not in kernels:
            assert x is before[leaf]
            continue
        kept = x == before[leaf]  # survivors are not rescaled
        assert np.all(kept | (x == 0)) and x.sharding == before[leaf].sharding
        # 800 draws: a standard deviation of 0.015
        assert abs(1 - np.mean(kept) - 0.25) < 0.08
    zeros = [np.asarray(masked[leaf] == 0) for leaf in kernels]
    assert not np.array_equal(zeros[0], zeros[1])
    again = paths.named_leaves(importance.masked(state.params, "conv2", 0.25, (0, 0)))
    other = paths.named_leaves(importance.masked(state.params, "conv2", 0.25, (0, 1)))
    np.testing.assert_array_equal(again[kernels[0]], masked[kernels[0]])
    assert np.any(other[kernels[0]] != masked[kernels[0]])
    everything = paths.named_leaves(importance.masked(state.params, "conv2", 1.0, (0, 0)))
    assert not np.any(everything[kernels[0]])


def test_scoring_leaves_every_bit_of_the_weights(net):
    run, _, _ = net
    state = run.initial_state()
    before = train.digest(state)
    evaluator = evaluation.Evaluator(run, "validation")
    scores = evaluator(state)
    score(net, state=state)
    assert train.digest(state) == before
    assert evaluator(state) == scores


def test_layers_and_masks_share_one_compiled_evaluation(net, monkeypatch):
    traced, step = [], evaluation._step
    monkeypatch.setattr(evaluation, "_step", lambda *args: traced.append(1) or step(*args))
    score(net)
    assert len(traced) == 1


def test_a_layer_s_score_does_not_depend_on_the_other_candidates(net):
    scores = {found["layer"]: found for found in score(net)}
    assert score(net, ["conv2"]) == [scores["conv2"]]
    assert score(net, ["conv2"], seed=1)[0]["drops"] != scores["conv2"]["drops"]


def test_masks_of_everything_are_drawn_once(net):
    (found,) = score(net, ["conv1"], fraction=1.0)
    assert len(found["drops"]) == 1


def test_averaged_weights_are_masked_where_they_are_what_is_evaluated(net):
    _, state, _ = net
    ruined = jax.tree.map(lambda x: 0 * x, state.params)
    averaged = state._replace(params=ruined, ema={"params": state.params, "stats": state.stats})
    assert score(net, state=averaged) == score(net)
