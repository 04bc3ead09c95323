"""What `convert` does to a model, what it leaves, and what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets.layers import (
    BatchNorm,
    Conv,
    Dense,
    LayerSpec,
    convert,
    layers,
    set_compute_dtype,
)

KEY = jax.random.key(7)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = Conv(4, 4, (3, 3), rngs=rngs)
        self.norm1 = BatchNorm(4, rngs=rngs)
        self.conv2 = Conv(4, 4, (3, 3), groups=2, strides=2, use_bias=False, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = Conv(3, 4, (3, 3), rngs=rngs)
        self.stage1 = nnx.List([Block(rngs), Block(rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = Dense(4, 10, rngs=rngs)


PATHS = {"stem", "stage1/0/conv1", "stage1/0/conv2", "stage1/1/conv1", "stage1/1/conv2", "head"}


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


def _neurons(model):
    return {path: layer.spec.neuron for path, layer in layers(model)}


def _arrays(model) -> dict[str, np.ndarray]:
    """Parameters and running averages by path."""
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def _assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, others[path], err_msg=path)


def _of(model, prefix):
    return {path: array for path, array in _arrays(model).items() if path.startswith(prefix)}


def test_layers_have_paths(net):
    assert dict(layers(net)).keys() == PATHS
    assert dict(layers(net))["stage1/1/conv2"] is net.stage1[1].conv2
    assert dict(layers(net.head)) == {"": net.head}


def test_a_shared_layer_is_listed_once():
    net = Net(nnx.Rngs(0))
    net.stage1[1].conv1 = net.stage1[0].conv1
    assert dict(layers(net)).keys() == PATHS - {"stage1/1/conv1"}


def test_first_match_wins(net):
    rules = [
        {"match": r"stem|head"},
        {"match": r"conv2$", "neuron": "ours"},
        {"match": r"stage\d", "neuron": "ours", "norm": "branch", "backward": "autodiff"},
    ]
    specs = {path: layer.spec for path, layer in layers(convert(net, rules, KEY))}
    assert specs["stem"] == specs["head"] == LayerSpec()
    assert specs["stage1/0/conv2"] == specs["stage1/1/conv2"] == LayerSpec("ours")
    expected = LayerSpec("ours", norm="branch", backward="autodiff")
    assert specs["stage1/0/conv1"] == specs["stage1/1/conv1"] == expected


def test_no_rules_change_nothing(net):
    _assert_same(_arrays(convert(net, [], KEY)), _arrays(net))
    _assert_same(_arrays(convert(net, [{"match": ""}], KEY)), _arrays(net))


def test_what_no_rule_changes_keeps_its_parameters(net):
    converted = convert(net, [{"match": "stem"}, {"match": "conv1", "neuron": "ours"}], KEY)
    for prefix in ("stem", "stage1/0/conv2", "stage1/1/conv2", "stage1/0/norm1", "head"):
        _assert_same(_of(converted, prefix), _of(net, prefix))
    assert _of(converted, "stage1/0/conv1").keys() == {
        f"stage1/0/conv1/{branch}/{leaf}" for branch in "abc" for leaf in ("kernel", "bias")
    }


def test_the_model_given_is_not_touched():
    net = Net(nnx.Rngs(0))
    before, graphdef = _arrays(net), nnx.split(net)[0]
    converted = convert(net, [{"match": "", "neuron": "ours", "norm": "branch"}], KEY)
    _assert_same(_arrays(net), before)
    assert nnx.split(net)[0] == graphdef
    assert set(_neurons(net).values()) == {"linear"}
    assert set(_neurons(converted).values()) == {"ours"}
    # Nor does a change of the copy reach it.
    converted.stage1[0].norm1.mean[...] = jnp.ones(4)
    _assert_same(_arrays(net), before)


def test_fresh_parameters_depend_on_path_and_key_alone(net):
    everything = convert(net, [{"match": "", "neuron": "ours"}], KEY)
    other_rules = convert(
        net, [{"match": "head"}, {"match": "x"}, {"match": "1/conv", "neuron": "ours"}][::2], KEY
    )
    other_weights = convert(Net(nnx.Rngs(5)), [{"match": "", "neuron": "ours"}], KEY)
    for other in (other_rules, other_weights):
        _assert_same(_of(other, "stage1/1/conv1"), _of(everything, "stage1/1/conv1"))
    kernels = [
        _arrays(model)[f"{path}/{branch}/kernel"]
        for model in (
            everything,
            convert(net, [{"match": "", "neuron": "ours"}], jax.random.key(8)),
        )
        for path in ("stage1/0/conv1", "stage1/1/conv1")
        for branch in "abc"
    ]
    for i, kernel in enumerate(kernels):  # one path, branch or key draws nothing of another's
        assert not any(np.any(kernel == other) for other in kernels[:i])


def test_geometry_and_initialisers_stay(net):
    before = {path: layer.geometry for path, layer in layers(net)}
    converted = convert(net, [{"match": "", "neuron": "ours", "norm": "branch"}], KEY)
    assert {path: layer.geometry for path, layer in layers(converted)} == before
    assert converted.stage1[0].conv2(jnp.ones((2, 4, 4, 4))).shape == (2, 2, 2, 4)
    assert converted.stage1[0].conv2.a.bias is None


def test_another_backward_keeps_the_parameters(net):
    """It is another way to the same gradient, so nothing is drawn anew."""
    ours = convert(net, [{"match": "", "neuron": "ours"}], KEY)
    plain = convert(ours, [{"match": "", "backward": "autodiff"}], jax.random.key(1))
    assert {layer.spec.backward for _, layer in layers(plain)} == {"autodiff"}
    _assert_same(_arrays(plain), _arrays(ours))


def test_rules_add_to_the_spec_that_is_there(net):
    ours = convert(net, [{"match": "conv1", "neuron": "ours"}], KEY)
    normed = convert(ours, [{"match": "0/conv1", "norm": "branch"}], KEY)
    assert normed.stage1[0].conv1.spec == LayerSpec("ours", norm="branch")
    assert normed.stage1[1].conv1.spec == LayerSpec("ours")


def test_converted_state_splits_and_merges(net):
    converted = convert(net, [{"match": "conv", "neuron": "ours", "norm": "branch"}], KEY)
    merged = nnx.merge(*nnx.split(converted))
    assert _neurons(merged) == _neurons(converted)
    _assert_same(_arrays(merged), _arrays(converted))


def test_compute_type_of_a_whole_model(net):
    narrow = set_compute_dtype(net, jnp.bfloat16)
    assert {layer.geometry.dtype for _, layer in layers(narrow)} == {jnp.bfloat16}
    assert {layer.geometry.dtype for _, layer in layers(net)} == {None}
    assert narrow.head(jnp.ones((2, 4), jnp.float32)).dtype == jnp.bfloat16
    _assert_same(_arrays(narrow), _arrays(net))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "stm", "neuron": "ours"}], r"layers\[0\].match='stm'.*none.*stem"),
        (
            [{"match": "stem"}, {"match": "stem|head"}, {"match": "head|stem", "neuron": "ours"}],
            r"layers\[2\].match='head\|stem'.*earlier.*\[0, 1\]",
        ),
        ([{"match": "stem"}, {"match": "stem"}], r"layers\[1\].match='stem'.*earlier.*\[0\]"),
        ([{"neuron": "ours"}], r"layers\[0\]=.*no 'match'"),
        ([{"mtach": "stem"}], r"layers\[0\].*'mtach'.*did you mean 'match'"),
        ([{"match": "stem"}, {"match": "head", "nueron": "ours"}], r"layers\[1\].*'neuron'"),
        ([{"match": "stem", "neuron": "our"}], r"layers\[0\].*neuron='our'.*did you mean 'ours'"),
        ([{"match": "stem", "precision": "lsk:w4a4"}], "precision='lsk'.*allowed .*lsq"),
        ([{"match": "("}], r"layers\[0\].match='\('.*regular expression"),
        ([{"match": None}], r"layers\[0\].match=None.*regular expression"),
        (["stem"], r"layers\[0\]='stem'"),
        ({"match": "stem"}, "layers"),
    ],
)
def test_a_bad_rule_is_named(net, rules, message):
    with pytest.raises(ValueError, match=message):
        convert(net, rules, KEY)


def test_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match="no Dense, Conv or Embedding"):
        convert(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [{"match": "", "neuron": "ours"}], KEY)
