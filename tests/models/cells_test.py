"""Nets of cells: the shared net is each fixed net that is taken out of it, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models, paths
from efficient_nets.errors import UserError
from efficient_nets.layers import LayerSpec, recalibrate
from efficient_nets.models import cells, operands, operations
from efficient_nets.models.space import Choices, Space

TINY = dict(image_shape=(8, 8, 3), num_classes=3, nodes=2, layers=1, features=2)
FEW = dict(layers=0, ops=("sep3", "max3", "identity"), precisions=("ternarize", "float"))


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    """Rounding makes steps of what differs in the last bit: in float64 none lies between.

    Flax's batch norm cannot have it under strict promotion.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def shapes(**options):
    return nnx.eval_shape(lambda: models.create("cells", rngs=nnx.Rngs(0), **(TINY | options)))


def arrays(**options):
    return filled(shapes(**options))


def filled(net):
    """A net with values from NumPy, in float64: compiling JAX's draws takes longer than a test."""
    graph, state = nnx.split(net)
    draws = np.random.default_rng(0)

    def value(name, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        kind = name.split("/")[-1]
        found = draws.normal(0, 2 if kind == "kernel" else 0.3, x.shape)
        found = draws.uniform(0.5, 2, x.shape) if kind in ("scale", "var") else found
        return jnp.asarray(found)

    nnx.replace_by_pure_dict(state, paths.map_named(value, nnx.to_pure_dict(state)))
    return nnx.merge(graph, state)


def count(net):
    return sum(x.size for x in jax.tree.leaves(nnx.state(net, nnx.Param)))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (4, 8, 8, 3), jnp.float64)


def two_cells(make, **options):
    """A normal and a reduction cell: compiling longer nets takes longer than the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "reduction_places", lambda layers, reductions: (1,))
        return make(**(FEW | options))


@pytest.fixture(scope="module")
def shared():
    return two_cells(arrays, arc="")


def value_and_gradient(net):
    """A function of parameters, other state and images: logits, state behind, gradient."""
    graph, params, others = nnx.split(net, nnx.Param, ...)
    traces = []

    @jax.jit
    def run(params, others, images):
        traces.append(1)

        def loss(params):
            model = nnx.merge(graph, params, others, copy=True)
            logits = model(images)
            return jnp.sum(jnp.sin(logits)), (logits, nnx.state(model, nnx.Not(nnx.Param)))

        gradient, (logits, behind) = jax.grad(loss, has_aux=True)(params)
        return logits, nnx.to_pure_dict(behind), nnx.to_pure_dict(gradient)

    def call(images, tokens=None):
        if tokens is not None:
            others["architecture"] = others["architecture"].replace(jnp.asarray(tokens))
        return run(params, others, images)

    return call, traces


@pytest.fixture(scope="module")
def shared_run(shared):
    return value_and_gradient(shared)


def architectures(space):
    """Precisions: all ternary, all float, and both, where nodes of one cell are loose."""
    chain = space.parse("0 0 1 1 2 0 2 2 1 0 0 2 0 0 2 0")
    loose = space.parse("0 0 0 0 1 2 1 1 0 1 1 0 1 0 1 2")
    chain[..., 2] = 1
    loose[0] = chain[0]
    loose[..., 2] = np.random.default_rng(1).integers(0, 2, loose.shape[:-1])
    return {
        "ternary": np.asarray(space.random(jax.random.key(2))) * np.array([1, 1, 0], np.int32),
        "float chain": chain,
        "mixed": loose,
    }


NAMES = (
    "mixed",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("ternary", "float chain")),
)


def at_home(net, tokens, leaves):
    """By the names of a fixed net, what a shared net's tree has for it; and the rest, zeroed."""
    rest = jax.tree.map(np.array, leaves)
    flat, found = paths.named_leaves(rest), {}
    fixed = paths.named_leaves(nnx.to_pure_dict(nnx.state(cells.extract(net, tokens))))
    for name in fixed:
        path = name.split("/")
        if "op" not in path:
            if name in flat:
                found[name] = flat[name].copy()
                flat[name][...] = 0
            continue
        _, cell, _, node, operand, _, *inner = path
        kind = int(int(cell) in net.places)
        at, op, precision = tokens[kind, int(node), "xy".index(operand)]
        way = net.cells[0].nodes[0].x.numbers[op][precision]
        # Variables that precisions share are listed under the first one that has them.
        for number in range(way, net.cells[0].nodes[0].x.numbers[op][0] - 1, -1):
            own = "/".join([*path[:5], "ways", str(number), *inner])
            if own in flat:
                found[name] = flat[own][at].copy()
                flat[own][at] = 0
                break
    return found, flat


