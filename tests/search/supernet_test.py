"""A layer of several candidates: each is the layer that `convert` makes, and alone when it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, layer_norm_act
from efficient_nets.search import architecture, candidates, supernet

CANDIDATES = (
    dict(algorithm="direct", precision="float"),
    dict(algorithm="direct", precision="minmax:w8a8so8s"),
    dict(algorithm="winograd:2,flex", precision="lsq:w4a4s"),
    dict(algorithm="winograd:4,flex", precision="minmax:w8a8si8t8"),
)


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    """Rounding makes steps of what differs in the last bit: in float64 none lies between."""
    with jax.enable_x64(True):
        yield


class Net(nnx.Module):
    """Two searched convolutions, one behind a norm, and one that stays."""

    def __init__(self):
        init = dict(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.conv1 = Conv(2, 4, (3, 3), use_bias=False, **init)
        self.norm1 = BatchNorm(4, rngs=nnx.Rngs(0))
        nnx.update(self.norm1, jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(self.norm1)))
        self.block = nnx.List([Conv(4, 3, (3, 3), strides=2, **init)])
        self.last = Conv(3, 2, (1, 1), **init)

    def __call__(self, x):
        x = layer_norm_act(x, self.conv1, self.norm1, nnx.relu)
        return self.last(layer_norm_act(x, self.block[0]))


PATHS = ("conv1", "block/0")


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 6, 7, 2))


def compiled(function, *arguments):
    """A net that a function makes: op by op it would take ten times as long."""
    graph, _ = nnx.split(nnx.eval_shape(function, *arguments))
    state = jax.jit(lambda *arguments: nnx.state(function(*arguments)))(*arguments)
    return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def made(images):
    return compiled(
        lambda images: supernet.make(Net(), PATHS, CANDIDATES, jax.random.key(2), images), images
    )


def called(model):
    """`images, sampled` to the output, and to the net as the call leaves it; compiled once."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, images, sampled):
        model = nnx.merge(graph, state)
        if sampled:
            supernet.sample(model, sampled)
        with jax.numpy_dtype_promotion("standard"):  # which Flax's batch norm takes in float64
            return model(images), nnx.state(model)

    def call(images, sampled=None):
        y, moved = run(state, images, sampled)
        return y, nnx.merge(graph, moved)

    call.programs = run._cache_size
    return call


@pytest.fixture(scope="module")
def calls(made):
    """In evaluation, and in training."""
    found = [nnx.clone(made), nnx.clone(made)]
    found[0].eval()
    found[1].train()
    return list(map(called, found))


def arrays(module):
    return nnx.to_pure_dict(nnx.state(module))


def test_paths_of_weights_are_those_of_the_plain_net(made):
    plain, found = (
        {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(net, nnx.Param))}
        for net in (Net(), made)
    )
    assert plain <= found
    assert all("/ways/" in path for path in found - plain)
    assert list(supernet.choices(made)) == sorted(PATHS)


@pytest.mark.parametrize("first, second, train", [(2, 1, True), (0, 3, False)])
def test_a_path_is_the_converted_net_with_the_same_weights(
    made, images, calls, first, second, train
):
    chosen = dict(zip(PATHS, (first, second), strict=True))
    found, after = calls[train](images, chosen)
    rules = [dict(match=f"^{path}$", **CANDIDATES[index]) for path, index in chosen.items()]
    plain = compiled(lambda: layers.convert(Net(), rules, jax.random.key(3)))
    extracted = supernet.extract(made, chosen)
    assert jax.tree.structure(arrays(plain)) == jax.tree.structure(arrays(extracted))
    nnx.update(plain, nnx.state(extracted))
    plain.train() if train else plain.eval()
    expected, plain = called(plain)(images)
    # The norm is a step of its own here, and part of the unit there.
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    if train:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
            arrays(supernet.extract(after, chosen)),
            arrays(plain),
        )


def test_only_the_sampled_candidate_s_ranges_move(made, images, calls):
    chosen = dict(zip(PATHS, (1, 3), strict=True))
    _, after = calls[True](images * 2, chosen)
    for path, layer in supernet.choices(after).items():
        before = supernet.choices(made)[path]
        for number, (new, old) in enumerate(zip(layer.ways, before.ways, strict=True)):
            new, old = (nnx.state(way, layers.precision.Observed) for way in (new, old))
            same = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), new, old))
            assert all(same) == (number != chosen[path]), (path, number)


