"""The benchmarks run: each rival is the net that it says, a row of the table has its figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import models
from efficient_nets.layers import layers
from tests.peers import hybrid_memory, neurons


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
