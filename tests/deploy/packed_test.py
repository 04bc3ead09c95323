"""Packed files restore to the same outputs, and are as large as the layer table says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, deploy, layers, models
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, LayerSpec
from tests.deploy.integer_test import normal


def net(precision, seed=0, width=0.5):
    plain = models.create(
        "resnet",
        image_shape=(8, 8, 3),
        num_classes=10,
        blocks=(1, 1, 1),
        width=width,
        rngs=nnx.Rngs(seed),
    )
    rules = [dict(match=r"conv\d|shortcut", precision=precision)]
    return layers.convert(plain, rules, jax.random.key(seed))


@pytest.mark.parametrize("precision", ["lsq:w4a4", "bireal", "w=ttq,a=pact:2"])
def test_a_file_restores_to_the_same_outputs(precision, tmp_path):
    trained, x = net(precision), normal(4, 8, 8, 3)
    trained(x)  # running averages of their own
    trained = layers.calibrate(trained, x)
    trained.eval()
    path = tmp_path / "net.safetensors"
    size = deploy.save(trained, path)
    found = deploy.load(net(precision, seed=1), path)
    np.testing.assert_array_equal(found(x), trained(x))

    assert size == path.stat().st_size < analysis.model_cost(trained, (8, 8, 3))["bytes"]


class Tiny(nnx.Module):
    def __init__(self, precision):
        rngs = nnx.Rngs(0)
        self.conv = Conv(2, 4, (3, 3), spec=LayerSpec(precision=precision), rngs=rngs)
        self.norm = BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # its key is no part of a file

    def __call__(self, x):
        return self.dropout(self.norm(self.conv(x)))


def kernel(method, **fields):
    return dict(kernel=dict(method=method, **fields), input=dict(method="lsq", bits=3))


SIZED = {
    "lsq 2": "lsq:w2a2",
    "lsq 3": "lsq:w3a3",
    "lsq 4": "lsq:w4a4o4",
    "lsq 8": "lsq:w8a8",
    "lsq of channels": kernel("lsq", bits=4, per="channel", axis="in"),
    "lsq+": "lsq+:w2a2",
    "dorefa 1": "dorefa:w1a1",
    "dorefa 2": "dorefa:w2a2g6",
    "dorefa 8": "dorefa:w8a8",
    "pact": "pact:w3a3",
    "minmax 8": "minmax:w8a8o8",
    "minmax of channels": kernel("minmax", bits=3, per="channel", signed=False, zero_point=True),
    "lq": "lq:w2a2",
    "lq of groups": kernel("lq", bits=3, per="groups:2"),
    "fatnn": "fatnn:w3La3L",
    "twn": "w=twn",
    "twn of channels": kernel("twn", per="channel"),
    "ttq": "w=ttq,a=pact:4",
    "ttq of channels": kernel("ttq", per="channel", axis="in"),
    "xnor": "xnor",
    "xnor++": "xnor++",
    "xnor++ by position": dict(kernel=dict(method="xnor++", case=3, size=(4, 4))),
    "bireal": "bireal",
    "kbit": "kbit:w4a4",
    "ternarize": "ternarize",
    "binarize": "binarize",
    "log2": "log2:w3a3",
    "sign, restored": kernel("sign", bits=1, normalise="restored"),
    "log2 times": kernel("log2", bits=4, post_scale=True, per="channel"),
    "input alone": "a=minmax:8",
}


@pytest.mark.parametrize("precision", SIZED.values(), ids=SIZED)
def test_a_file_is_as_large_as_the_layer_table_says(precision, tmp_path):
    trained = Tiny(precision)
    deploy.save(trained, tmp_path / "net")
    graph, state = nnx.split(trained)
    of_shapes = nnx.merge(graph, jax.eval_shape(lambda: state))
    assert (
        _data_bytes(tmp_path / "net") == analysis.model_cost(of_shapes, (4, 4, 2))["packed_bytes"]
    )

    other = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    other.conv.w.kernel[...] = -other.conv.w.kernel[...]
    restored = deploy.load(other, tmp_path / "net")
    expected, found = (
        nnx.to_pure_dict(nnx.state(each, nnx.Not(nnx.RngState)))
        for each in (deploy.to_integers(trained), restored)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_net_of_whole_numbers_has_the_file_of_its_rounded_one(tmp_path):
    trained = Tiny(SIZED["minmax of channels"])
    whole = deploy.to_integers(trained)
    for name, each in (("rounded", trained), ("whole", whole)):
        deploy.save(each, tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "rounded").read_bytes()
    cost = analysis.model_cost(whole, (4, 4, 2))
    assert _data_bytes(tmp_path / "whole") == cost["packed_bytes"]


def _data_bytes(path):
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def test_a_file_says_nothing_of_operands(tmp_path):
    def layer(precision, seed):
        return Dense(20, 6, spec=LayerSpec(precision=precision), rngs=nnx.Rngs(seed))

    trained, x = layer("lsq:w4a4", 0), jnp.abs(normal(5, 20))
    trained.eval()
    deploy.save(trained, tmp_path / "int8")
    deploy.save(deploy.to_integers(trained, operands="int4"), tmp_path / "int4")
    assert (tmp_path / "int4").read_bytes() == (tmp_path / "int8").read_bytes()
    assert b'"w/kernel:values"' in (tmp_path / "int4").read_bytes()  # packed, in a net of one layer
    for operands, kind in (("int4", jnp.int4), ("int8", jnp.int8)):
        found = deploy.load(layer("lsq:w4a4", 1), tmp_path / "int4", operands=operands)
        assert found.w.kernel.dtype == kind
        np.testing.assert_array_equal(found(x), trained(x))
    deploy.save(layer("lsq:w8a4", 0), tmp_path / "wide")
    with pytest.raises(UserError, match="w/kernel is int8.* there, int4.* here"):
        deploy.load(layer("lsq:w4a4", 1), tmp_path / "wide", operands="int4")


def test_a_file_of_another_net(tmp_path):
    path = tmp_path / "net.safetensors"
    deploy.save(net("lsq:w4a4"), path)
    with pytest.raises(UserError, match="of another net: .* there, .* here"):
        deploy.load(net("lsq:w4a4", width=0.25), path)
    with pytest.raises(UserError, match="ranges.*nothing there|ranges.*nothing here"):
        deploy.load(net("w=lsq:4"), path)


@pytest.mark.parametrize("precision", ["lsq:w4a4", "dorefa:w8a8", "w=ttq,a=pact:2"])
def test_nets_of_whole_numbers_and_folded_ones_are_saved_as_they_are(precision, tmp_path):
    trained, x = net(precision), normal(4, 8, 8, 3)
    trained = layers.calibrate(trained, x)
    whole = deploy.to_integers(trained)
    folded, left = deploy.fold_norms(whole, (8, 8, 3))
    assert not left
    sizes = [deploy.save(each, tmp_path / "net") for each in (trained, whole, folded)]
    # Features have scales, or values, of their own, and biases; norms had four numbers of each.
    assert sizes[0] * 0.98 < sizes[1] < sizes[0] * 1.02
    assert sizes[2] < sizes[0]
    template, _ = deploy.fold_norms(deploy.to_integers(net(precision, seed=1)), (8, 8, 3))
    found = deploy.load(template, tmp_path / "net")
    np.testing.assert_array_equal(found(x), folded(x))
    with pytest.raises(UserError, match="is of another net"):
        deploy.load(net(precision, seed=1), tmp_path / "net")


def test_schedules_must_be_over(tmp_path):
    spec = dict(
        input=dict(method="lsq", bits=4, float_epochs=1.0),
        kernel=dict(method="lsq", bits=4, stop_epoch=1.0),
    )
    trained, x = net(spec), normal(4, 8, 8, 3)
    with pytest.raises(UserError, match="its schedule is not over"):
        deploy.save(trained, tmp_path / "net")
    layers.advance([found for _, found in layers.ranges(trained)], 1.0)
    deploy.save(trained, tmp_path / "net")
    cost = analysis.model_cost(trained, (8, 8, 3))
    assert _data_bytes(tmp_path / "net") == cost["packed_bytes"]
    trained.eval()
    found = deploy.load(net(spec, seed=1), tmp_path / "net")
    np.testing.assert_allclose(found(x), trained(x), rtol=1e-5, atol=1e-6)
    assert jnp.all(jnp.isfinite(found(x)))
