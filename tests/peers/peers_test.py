"""The benchmarks run: each rival is the net that it says, a row of the table has its figures."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import models
from efficient_nets.layers import layers
from tests.peers import hybrid_memory, neurons, precision, winograd


@pytest.mark.parametrize("row", hybrid_memory.RIVALS)
def test_a_rival_computes_logits_and_has_the_quadratic_nets_parameters(row):
    def logits(row):
        model = models.create(
            "vgg", image_shape=(32, 32, 3), num_classes=10, layout="Q7", width=1 / 16,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        model = hybrid_memory.RIVALS[row](model)
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        return model(jnp.zeros((2, 32, 32, 3))), params

    shapes = {name: jax.eval_shape(lambda name=name: logits(name)) for name in (row, "hybrid")}
    assert shapes[row][0].shape == (2, 10)
    counts = [sum(x.size for x in params) for _, params in shapes.values()]
    assert len({*counts}) == 1


@pytest.mark.parametrize("backward", ["hybrid", "autodiff"])
def test_the_net_of_the_table_of_memory_has_the_neuron_in_two_layers(backward):
    model = nnx.eval_shape(lambda: neurons.first_stage("t4", backward))
    found = {path: layer.spec for path, layer in layers(model)}
    assert found.keys() == {"stage1/0/conv", "stage1/1/conv", "head"}
    assert found.pop("head").neuron == "linear"
    assert {(spec.neuron, spec.norm, spec.backward) for spec in found.values()} == {
        ("t4", "branch", backward)
    }
    logits = nnx.eval_shape(lambda net, x: net(x), model, jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 10)


@pytest.mark.slow
def test_a_row_of_the_table_of_neurons():
    (row,) = neurons.table(["t4"], "digits", seeds=2)
    assert row["neuron"] == "t4" and row["params"] > 0 and row["macs"] > 0
    assert row["accuracy"] > 0.3 and row["deviation"] > 0  # two seeds are two runs
    assert all(np.isfinite(row[f"{kind}_ms"]) for kind in ("hybrid", "autodiff", "linear"))


def test_rows_of_the_table_of_one_rounded_layer():
    case = precision.Case(batch=2, channels=4, size=4)
    names = ["lsq:w2a2", "nnx.Conv"]
    rows = {row["row"]: row for row in precision.layer_table(names, case, rounds=2)}
    assert list(rows) == ["float", *names]  # what a row is compared with comes first
    assert {row["convolutions"] for row in rows.values()} == {3}  # the codes' sums cost no fourth
    assert rows["nnx.Conv"]["error"] < 1e-6  # two compilers' orders of the same 36 terms
    assert rows["float"]["ratio"] == 1 and len(rows["lsq:w2a2"]["all_ms"]) == 2


def test_rivals_that_cannot_be_imported_are_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "brevitas", None)
    monkeypatch.setitem(sys.modules, "qwix", None)
    assert precision.available(["brevitas w2a2", "qwix w2a4", "xnor"]) == ["float", "xnor"]
    message = capsys.readouterr().err
    assert "brevitas w2a2: left out" in message and "qwix w2a4: left out" in message


@pytest.mark.slow
def test_rows_of_the_table_of_rounded_nets():
    found = list(precision.net_table(["float", "lsq:w2a2"], batch=8, depth=8, rounds=2))
    floating, rounded = found
    assert floating["ratio"] == 1 and rounded["ratio"] > 0
    assert rounded["packed_bytes"] < floating["packed_bytes"]
    assert rounded["bops"] < floating["bops"]
    assert len(rounded["all_ms"]) == len(rounded["float_ms"]) == 2


@pytest.mark.slow
def test_errors_of_winograd_transforms():
    rows = list(winograd.errors(tiles=(2,)))
    assert {row["row"].split()[-1] for row in rows} == set(winograd.points.SETS)
    for row in rows:
        assert row["float32"] < 1e-6
        # 8 bits at three sites; scales of its own for each tap are no worse.
        assert 1e-3 < row["tap"] < row["int8"] < 0.1


def test_the_winograd_net_has_its_method():
    config = winograd.config_of("flex,tile=6", 0.125, 16)
    algorithms = {str(rule.get("algorithm", "direct")) for rule in config.layers}
    assert algorithms == {"winograd:6,flex", "winograd:4,flex", "direct"}
    assert config.train.batch_size == 16 and config.model.width == 0.125


@pytest.mark.slow
def test_the_winograd_net_in_torch_is_ours():
    """Both ways of adding up give the same, and nearly what direct convolutions give in float."""
    torch = pytest.importorskip("torch")
    from tests.peers import winograd_torch

    torch.manual_seed(0)
    batched = winograd_torch.net(0.125, "batched")
    broadcast = winograd_torch.net(0.125, "broadcast")
    broadcast.load_state_dict(batched.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(batched(images), broadcast(images), rtol=1e-3, atol=1e-3)
    layer = winograd_torch.WinogradConv(3, 5, broadcast=False)
    layer.rounding = torch.nn.ModuleDict({name: torch.nn.Identity() for name in layer.rounding})
    direct = torch.nn.functional.conv2d(images, layer.weight, padding=1)
    torch.testing.assert_close(layer(images), direct, rtol=1e-4, atol=1e-4)