@pytest.mark.parametrize("name", NAMES)
def test_the_shared_net_is_the_fixed_net_of_its_architecture(shared, shared_run, images, name):
    tokens = architectures(shared.space)[name]
    call, traces = shared_run
    logits, behind, gradient = call(images, tokens)
    fixed = cells.extract(shared, tokens)
    expected, moved, own = value_and_gradient(fixed)[0](images)
    # float64 rounding of ten layers, of which norms divide by small deviations.
    close = dict(rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(logits, expected, **close)
    found, rest = at_home(shared, tokens, gradient)
    own = paths.named_leaves(own)
    assert found.keys() == own.keys()
    # Ternary kernels have columns of zeros, and inputs that no node reads have no gradient.
    assert np.mean([np.any(leaf) for leaf in own.values()]) > 0.8
    for path, leaf in own.items():
        np.testing.assert_allclose(found[path], leaf, err_msg=path, **close)
    assert not any(np.any(leaf) for leaf in rest.values())
    # Running averages move where the architecture is, and nowhere else.
    before = nnx.to_pure_dict(nnx.state(shared, nnx.Not(nnx.Param)))
    del before["architecture"], behind["architecture"]
    found, _ = at_home(shared, tokens, behind)
    for path, leaf in paths.named_leaves(moved).items():
        np.testing.assert_allclose(found[path], leaf, err_msg=path, **close)
    steps = jax.tree.map(lambda new, old: np.asarray(new - old), behind, before)
    _, rest = at_home(shared, tokens, steps)
    assert not any(np.any(leaf) for leaf in rest.values())
    others = {repr(call(images, tokens)[0]) for tokens in architectures(shared.space).values()}
    assert len(others) == 3 and len(traces) == 1


def test_a_mixture_is_the_sum_of_what_a_shared_operand_can_be():
    space = Space(1, FEW["ops"], FEW["precisions"])
    rng = np.random.default_rng(1)
    weights, states = rng.normal(0, 1, (4, 4, 4, 2)), jnp.asarray(rng.normal(0, 1, (2, 4, 4, 4, 2)))

    def runner(mixes):
        style = operands.Style(space, "relu", "", mixes)
        operand = filled(nnx.eval_shape(lambda: style.operand(2, 2, style, nnx.Rngs(0))))
        graph, params, others = nnx.split(operand, nnx.Param, ...)

        def value(params, said):
            operand = nnx.merge(graph, params, others, copy=True)
            y = operand(list(states), said)
            return jnp.sum(weights * y), (y, nnx.state(operand, nnx.Not(nnx.Param)))

        arguments = (0, 1) if mixes else 0
        grad = jax.jit(jax.grad(value, argnums=arguments, has_aux=True))
        return lambda said: grad(params, said), nnx.to_pure_dict(others)

    choices = Choices(np.array([0.3, 0.7, 0]), np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.4]))
    mixture, before = runner(True)
    (gradient, of_choices), (y, behind) = mixture(jax.tree.map(jnp.asarray, choices))
    one, _ = runner(False)
    total, summed, by_choice = (
        0,
        jax.tree.map(np.zeros_like, gradient),
        jax.tree.map(np.zeros_like, choices),
    )
    for at, op, precision in np.ndindex(2, 3, 2):
        found, (value, _) = one(jnp.array([at, op, precision], jnp.int32))
        p = choices.inputs[at] * choices.ops[op] * choices.precisions[precision]
        total += p * value
        summed = jax.tree.map(lambda a, b, p=p: a + p * b, summed, found)
        for each, of, token in zip(by_choice, choices, (at, op, precision), strict=True):
            each[token] += p / of[token] * np.sum(weights * value)
    # float64 rounding.
    np.testing.assert_allclose(y, total, rtol=1e-9, atol=1e-9)
    for found, expected in ((gradient, summed), (of_choices, by_choice)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), found, expected
        )
    # Every running average moves, at every input.
    before, behind = map(paths.named_leaves, (before, nnx.to_pure_dict(behind)))
    for path, leaf in behind.items():
        if path.endswith(("/mean", "/var")):
            assert np.all(np.any(leaf != before[path], axis=-1)), path


