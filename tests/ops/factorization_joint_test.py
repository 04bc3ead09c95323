"""Networks of several layers' kernels: what each layer computes with is its slice of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.ops import factorization, linear_maps
from efficient_nets.ops.factorization import Factored, execution

CONV, DENSE = (3, 2, 4, 6), (8, 12)
FORMS = ("cp:3", "tucker:2", "tt:2", "tr:2", "ht:2", "bt:2")
LAYOUTS = (
    *("tt:2,layout=split", "tt:3,layout=axes,order=1", "tr:2,layout=axes,order=1"),
    *("ht:2,layout=split,order=2", "tucker:2,layout=axes", "tucker:2,order=2"),
    *("bt:2,blocks=3,layout=split,order=1", "tt:2,order=2,in=2x5,out=7x2"),
    # In a dense kernel one leaf is left of these, and a core of bonds alone or none.
    *(f"{form}:2,order=1,layout=paired" for form in ("cp", "tucker", "tt", "tr", "ht")),
)
CASES = [
    *((text, CONV) for text in FORMS),
    ("ht:2,order=1,layout=paired", DENSE),
    *(
        pytest.param(text, shape, marks=pytest.mark.slow)
        for text in (*FORMS, *LAYOUTS)
        for shape in (CONV, DENSE)
    ),
]


def joint(text, shape, layers=3):
    network = factorization.parse(text).network(shape, layers)
    rng = np.random.default_rng(0)
    return network, {name: rng.normal(size=size) for name, size in network.shapes.items()}


@pytest.mark.parametrize(("text", "shape"), CASES)
def test_a_layers_network_makes_its_slice(text, shape, x64):
    network, cores = joint(text, shape)
    letters = {index: i for i, index in enumerate(dict(network.sizes))}
    operands = [x for n, of in network.cores for x in (cores[n], [letters[i] for i in of])]
    whole = np.einsum(*operands, [letters[mode] for mode in network.modes], optimize=True)
    whole = np.asarray(network.cut_kernel(jnp.asarray(whole)))
    assert whole.shape == (3, *shape)
    cores = {name: jnp.asarray(core) for name, core in cores.items()}
    own, kept = factorization.layer_of(network, cores, 1)
    assert own == factorization.layer_network(network) and own.kernel_shape == shape
    assert own.shapes == {name: core.shape for name, core in kept.items()}
    # Float64: the same products, summed in another order.
    np.testing.assert_allclose(factorization.reconstruct(own, kept), whole[1], rtol=1e-9, atol=1e-9)
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 4) if shape == CONV else (2, 8))
    window = linear_maps.ConvMap((1, 1), "SAME", (1, 1), 1, shape[:-2])
    linear_map = window if shape == CONV else linear_maps.DenseMap()
    y = factorization.factorized_map(
        linear_map, jnp.asarray(x), [Factored(own, "factorized", kept)]
    )
    expected = linear_map(jnp.asarray(x), [jnp.asarray(whole[1])])
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    assert execution.plan(own, "factorized", (32, 32)).cost.macs > 0


def test_scaling_layers_multiplies_their_kernels(x64):
    network, cores = joint("tr:2", DENSE)
    cores = jax.tree.map(jnp.asarray, cores)
    scaled = factorization.scale_layers(network, cores, jnp.asarray([2.0, 0.0, -1.0]))
    kernels, found = (np.asarray(factorization.reconstruct(network, c)) for c in (cores, scaled))
    expected = kernels * np.array([2.0, 0.0, -1.0])[:, None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_share_is_one_of_all_kernels_together():
    network = factorization.parse("tt:0.1").network((3, 3, 16, 16), 4)
    assert 0.05 * 4 * 2304 < network.params <= 0.1 * 4 * 2304