def test_another_path_is_not_compiled_anew(images, calls):
    before = calls[False](images, dict.fromkeys(PATHS, 0))
    programs = calls[False].programs()
    found = [calls[False](images, dict.fromkeys(PATHS, index))[0] for index in range(4)]
    assert calls[False].programs() == programs
    np.testing.assert_array_equal(found[0], before[0])
    assert not any(np.allclose(found[0], other, atol=1e-6) for other in found[1:])


def test_the_gates_gradient_in_float64():
    """dL/dg_j = <dL/dy, o_j>, the logits' by equation 4, and x's through the open gate alone."""
    pair = [CANDIDATES[0], dict(algorithm="winograd:2,flex", precision="float")]

    def make():
        conv = Conv(2, 3, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        model = supernet.make(nnx.List([conv]), ["0"], pair, jax.random.key(0))
        matrix = model[0].ways[1].transforms["G3"]
        matrix[...] = 1.5 * matrix[...]  # or both would compute the same
        return model

    model = compiled(make)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 2))
    weight = jax.random.normal(jax.random.key(2), (2, 5, 5, 3))

    @jax.jit
    def by_hand(x):
        """Each candidate's output, and the gradient by x of the loss behind it alone."""
        found = []
        for way in model[0].ways:
            y, back = jax.vjp(way, x)
            found.append((y, *back(2 * y * weight)))
        return found

    @jax.jit
    @jax.grad
    def gradient(given, pair):
        net = nnx.clone(model)
        supernet.sample(net, {"0": pair})
        supernet.open_gates(net, {"0": given["gates"]})
        return jnp.sum(jnp.square(net[0](given["x"])) * weight)

    outputs = by_hand(x)
    logits = np.array([0.3, -0.4])
    p = np.exp(logits) / np.exp(logits).sum()
    for open_, shut in ((0, 1), (1, 0)):
        found = gradient({"gates": jnp.array([1.0, 0.0]), "x": x}, jnp.array([open_, shut]))
        upstream = np.asarray(2 * outputs[open_][0] * weight)
        expected = [np.sum(upstream * outputs[index][0]) for index in (open_, shut)]
        # Sums of 150 products of values in double precision, of which Winograd's cancel.
        np.testing.assert_allclose(found["gates"], expected, rtol=1e-11)
        np.testing.assert_allclose(found["x"], outputs[open_][1], rtol=1e-10, atol=1e-12)
        of_logits = architecture.gate_gradient(
            jnp.asarray(logits[None]), jnp.array([[open_, shut]]), found["gates"][None]
        )
        by_index = dict(zip((open_, shut), expected, strict=True))
        closed = p[0] * p[1] * (by_index[0] - by_index[1])
        np.testing.assert_allclose(of_logits[0], [closed, -closed], rtol=1e-11)


def test_quantization_losses_of_the_sampled_candidate_are_told():
    rounded = dict(kernel=dict(method="lsq", bits=4, loss=0.5))
    pair = [CANDIDATES[0], dict(algorithm="direct", precision=rounded)]
    conv = Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    model = supernet.make(nnx.List([conv]), ["0"], pair, jax.random.key(0))
    x, found = jnp.ones((1, 4, 4, 2)), []
    for index in range(2):
        supernet.sample(model, {"0": index})
        with layers.collecting("losses") as losses:
            model[0](x)
        found.append(float(losses[0][1]))
    with layers.collecting("losses") as losses:
        model[0].ways[1](x)
    assert found == [0, pytest.approx(float(losses[0][1]), rel=1e-6)]
    assert found[1] > 0


def test_a_candidate_that_cannot_compute_a_layer_is_named():
    conv = Conv(2, 3, (3, 3), dilation=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="0: algorithm='winograd:2' with dilation"):
        supernet.make(
            nnx.List([conv]),
            ["0"],
            [CANDIDATES[0], dict(algorithm="winograd:2", precision="minmax:w8i8")],
            jax.random.key(0),
        )


def test_the_grid_of_candidates():
    found = candidates.grid(("direct", "winograd:4,flex"), (0, 8, 4))
    assert [candidates.label(candidate) for candidate in found] == [
        "direct float",
        "direct minmax:w8a8so8s",
        "direct minmax:w4a4so4s",
        "winograd:4,flex float",
        "winograd:4,flex minmax:w8a8so8st8i8",
        "winograd:4,flex minmax:w4a4so4st4i4",
    ]
    assert len(candidates.grid()) == 12