def test_loose_ends_of_a_mixture_count_as_they_are_probable():
    """With identities alone states are sums of inputs, and the value is a formula."""
    style = operands.Style(Space(2, ("identity",)), "relu", "", mixes=True)
    cell = filled(
        nnx.eval_shape(
            lambda: cells.Cell([(2, 0)] * 2, 2, style, None, None, reduces=False, rngs=nnx.Rngs(0))
        )
    )
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (2, 4, 4, 4, 2))
    inputs = np.zeros((2, 2, 4))
    inputs[0, :, :2], inputs[1, :, :3] = rng.dirichlet(np.ones(2), 2), rng.dirichlet(np.ones(3), 2)
    choices = Choices(inputs, np.ones((2, 2, 1)), np.ones((2, 2, 1)))
    states = [*x]
    for number in range(2):
        states.append(np.einsum("oi,i...->...", inputs[number, :, : number + 2], states))
    shares = [(1 - inputs[1, 0, 2]) * (1 - inputs[1, 1, 2]), 1]
    ends = [
        share * np.maximum(state, 0) @ end.w.kernel[...]
        for share, state, end in zip(shares, states[2:], (cell.end0, cell.end1), strict=True)
    ]
    expected = cell.end_norm(jnp.asarray(sum(ends)))
    whole = Choices(*(np.stack([each, each]) for each in choices))
    unused = np.asarray(whole.unused)
    np.testing.assert_allclose(unused, [shares, shares], rtol=1e-12)
    _, found = cell(
        *jnp.asarray(x), jax.tree.map(jnp.asarray, choices), jnp.asarray(unused[0]), None
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)  # float64 rounding


def test_gates_scale_operands(images):
    """Their gradient is that of the loss to an operand's scale: central differences."""
    arc = "0 1 1 0 2 0 0 1 1 0 0 1 2 1 2 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "reduction_places", lambda layers, reductions: (1,))
        net = arrays(arc=arc, layers=0, ops=("avg3", "identity"))
    graph, state = nnx.split(net)

    @jax.jit
    @jax.value_and_grad
    def of(gates):
        net = nnx.merge(graph, state, copy=True)
        net.gates = nnx.data(gates)
        return jnp.sum(jnp.sin(net(images)))

    ones = jnp.ones((2, 2, 2))
    value, gradient = of(ones)
    assert float(value) == pytest.approx(
        float(jnp.sum(jnp.sin(jax.jit(lambda x: nnx.merge(graph, state, copy=True)(x))(images)))),
        rel=1e-12,
    )
    for place in np.ndindex(2, 2, 2):
        step = 1e-5
        high, low = (float(of(ones.at[place].add(sign * step))[0]) for sign in (1, -1))
        # The third derivative times step^2, and rounding over step.
        assert float(gradient[place]) == pytest.approx(
            (high - low) / (2 * step), rel=1e-5, abs=1e-7
        )
    assert np.all(np.abs(gradient) > 1e-4)


def choices_of(net, tokens):
    """One-hots, in float64 as all else here."""
    sizes = (net.space.nodes + 2, len(net.space.ops), len(net.space.precisions))
    return Choices(*(jnp.eye(size)[tokens[..., field]] for field, size in enumerate(sizes)))


