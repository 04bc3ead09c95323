"""Units under JAX's transformations, in bfloat16 and on eight devices; what a backward keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_nets.ops import linear_maps, quadratic
from tests.ops.quadratic_test import NAMES, conv

CONV = linear_maps.ConvMap((1, 1), "SAME", (1, 1))
DENSE_UNIT = quadratic.Unit("ours", linear_maps.DenseMap(), jax.nn.silu)
CONV_UNIT = quadratic.Unit("ours", CONV, jax.nn.relu)
BOTH = pytest.mark.parametrize("apply", [quadratic.unit, quadratic.hybrid_unit])


def _arguments(x_shape, kernel_shape, dtype=np.float64, x_dtype=None):
    random = np.random.default_rng(0)
    features = kernel_shape[-1]

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    def norm():
        return quadratic.Norm(1 + normal(features) / 4, normal(features))

    scale = np.sqrt(np.prod(kernel_shape[:-1])).astype(dtype)
    return (
        normal(*x_shape).astype(x_dtype or dtype),
        tuple(normal(*kernel_shape) / scale for _ in range(3)),
        tuple(normal(features) for _ in range(3)),
        tuple(norm() for _ in range(3)),
        norm(),
    )


def _dense_arguments():
    return _arguments((5, 2), (2, 3))


def _gradients(apply, unit, arguments):
    def loss(arguments):
        y, statistics = apply(unit, *arguments)
        weights = np.random.default_rng(1).normal(size=y.shape)
        return jnp.sum(weights.astype(y.dtype) * y), (y, statistics)

    return jax.grad(loss, has_aux=True)(arguments)


def _assert_trees_close(ours, expected, **close):
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, other, **close, err_msg=jax.tree_util.keystr(path))


# Forward mode, higher derivatives, vmap


def test_forward_mode_of_unit_is_reverse_mode_of_hybrid(x64):
    arguments = _dense_arguments()
    random = np.random.default_rng(2)
    tangents = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), arguments)
    weights = jnp.asarray(random.normal(size=(5, 3)))

    def loss(apply, *arguments):
        return jnp.sum(weights * apply(DENSE_UNIT, *arguments)[0])

    @jax.jit
    def both(arguments, tangents):
        _, forward = jax.jvp(lambda *args: loss(quadratic.unit, *args), arguments, tangents)
        return forward, jax.grad(lambda args: loss(quadratic.hybrid_unit, *args))(arguments)

    forward, gradients = both(arguments, tangents)
    reverse = sum(map(jnp.vdot, jax.tree.leaves(gradients), jax.tree.leaves(tangents)))
    np.testing.assert_allclose(forward, reverse, rtol=1e-11)  # float64, some hundred terms


def test_hessian_of_unit_is_that_of_hybrid_in_reverse_mode(x64):
    x, *parameters = _dense_arguments()

    def loss(apply, x):
        return jnp.sum(apply(DENSE_UNIT, x, *parameters)[0] ** 3)

    hessian = jax.jit(jax.hessian(lambda x: loss(quadratic.unit, x)))(x)
    twice = jax.jit(jax.jacrev(jax.grad(lambda x: loss(quadratic.hybrid_unit, x))))(x)
    assert hessian.shape == (5, 2, 5, 2)
    np.testing.assert_allclose(twice, hessian, rtol=1e-9, atol=1e-9)  # float64, sizes up to 100
    assert jnp.max(jnp.abs(hessian)) > 1


def test_hybrid_unit_refuses_forward_mode(x64):
    x, *parameters = _dense_arguments()
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jvp(lambda x: quadratic.hybrid_unit(DENSE_UNIT, x, *parameters)[0], (x,), (x,))


@BOTH
def test_vmap_is_a_loop(apply, x64):
    x, *parameters = _dense_arguments()
    xs = jnp.stack([x, 2 * x + 1])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(apply(DENSE_UNIT, x, *parameters)[0] ** 2)))
    loop = jnp.stack([gradient(x) for x in xs])
    ours = jax.jit(jax.vmap(gradient))(xs)
    np.testing.assert_allclose(ours, loop, rtol=1e-10, atol=1e-12)  # float64


@BOTH
def test_checkpoint_changes_nothing(apply, x64):
    def again(unit, *arguments):
        return jax.checkpoint(lambda *arguments: apply(unit, *arguments))(*arguments)

    arguments = _dense_arguments()
    run = jax.jit(_gradients, static_argnums=(0, 1))
    expected = run(apply, DENSE_UNIT, arguments)
    ours = run(again, DENSE_UNIT, arguments)
    _assert_trees_close(ours, expected, rtol=1e-10, atol=1e-12)  # float64


# What is kept for the backward


def _kept_shapes(apply, unit, arguments):
    """Shapes of the arrays as large as the smaller of x and y that the gradient function holds."""
    x = arguments[0]

    def gradient_function(*arguments):
        return jax.vjp(jax.jit(lambda *arguments: apply(unit, *arguments)[0]), *arguments)[1]

    leaves = jax.tree.leaves(jax.eval_shape(gradient_function, *arguments))
    assert x.size < 3 * x.size // x.shape[-1] * arguments[1][0].shape[-1]
    return sorted(leaf.shape for leaf in leaves if leaf.size >= x.size)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_hybrid_keeps_x_alone(branch, outer):
    arguments = _arguments((4, 8, 8, 2), (3, 3, 2, 5), np.float32)
    arguments = (*arguments[:3], arguments[3] if branch else None, arguments[4] if outer else None)
    assert _kept_shapes(quadratic.hybrid_unit, CONV_UNIT, arguments) == [(4, 8, 8, 2)]
    # The oracle of this test: the same count sees what autodiff keeps.
    products = _kept_shapes(quadratic.unit, CONV_UNIT, arguments)
    assert products.count((4, 8, 8, 5)) >= (5 if branch and outer else 2)


@pytest.mark.parametrize("name", NAMES)
def test_hybrid_of_every_neuron_keeps_x_alone(name):
    case = dataclasses.replace(conv((8, 8), (1, 2), neuron=name, features=8), x_shape=(4, 8, 8, 4))
    assert _kept_shapes(quadratic.hybrid_unit, case.unit, case.arguments()) == [(4, 8, 8, 4)]


# bfloat16

BF16 = 2.0**-8  # relative rounding of 8 significant bits


@BOTH
def test_bfloat16_rounds_the_products_and_the_output_alone(apply):
    """Sums run in float32: a sum of 4096 ones would stop at 256 in bfloat16."""
    unit = quadratic.Unit("linear", linear_maps.DenseMap())
    ones = jnp.ones((2, 4096), jnp.bfloat16)
    y, _ = apply(unit, ones, (jnp.ones((4096, 1), jnp.float32),), None)
    assert y.dtype == jnp.bfloat16
    assert y.tolist() == [[4096.0], [4096.0]]

    # a * b + c with a = b = 1 + 3/128 and c = -(1 + 6/128): in bfloat16 a * b loses its last bits
    # and the answer is 0.
    a, c = jnp.full((1, 1), 1 + 3 / 128), jnp.full((1, 1), -(1 + 6 / 128))
    unit = quadratic.Unit("ours", linear_maps.DenseMap())
    y, _ = apply(unit, jnp.ones((1, 1), jnp.bfloat16), (a, a, c), None)
    assert y.item() == 9 / 128**2


def test_bfloat16_hybrid_is_autodiff():
    arguments = _arguments((4, 5, 5, 3), (3, 3, 3, 4), np.float32, jnp.bfloat16)
    run = jax.jit(_gradients, static_argnums=(0, 1))
    expected, (y, statistics) = run(quadratic.unit, CONV_UNIT, arguments)
    ours, (hybrid_y, hybrid_statistics) = run(quadratic.hybrid_unit, CONV_UNIT, arguments)
    assert y.dtype == hybrid_y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, hybrid_y)
    assert {leaf.dtype for leaf in jax.tree.leaves(hybrid_statistics)} == {jnp.dtype("float32")}
    _assert_trees_close(hybrid_statistics, statistics, rtol=1e-6)  # float32, the same operations
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        # Both sides round z, dz and the convolutions' results to bfloat16, from float32 values that
        # agree: a rounding may fall the other way, or be left out by XLA, in either.
        leaf, other = leaf.astype(jnp.float32), other.astype(jnp.float32)
        atol = 2 * BF16 * max(1.0, float(jnp.max(jnp.abs(other))))
        np.testing.assert_allclose(leaf, other, rtol=0, atol=atol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_bfloat16_hybrid_of_every_neuron_is_as_near_float32_as_autodiff(name):
    case = conv((4, 5), (2, 2), neuron=name)
    x, *parameters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), case.arguments())
    x = x.astype(jnp.bfloat16)
    run = jax.jit(_gradients, static_argnums=(0, 1))
    wide, _ = run(quadratic.unit, case.unit, (x.astype(jnp.float32), *parameters))

    def outcome(apply):
        gradients, (y, _) = run(apply, case.unit, (x, *parameters))
        assert gradients[0].dtype == y.dtype == jnp.bfloat16
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(wide), strict=True)
        return y, sum(
            float(jnp.sum((ours.astype(jnp.float32) - leaf) ** 2)) for ours, leaf in pairs
        )

    (y, error), (hybrid_y, hybrid_error) = map(outcome, (quadratic.unit, quadratic.hybrid_unit))
    np.testing.assert_array_equal(y, hybrid_y)
    # In norm they differ by a third at most: a rounding may fall the other way in either.
    assert 0 < hybrid_error < 2**2 * error


def test_bfloat16_is_near_float32():
    narrow = _arguments((4, 5, 5, 3), (3, 3, 3, 4), np.float32, jnp.bfloat16)
    wide = (narrow[0].astype(jnp.float32), *narrow[1:])
    y = quadratic.hybrid_unit(CONV_UNIT, *narrow)[0].astype(jnp.float32)
    expected = quadratic.hybrid_unit(CONV_UNIT, *wide)[0]
    # Roundings of the kernels, of z and of y, each at most BF16 of values of size 1.
    assert jnp.linalg.norm(y - expected) < 4 * BF16 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_may_be_narrower_than_the_input(dtype, x64):
    x, *parameters = _dense_arguments()
    parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
    gradients, (y, _) = _gradients(quadratic.hybrid_unit, DENSE_UNIT, (x, *parameters))
    assert y.dtype == jnp.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients[1:])} == {jnp.dtype(dtype)}


# Eight devices


@BOTH
def test_sharded_over_the_batch_is_unsharded(apply, x64):
    arguments = _arguments((8, 3, 3, 2), (3, 3, 2, 4))

    def run(*arguments):
        return _gradients(apply, CONV_UNIT, arguments)

    def again(*arguments):
        remembering_less = jax.checkpoint(lambda *args: apply(CONV_UNIT, *args))
        return _gradients(lambda _, *args: remembering_less(*args), None, arguments)

    expected = jax.jit(run)(*arguments)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_batch = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = (
        jax.device_put(arguments[0], over_batch),
        *jax.device_put(arguments[1:], everywhere),
    )
    for function in (run, again):
        sharded = jax.jit(function)(*spread)
        _assert_trees_close(sharded, expected, rtol=1e-10, atol=1e-12)  # float64 in another order
        (gradients, (y, _)) = sharded
        assert y.sharding.is_equivalent_to(over_batch, y.ndim)
        assert gradients[0].sharding.is_equivalent_to(over_batch, y.ndim)


@pytest.mark.parametrize("name", NAMES)
def test_every_neuron_sharded_and_checkpointed_is_itself(name, x64):
    case = dataclasses.replace(conv((3, 3), (2, 1), neuron=name), x_shape=(8, 3, 3, 4))
    arguments = case.arguments()

    def again(*arguments):
        remembering_less = jax.checkpoint(
            lambda *arguments: quadratic.hybrid_unit(case.unit, *arguments)
        )
        return _gradients(lambda _, *args: remembering_less(*args), None, arguments)

    expected = jax.jit(_gradients, static_argnums=(0, 1))(quadratic.unit, case.unit, arguments)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_batch = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    (gradients, (y, statistics)) = jax.jit(again)(
        jax.device_put(arguments[0], over_batch), *jax.device_put(arguments[1:], everywhere)
    )
    _assert_trees_close((gradients, (y, statistics)), expected, rtol=1e-10, atol=1e-12)
    assert y.sharding.is_equivalent_to(over_batch, y.ndim)
    assert gradients[0].sharding.is_equivalent_to(over_batch, y.ndim)