@pytest.mark.slow
def test_a_mixture_of_one_hots_is_the_shared_net_of_their_architecture(shared, shared_run, images):
    tokens = architectures(shared.space)["mixed"]
    net = two_cells(shapes, arc="", mixes=True)
    graph, params, others = nnx.split(net, nnx.Param, ...)
    given, rest = (
        nnx.to_pure_dict(nnx.state(shared, kind)) for kind in (nnx.Param, nnx.Not(nnx.Param))
    )
    given, rest = jax.tree.map(jnp.array, (given, rest))
    nnx.replace_by_pure_dict(params, given)
    rest["choices"] = choices_of(net, tokens)._asdict()
    nnx.replace_by_pure_dict(others, rest)
    net = nnx.merge(graph, params, others)
    logits, behind, gradient = value_and_gradient(net)[0](images)
    expected, _, own = shared_run[0](images, tokens)
    extracted = (nnx.split(cells.extract(each, tokens)) for each in (net, shared))
    jax.tree.map(np.testing.assert_array_equal, *extracted)
    # float64 rounding, as above; what is not chosen is multiplied with 0.
    close = dict(rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(logits, expected, **close)
    own = paths.named_leaves(own)
    for path, leaf in paths.named_leaves(gradient).items():
        np.testing.assert_allclose(leaf, own.pop(path), err_msg=path, **close)
    assert not own
    # Every running average of every operand moves, at every input.
    before = paths.named_leaves(rest)
    for path, leaf in paths.named_leaves(behind).items():
        if path.endswith(("/mean", "/var")):
            assert not np.any(np.all(leaf == before[path], axis=-1)), path


def test_branches_are_computed_again_and_no_convolution_is_in_control_flow():
    """A CPU takes many times as long for a `lax.conv` in a branch or a loop."""
    net = two_cells(shapes, arc="", ops=cells.OPS)
    graph, params, others = nnx.split(net, nnx.Param, ...)

    def loss(params, others, images):
        return jnp.sum(nnx.merge(graph, params, others, copy=True)(images))

    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    text = jax.jit(jax.grad(loss)).lower(params, others, images).as_text()
    # The stem's, and the gradient of its kernel; what is for other platforms is not lowered.
    assert text.count("stablehlo.convolution") == 2 and "stablehlo.case" in text
    branches = [
        branch
        for equation in jax.jit(loss).trace(params, others, images).jaxpr.eqns
        if equation.primitive.name == "cond"
        for branch in equation.params["branches"]
    ]
    assert branches
    for branch in branches:
        assert any("prevent_cse" in equation.params for equation in branch.eqns)  # a checkpoint


def test_an_extracted_net_is_one_that_was_made(shared):
    tokens = architectures(shared.space)["mixed"]
    fixed = cells.extract(shared, tokens)
    made = two_cells(shapes, arc=shared.space.text(tokens))
    assert nnx.split(fixed)[0] == nnx.split(made)[0]
    sizes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(net))) for net in (fixed, made)]
    assert sizes[0] == sizes[1]
    with pytest.raises(UserError, match="has an architecture already"):
        cells.extract(fixed, tokens)
    with pytest.raises(UserError, match="arc: op 4 of operand 1 of node 0"):
        cells.extract(shared, tokens + np.array([0, 4, 0]))


@pytest.mark.slow
def test_statistics_of_one_batch_are_those_of_the_fixed_net(shared, images):
    tokens = architectures(shared.space)["float chain"]
    net, fixed = nnx.clone(shared), cells.extract(shared, tokens)
    net.architecture[...] = jnp.asarray(tokens)

    @jax.jit
    def evaluated(net, images):
        net = recalibrate.with_moments(net, layers.batch_moments(net, images))
        net.eval()
        return net(images)

    def run(net):
        graph, state = nnx.split(net)
        return jax.jit(lambda state: evaluated.__wrapped__(nnx.merge(graph, state), images))(state)

    # float64 rounding.
    np.testing.assert_allclose(run(net), run(fixed), rtol=1e-8, atol=1e-8)


def test_rules_and_calibration_leave_shared_layers_alone(shared, images):
    found = {path for path, _ in layers.layers(shared)}
    assert {"stem", "head", "cells/1/reduce/conv1", "cells/0/end1"} <= found
    assert not any("ways" in path for path in found)
    given = nnx.eval_shape(lambda net, x: layers.calibrate(net, x), shared, images)
    assert nnx.split(given)[0] == nnx.split(shared)[0]
    halves = layers.set_compute_dtype(shared, jnp.bfloat16)
    logits = nnx.eval_shape(lambda net, x: net(x), halves, images)
    assert logits.dtype == jnp.bfloat16


def test_parameters_are_counted():
    """sep 3x3: 2 (9 F + F^2 + 2 F); a 1x1 convolution and norm from C: C F + 2 F."""

    def separable(features, kernel):
        return 2 * (kernel**2 * features + features**2 + 2 * features)

    f, arc = 4, "0 0 1 1 2 2 0 4 0 3 1 4 2 0 2 0"
    net = shapes(features=f, arc=arc)
    # Reductions at 0 and 1: stem 3 F; features 2 F, 4 F, 4 F. The chain has one loose end.
    total = 27 * 3 * f + 2 * 3 * f
    for before, features in ((3 * f, 2 * f), (2 * f, 4 * f)):
        total += 2 * (before * features + 2 * features)  # the reduction, and of the first input
        total += 2 * separable(features, 3) + features**2 + 2 * features
    total += separable(4 * f, 3) + separable(4 * f, 5) + (4 * f) ** 2 + 2 * 4 * f
    total += 4 * f * 3 + 3
    # The third cell reads what the second one reduced, which has its shape.
    assert count(net) == total
    # A shared operand has all operations for each input; precisions share kernels and norms.
    style = operands.Style(Space(precisions=("float", "binarize")), "relu", "")
    operand = nnx.eval_shape(lambda: operands.Shared(3, f, style, nnx.Rngs(0)))
    assert count(operand) == 3 * (separable(f, 3) + separable(f, 5))


def test_reductions_are_where_the_source_has_them():
    assert cells.reduction_places(15) == (3, 7, 15)
    assert cells.reduction_places(6) == (1, 3, 6)
    assert cells.reduction_places(15, 2) == (5, 11)
    assert cells.reduction_places(1) == (0, 1)
    net = shapes(layers=6, arc="0 4 0 4 0 4 0 4 1 4 1 4 2 4 1 4", image_shape=(9, 8, 3))
    assert [cell.end_norm.num_features for cell in net.cells] == [2, 4, 4, 8, 8, 8, 16, 16]
    assert [cell.reduce is not None for cell in net.cells] == [i in (1, 3, 6) for i in range(8)]
    loose = [[getattr(cell, f"end{i}") is not None for i in range(2)] for cell in net.cells]
    assert loose == [[i in (0, 2, 4, 5, 7), True] for i in range(8)]


def test_a_factorized_reduction_is_its_formula():
    style = operands.Style(Space(), "relu", "float")
    net = cells.FactorizedReduction(2, 4, style, activates=True, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(0, 1, (2, 5, 4, 2))
    positive = np.maximum(x, 0)
    moved = np.zeros_like(positive)
    moved[:, :-1, :-1] = positive[:, 1:, 1:]
    halves = [
        part[:, ::2, ::2] @ np.asarray(conv.w.kernel[...], np.float64)
        for part, conv in ((positive, net.conv1), (moved, net.conv2))
    ]
    joined = np.concatenate(halves, -1)
    mean, var = joined.mean((0, 1, 2)), joined.var((0, 1, 2))
    # Parameters are float32.
    np.testing.assert_allclose(
        net(jnp.asarray(x, jnp.float32)),
        (joined - mean) / np.sqrt(var + 1e-5),
        rtol=1e-5,
        atol=1e-5,
    )


def test_poolings_are_of_what_there_is():
    x = np.random.default_rng(0).normal(0, 1, (2, 4, 3, 2))
    most, mean = np.empty_like(x), np.empty_like(x)
    for i, j in np.ndindex(4, 3):
        window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        most[:, i, j], mean[:, i, j] = window.max((1, 2)), window.mean((1, 2))
    np.testing.assert_array_equal(operations.max3(jnp.asarray(x)), most)
    # Shares are float32.
    np.testing.assert_allclose(operations.mean3(jnp.asarray(x)), mean, rtol=1e-6, atol=1e-6)


def test_operations_have_every_axis():
    """A quadratic, factorized or Winograd operation at 4 bits."""
    ops = (
        "sep3|neuron=ours|norm=branch",
        "conv3|algorithm=winograd:2,flex",
        "conv3|kernel=tucker:0.3",
        "dil5",
    )
    op = operations.parse(ops[1])
    found = op.make(8, "lsq:w4a4", nnx.relu, nnx.Rngs(0))
    assert found.conv.spec == layers.LayerSpec(algorithm="winograd:2,flex", precision="lsq:w4a4")
    separable = operations.parse(ops[0]).make(8, "lsq:w4a4", nnx.relu, nnx.Rngs(0))
    assert separable.pointwise1.spec == dataclasses.replace(
        separable.depthwise1.spec, precision="w=lsq:4"
    )
    style = operands.Style(Space(1, ops, ("lsq:w4a4", "float")), "relu", "")
    operand = nnx.eval_shape(lambda: operands.Shared(2, 8, style, nnx.Rngs(0)))
    assert operand.numbers == ((0, 1), (2, 3), (4, 5), (6, 7))
    cores = operand.ways[5].conv.w.kernel.variables
    assert all(core.shape[0] == 2 for core in cores.values())
    x = jnp.zeros((2, 4, 4, 8), jnp.float32)
    tokens = jnp.zeros((3,), jnp.int32)
    value = nnx.eval_shape(lambda operand, x, t: operand([x, x], t), operand, x, tokens)
    assert value.shape == x.shape


def test_drop_path_scales_what_it_keeps():
    arc = "0 4 0 3 0 3 0 4 0 4 0 3 0 3 0 4"
    net = arrays(
        arc=arc, drop_path=0.5, drop_path_steps=4, ops=("sep3", "avg3", "max3", "sep5", "identity")
    )
    for call in range(5):
        with jax.numpy_dtype_promotion("strict"):
            factor = np.asarray(net._drop(net.tokens, 5000))
        identity = np.zeros((3, 2, 2, 1), bool)
        identity[:, 0, 0] = identity[:, 1, 1] = True
        identity = np.broadcast_to(identity, factor.shape)
        assert np.all(factor[identity] == 1)
        for cell in range(3):
            keep = 1 - (cell + 1) / 3 * 0.5 * min((call + 1) / 4, 1)
            own = factor[cell][~identity[cell]]
            np.testing.assert_allclose(np.unique(own), [0, 1 / keep], rtol=1e-6)
            # Five deviations of the mean of 10,000 draws.
            assert abs(np.mean(own > 0) - keep) < 5 * np.sqrt(keep * (1 - keep) / own.size)
    net.eval()
    assert net._drop(net.tokens, 4) is None


def test_the_auxiliary_head_is_for_those_who_collect_it():
    net = shapes(arc="0 4 0 4 0 4 0 4 1 4 1 4 2 4 1 4", auxiliary=0.4, layers=2)
    assert net.auxiliary_at == 3 and net.places == (0, 1, 2)

    def run(net, x):
        with layers.collecting("auxiliary") as heads:
            logits = net(x)
        ((owner, own),) = heads
        assert owner.auxiliary == 0.4
        return logits, own

    with jax.numpy_dtype_promotion("strict"):
        logits, own = nnx.eval_shape(run, net, jnp.zeros((2, 8, 8, 3), jnp.float32))
    assert logits.shape == own.shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arc="0 0"), "arc has 2 numbers: 2 nodes in each of two cells need 16"),
        (dict(ops=("sep4",)), r"model\.ops='sep4' is not known.*did you mean"),
        (dict(ops=("sep3|neuron=our",)), r"model\.ops: 'sep3\|neuron=our': .*did you mean 'ours'"),
        (dict(ops=("sep3|precision=twn",)), "has no field 'precision'"),
        (dict(ops=("max3|neuron=ours",)), "'max3' has no layers that could have fields"),
        (dict(precisions=("ternery",)), r"model\.precisions: 'ternery': .*did you mean"),
        (dict(precisions=("c=lsq:4",)), r"model\.precisions: 'c=lsq:4': .*has no cores"),
        (dict(mix_precision="flaot"), r"model\.mix_precision: precision='flaot'"),
        (dict(stem_precision="4-bit"), r"model\.stem_precision: precision='4-bit'"),
        (dict(ops=("conv3|kernel=tt:2,lasso=0.1",)), r"kernel='tt:2,lasso.*leave out the lasso"),
        (dict(layers=0), r"model\.layers=0: must be at least 1"),
        (dict(reductions=1), r"model\.reductions=1: allowed 3, 2"),
        (dict(drop_path=1.0), r"model\.drop_path=1\.0: must be 0 or more, below 1"),
        (dict(auxiliary=-1.0), r"model\.auxiliary=-1\.0: must be 0 or more"),
        (dict(drop_path_steps=-1), r"model\.drop_path_steps=-1: must be at least 0"),
        (dict(arc="0 1 " * 8, mixes=True), r"model\.mixes=True: allowed of the shared net alone"),
        (dict(features=0), r"model\.features=0: must be at least 1"),
        (dict(layers=4, image_shape=(7, 8, 3)), r"halves images 3 times"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        shapes(**(dict(arc="") | options))


@pytest.mark.parametrize(
    ("precision", "spread"), [("ternarize/clipped", 1.0), ("kbit:w2a2", 1.0), ("lsq:w2a2", None)]
)
def test_kernels_of_a_fixed_range_start_all_over_it(precision, spread):
    """Whatever the width: at He et al.'s start a wide layer would be rounded to nothing but 0."""
    spec = LayerSpec(precision=precision)
    kernel = operations.pointwise(256, 256, spec, rngs=nnx.Rngs(0)).branches[0].kernel[...]
    if spread is None:
        assert abs(float(kernel.std()) - (2 / 256) ** 0.5) < 0.002
    else:
        assert -1 <= float(kernel.min()) < -0.99 and 0.99 < float(kernel.max()) <= 1
        assert abs(float((jnp.abs(kernel) <= 0.5).mean()) - 0.5) < 0.02
