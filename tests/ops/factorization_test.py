"""Factorized kernels against their definitions, and every way to run them against the dense map."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.ops import factorization, linear_maps
from efficient_nets.ops.factorization import (
    decomposition,
    execution,
    forms,
    modes,
    network,
    selection,
    slicing,
)

CONV, DENSE = (3, 3, 4, 6), (8, 12)
TEXTS = {form: f"{form}:2" for form in forms.FORMS} | {
    "tt, split": "tt:2,layout=split",
    "tt, axes": "tt:3,layout=axes,order=1",
    "tr, axes": "tr:2,layout=axes,order=1",
    "ht, split": "ht:2,layout=split,order=2",
    "tucker, axes": "tucker:2,layout=axes",
    "tucker, order 2": "tucker:2,order=2",
    "bt, blocks": "bt:2,blocks=3,layout=split,order=1",
    "padded": "tt:2,order=2,in=2x5,out=7x2",
}


def network_of(text, shape=CONV):
    return factorization.parse(text).network(shape)


def cores_of(net, seed=0, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(seed), len(net.cores))
    pairs = zip(keys, net.shapes.items(), strict=True)
    return {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in pairs}


# Reconstruction


def elements(net):
    """Positions of the modes, and where in the kernel they are; none for what is cut off."""
    window, inputs, features = (*net.kernel_shape[:-2],), *net.kernel_shape[-2:]
    for position in itertools.product(*(range(net.size(mode)) for mode in net.modes)):
        at = dict(zip(net.modes, position, strict=True))

        def number(names, at=at):
            found = 0
            for name in names:
                found = found * net.size(name) + at[name]
            return found

        i, o, k = map(number, (net.inputs, net.outputs, net.spatial))
        if i < inputs and o < features:
            yield at, (*np.unravel_index(k, window), i, o)


def defined(form, net, cores, at):
    """One element by the formula of its form, in Python's numbers."""

    def part(name):
        """A core with the modes of this element taken, its bonds left."""
        index = tuple(at[i] if i in at else slice(None) for i in net.indices[name])
        return np.asarray(cores[name])[index]

    names = [name for name, _ in net.cores]
    if form == "cp":
        rank = net.size("r")
        return sum(math.prod(part(name)[r] for name in names) for r in range(rank))
    if form in ("tucker", "bt"):
        total = 0.0
        for block in range(net.size("n") if form == "bt" else 1):
            *factors, core = (part(n)[block] if form == "bt" else part(n) for n in names)
            for position in np.ndindex(*core.shape):
                pairs = zip(factors, position, strict=True)
                total += core[position] * math.prod(factor[j] for factor, j in pairs)
        return total
    if form == "tt":
        first, *middle, last = map(part, names)
        for core in middle:
            first = [sum(a * b for a, b in zip(first, row, strict=True)) for row in core.T]
        return sum(a * b for a, b in zip(first, last, strict=True))
    if form == "tr":
        return np.trace(functools.reduce(np.matmul, map(part, names)))
    leaves = len([name for name in names if name.startswith("leaf")])

    def node(first, last):  # of the hierarchical form: a vector over the bond above
        if last - first == 1:
            return part(f"leaf{first}")
        middle = (first + last + 1) // 2
        left, right = node(first, middle), node(middle, last)
        root = (first, last) == (0, leaves)
        transfer = part("root" if root else f"node{first}_{last}")
        transfer = transfer[None] if root else transfer
        found = [
            sum(t[a, b] * left[a] * right[b] for a, b in np.ndindex(*t.shape)) for t in transfer
        ]
        return found[0] if root else found

    return node(0, leaves)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_kernels_are_what_their_form_says(text, x64):
    net = network_of(text)
    cores = cores_of(net)
    kernel = np.asarray(factorization.reconstruct(net, cores))
    assert kernel.shape == CONV
    form, seen = text.partition(":")[0], 0
    for at, where in itertools.islice(elements(net), 0, None, 7):
        # Sums of some hundred products in float64.
        np.testing.assert_allclose(kernel[where], defined(form, net, cores, at), rtol=1e-11)
        seen += 1
    assert seen >= math.prod(CONV) // 7


def test_counts_are_those_of_the_papers():
    """The reference's table: R (C + T + 2k); Ca + abk^2 + bT; sums over cores; R^2 (...)."""
    k, c, t = 3, 64, 128
    shape = (k, k, c, t)
    assert network_of("cp:5", shape).params == 5 * (c + t + 2 * k)
    assert network_of("tucker:8x16", shape).params == c * 8 + 8 * 16 * k * k + 16 * t
    assert network_of("tt:2,in=8x8,out=8x16", shape).params == k * k * 2 + 2 * 64 * 2 + 2 * 128
    of_ring = network_of("tr:3,in=8x8,out=8x16", shape).params
    assert of_ring == 9 * (8 + 8 + 8 + 16 + k * k)
    # Two leaves of 64 and 128 numbers and the window's, a transfer and the root.
    tree = network_of("ht:2,in=8x8,out=8x16", shape)
    assert tree.params == 2 * (k * k + 64 + 128) + 2 * 2 * 2 + 2 * 2
    blocks = network_of("bt:2,blocks=4,in=8x8,out=8x16", shape).params
    assert blocks == 4 * (2**3 + 2 * (k * k + 64 + 128))
    # The TT-LSTM of the reference: gates fused into the first mode of features.
    lstm = network_of("tt:4,in=8x20x20x18,out=16x4x4x4", (57600, 1024))
    assert lstm.params == 3360 and lstm.dense_params // lstm.params == 17554


# Execution


def direct(shape, strides=1, padding="SAME"):
    rank = len(shape) - 2
    if not rank:
        return linear_maps.DenseMap(), jnp.linspace(-1, 1, 5 * shape[0]).reshape(5, -1)
    found = linear_maps.ConvMap((strides,) * rank, padding, (1,) * rank, 1, shape[:-2])
    size = (2, *(5, 6, 4)[:rank], shape[-2])
    return found, jnp.sin(jnp.arange(math.prod(size))).reshape(size)


def mapped():
    """Each text for a convolution, each form for a dense layer too; placings but for the best."""
    padded = "tt:2,order=2,in=3x3,out=7x2"
    cases = [(text, CONV, 1) for text in TEXTS.values()]
    cases += [(TEXTS[form], DENSE, 1) for form in forms.FORMS] + [(padded, DENSE, 1)]
    slow = [pytest.param(text, CONV, 8, marks=pytest.mark.slow) for text in TEXTS.values()]
    return cases + slow


@pytest.mark.parametrize(("text", "shape", "placed"), mapped())
def test_any_placing_of_cores_is_the_dense_map(text, shape, placed, x64):
    net = network_of(text, shape)
    linear_map, x = direct(shape)
    cores = cores_of(net)

    def whole(x, cores):
        return linear_map(x, [factorization.reconstruct(net, cores)])

    expected, back = jax.vjp(whole, x, cores)
    gradients = back(expected)
    positions = (x.size // shape[-2], expected.size // shape[-1])
    best = execution.cheapest(net, positions)
    y, back = jax.vjp(functools.partial(execution.run, net, best, linear_map), x, cores)
    # Sums of some hundred products in float64, in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(y, expected)
    jax.tree.map(close, back(expected), gradients)
    placings = list(execution._placings(net))
    for placing in placings[:: max(len(placings) // placed, 1)]:
        found = execution._placed(net, placing, positions)
        close(execution.run(net, found, linear_map, x, cores), expected)


@pytest.mark.parametrize("text", ["tt:2", "bt:2", "bt:2,blocks=3,layout=split,order=1"])
def test_a_window_kernel_that_passing_indices_share(text, x64):
    """They are groups of a convolution that makes several outputs of each."""
    net = network_of(text)
    linear_map, x = direct(CONV)
    cores = cores_of(net)
    expected = linear_map(x, [factorization.reconstruct(net, cores)])
    placings = [
        placing
        for placing in execution._placings(net)
        if (flow := execution._flow(net, *placing)).passing
        and net.size(*flow.contracted) == 1
        and net.size(*flow.grouped, *flow.made) > 1
    ]
    assert placings
    for placing in placings[:3]:
        found = execution._placed(net, placing, (60, 60))
        y = execution.run(net, found, linear_map, x, cores)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("text", ["bt:2,layout=split,order=1", "tr:3,order=1"])
def test_a_window_with_groups_and_sums(text, x64):
    """A bond in all three parts is a group, beside bonds that the window sums over and makes."""
    net = network_of(text)
    linear_map, x = direct(CONV)
    cores = cores_of(net)
    placings = [
        placing
        for placing in execution._placings(net)
        if (flow := execution._flow(net, *placing)).grouped
        and flow.contracted
        or flow.passing
        and flow.contracted
        and flow.made
    ]
    assert placings
    expected = linear_map(x, [factorization.reconstruct(net, cores)])
    for placing in placings:
        found = execution._placed(net, placing, (60, 60))
        y = execution.run(net, found, linear_map, x, cores)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "strides", "padding"),
    [(CONV, 2, ((1, 1), (0, 2))), ((3, 4, 6), 1, "VALID"), ((2, 3, 2, 4, 6), 2, "SAME")],
    ids=["strided", "1-D", "3-D"],
)
@pytest.mark.parametrize("text", ["cp:3", "tucker:2", "tr:2", "tt:2", "tucker:1,layout=axes"])
def test_any_convolution(text, shape, strides, padding, x64):
    net = network_of(text, shape)
    linear_map, x = direct(shape, strides, padding)
    cores = cores_of(net)
    expected = linear_map(x, [factorization.reconstruct(net, cores)])
    assert expected.shape[1:-1] == linear_map.output_size(x)
    kernels = [factorization.Factored(net, "factorized", cores)] * 2
    found = factorization.factorized_map(linear_map, x, kernels)
    np.testing.assert_allclose(found, jnp.concatenate([expected] * 2, -1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", forms.FORMS)
def test_parts_along_any_index_are_the_dense_map(form, x64):
    net = network_of(TEXTS[form], DENSE)
    linear_map, x = direct(DENSE)
    cores = cores_of(net)
    whole = execution.cheapest(net, (5, 5))

    def mapped(plan):
        y, back = jax.vjp(functools.partial(execution.run, net, plan, linear_map), x, cores)
        return y, back(jnp.sin(y))

    expected = linear_map(x, [factorization.reconstruct(net, cores)])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(mapped(whole)[0], expected)
    expected, uneven = mapped(whole), 0
    for index, size in net.sizes:
        if numbers := list(slicing.numbers_of_parts(size)):
            parts = max(numbers, key=lambda parts: size % parts)
            uneven += size % parts > 0
            plan = dataclasses.replace(whole, cut=index, parts=parts)
            jax.tree.map(close, mapped(plan), expected)
    assert uneven


def test_parts_of_any_type_and_number_of_rows():
    net = network_of("tt:4", (64, 64))
    cores = {name: jnp.ones(shape, jnp.float32) for name, shape in net.shapes.items()}
    for index in ("r1", "i0", "o0"):
        plan = dataclasses.replace(execution.cheapest(net, (5, 5)), cut=index, parts=2)
        x = jnp.ones((2, 5, 64), jnp.bfloat16)
        run = functools.partial(execution.run, net, plan, linear_maps.DenseMap())
        assert run(x, cores).dtype == jnp.bfloat16
        assert run(x[:, :0], cores).shape == (2, 0, 64)


@pytest.mark.parametrize("index", ["r1", "o0"])
def test_parts_run_on_each_device(index):
    net = network_of("tt:4", (64, 64))
    cores = {name: jnp.ones(shape, jnp.float32) for name, shape in net.shapes.items()}
    plan = dataclasses.replace(execution.cheapest(net, (4, 4)), cut=index, parts=2)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    run = functools.partial(execution.run, net, plan, linear_maps.DenseMap())
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows
    )
    x = jnp.arange(8 * 64, dtype=jnp.float32).reshape(8, 64)
    # Whole numbers below 2^24, so exact.
    np.testing.assert_array_equal(jax.jit(mapped)(x % 7, cores), run(x % 7, cores))


def test_a_kernel_that_fits_is_not_made_way_for_slower_parts():
    plan = factorization.plan(network_of("tt:4", (256, 1024)), "auto", (1024, 1024))
    assert plan.parts == 1
    held = network_of("tt:16", (512, 2048))
    assert factorization.plan(held, "auto", (512, 512)).parts > 1
    assert factorization.makes_kernel(held, "auto", (512, 512))
    assert not factorization.makes_kernel(held, "factorized", (512, 512))


def test_a_matrix_product_holds_no_more_than_the_dense_one():
    cp = network_of("cp:1638,layout=split,order=3,in=8x8x16,out=8x8x16", (1024, 1024))
    plan = factorization.plan(cp, "auto", (128, 128))
    assert plan.cut == "r" and plan.parts > 1
    few = network_of("cp:16,layout=split,order=3,in=8x8x16,out=8x8x16", (1024, 1024))
    assert factorization.plan(few, "auto", (128, 128)).parts == 1
    for text in ("tt:23x59,in=8x8x16,out=8x8x16", "cp:1638,layout=split,in=8x8x16,out=8x8x16"):
        net = network_of(text, (1024, 1024))
        cores = {name: jnp.ones(shape, jnp.float32) for name, shape in net.shapes.items()}
        kernels = [factorization.Factored(net, "auto", cores)]

        @jax.jit
        def gradients(x, kernels):
            y, back = jax.vjp(
                functools.partial(factorization.factorized_map, linear_maps.DenseMap()), x, kernels
            )
            return back(y)

        x = jax.ShapeDtypeStruct((128, 1024), jnp.float32)
        planned = gradients.lower(x, kernels).compile().memory_analysis().temp_size_in_bytes
        # Two are the dense kernel and its gradient, with JAX 0.12; 0.10 plans up to 2.3 MiB more.
        # Whole, the train takes 3.4 of them and CP 8.
        assert planned <= 4 * 2.5 * net.dense_params


def test_the_plan_is_that_of_the_papers():
    """Lebedev's 1x1, depthwise, 1x1; Kim's 1x1, kxk, 1x1; multiplications by their formulas."""
    positions, c, t, k = 4096, 64, 128, 9
    found = factorization.plan(network_of("cp:16", (3, 3, c, t)), "auto", (positions, positions))
    assert found.front == ("factor_i0",) and found.behind == ("factor_o0",)
    assert found.cost.macs == positions * 16 * (c + k + t) + k * 16
    found = factorization.plan(
        network_of("tucker:16x32", (3, 3, c, t)), "auto", (positions, positions // 4)
    )
    assert (found.front, found.window) == (("factor_i0",), ("core",))
    assert found.cost.macs == positions * 16 * c + positions // 4 * (16 * 32 * k + 32 * t)
    ranks = network_of("tucker:64x128", (3, 3, c, t))
    assert factorization.plan(ranks, "auto", (positions, positions)).reconstructs
    assert not factorization.plan(ranks, "factorized", (positions, positions)).reconstructs
    grouped = factorization.plan(ranks, "factorized", (positions, positions), grouped=True)
    assert grouped.reconstructs


# Scale


@pytest.mark.parametrize("form", forms.FORMS)
def test_core_scale_gives_the_variance(form):
    """In the mean over draws: 4000 of them, each a heavy-tailed product, leave a few percent."""
    text = TEXTS[form]
    net = network_of(text)

    def mean_square(key):
        scale = factorization.core_scale(net, 0.25)
        keys = jax.random.split(key, len(net.cores))
        pairs = zip(keys, net.shapes.items(), strict=True)
        cores = {name: scale * jax.random.normal(k, shape) for k, (name, shape) in pairs}
        return jnp.mean(jnp.square(factorization.reconstruct(net, cores)))

    keys = jax.random.split(jax.random.key(0), 4000)
    found = jnp.mean(jax.lax.map(mean_square, keys, batch_size=500))
    np.testing.assert_allclose(found, 0.25, rtol=0.1)


# Decomposition


def error(form, net, kernel):
    cores = jax.jit(functools.partial(factorization.decompose, form, net))(kernel)
    return float(factorization.relative_error(net, cores, kernel)), cores


@pytest.mark.parametrize(
    "text",
    [
        *("cp:36", "tucker:100", "tt:100", "ht:100", "bt:100", "tt:100,layout=axes"),
        "ht:100,layout=split",
        "tucker:100,layout=axes,order=2",
    ],
)
def test_full_rank_is_exact(text):
    kernel = jax.random.normal(jax.random.key(0), CONV)
    form = text.partition(":")[0]
    # Float32: some ten products of orthogonal matrices.
    assert error(form, network_of(text), kernel)[0] < 1e-5


def test_a_ring_of_a_trains_ranks_is_exact():
    kernel = jax.random.normal(jax.random.key(0), CONV)
    net = network_of("tr:1x4x6,order=1")
    assert error("tr", net, kernel)[0] < 1e-5


@pytest.mark.parametrize("text", [*TEXTS.values()], ids=TEXTS.keys())
def test_kernels_of_low_rank_are_found(text):
    """To rounding, or where a method repeats but for what more sweeps would gain."""
    net = network_of(text)
    kernel = factorization.reconstruct(net, cores_of(net, 3, jnp.float32))
    form = text.partition(":")[0]
    found, cores = error(form, net, kernel)
    assert found < {"cp": 0.05, "tr": 0.05, "bt": 0.15}.get(form, 1e-5)


@pytest.mark.parametrize("text", ["cp:6", "tucker:3", "tt:3", "tr:3,order=1"])
def test_decomposed_cores_learn_alike(text):
    """The largest eigenvalues of J'J, J being the kernel's derivative by one core, are the same."""
    net = network_of(text)
    kernel = jax.random.normal(jax.random.key(4), CONV)
    _, cores = error(text.partition(":")[0], net, kernel)
    rates = []
    for name, core in cores.items():
        jacobian = jax.jacobian(
            lambda core, name=name: network.tensor(net, cores | {name: core}).ravel()
        )(core)
        jacobian = np.asarray(jacobian).reshape(len(jacobian), -1)
        rates.append(np.linalg.norm(jacobian, 2) ** 2)
    # Twenty iterations, for eigenvalues that may lie close.
    np.testing.assert_allclose(rates, rates[0], rtol=0.1)


@pytest.mark.parametrize("form", ["cp", "tucker", "tt", "ht"])
def test_a_matrix_is_cut_where_its_singular_values_are(form):
    """Eckart and Young: the error of rank r is what the other singular values have."""
    kernel = jax.random.normal(jax.random.key(1), DENSE)
    values = np.linalg.svd(kernel, compute_uv=False)
    text = f"{form}:3,layout=split,order=1"
    found, _ = error(form, network_of(text, DENSE), kernel)
    best = math.sqrt(np.sum(values[3:] ** 2) / np.sum(values**2))
    # ALS ends near, the others at it.
    np.testing.assert_allclose(found, best, rtol=1e-2 if form == "cp" else 1e-5)


@pytest.mark.parametrize("text", ["cp:24", "cp:80", "tr:4,order=1", "bt:3,layout=split,order=1"])
def test_kernels_whose_modes_fade_are_found(text):
    """As those of trained nets do: normal equations nearly singular, of 'cp:80' in float32 so."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 16, 16))
    for axis, size in enumerate(kernel.shape):
        fading = np.geomspace(1, 1e-3, size)
        kernel = kernel * fading.reshape([-1 if i == axis else 1 for i in range(4)])
    found, _ = error(
        text.partition(":")[0], network_of(text, kernel.shape), jnp.asarray(kernel, jnp.float32)
    )
    assert found < 0.3


def test_large_rings_are_split_alone():
    net = network_of("tr:30,order=1", (3, 3, 32, 32))
    kernel = jax.random.normal(jax.random.key(0), net.kernel_shape)
    found, cores = error("tr", net, kernel)
    assert found < 1 and all(np.all(np.isfinite(core)) for core in cores.values())


def test_repeating_improves_on_splitting():
    kernel = jax.random.normal(jax.random.key(2), CONV)
    for form, text in (("tucker", "tucker:2"), ("tr", "tr:3,order=1")):
        net = network_of(text)
        once = decomposition.split(net, net.padded_kernel(kernel))
        first = float(factorization.relative_error(net, once, kernel))
        assert error(form, net, kernel)[0] < first


def test_an_empty_kernel_has_empty_cores():
    for text in TEXTS.values():
        net = network_of(text)
        _, cores = error(text.partition(":")[0], net, jnp.zeros(CONV))
        assert all(np.all(np.isfinite(core)) for core in cores.values())
        assert np.all(factorization.reconstruct(net, cores) == 0)


# Ranks and modes


@pytest.mark.parametrize("shape", [(3, 3, 32, 64), (64, 128)], ids=["conv", "dense"])
@pytest.mark.parametrize("form", forms.FORMS)
def test_a_share_is_used_up_and_not_exceeded(form, shape):
    for share in (0.1, 0.5):
        net = network_of(f"{form}:{share}", shape)
        assert 0.5 * share < net.params / net.dense_params <= share
        if forms.FORMS[form].proportional:
            continue  # shares of bonds that round differently leave some
        bonds = [bond for bond in net.bonds if bond != "n"]
        more = net.with_sizes({bond: net.size(bond) + 1 for bond in bonds})
        assert more.params > share * net.dense_params
    assert network_of(f"{form}:0.000001", shape).params > 0


def test_no_bond_is_larger_than_what_it_can_span():
    net = network_of("tt:1000")
    for bond in net.bonds:
        (left, right) = [of for _, of in net.cores if bond in of]
        for indices in (left, right):
            assert net.size(bond) <= net.size(*(i for i in indices if i != bond))
    assert network_of("cp:1000").size("r") == 1000


def test_energy_keeps_its_share():
    kernel = np.random.default_rng(0).normal(size=CONV) * np.geomspace(1, 1e-3, CONV[-1])
    for form in ("tucker", "tt", "ht"):
        made = factorization.parse(f"{form}:energy=0.95")
        net = factorization.of_kernel(made.network(CONV), kernel, made.rank, made.energy)
        found, _ = error(form, net, jnp.asarray(kernel, jnp.float32))
        assert found**2 <= 0.05 and net.params < 1.5 * net.dense_params
        assert any(net.size(bond) < CONV[-1] for bond in net.bonds)
    for form in ("cp", "tr", "bt"):
        made = factorization.parse(f"{form}:energy=0.95")
        net = factorization.of_kernel(made.network(CONV), kernel, made.rank, made.energy)
        assert all(net.size(bond) >= 1 for bond in net.bonds)


def test_variational_bayes_finds_the_rank_under_noise():
    rng = np.random.default_rng(0)
    for rank in (0, 1, 4, 9):
        signal = rng.normal(size=(40, rank)) @ rng.normal(size=(rank, 60))
        assert selection.evbmf_rank(signal + 0.3 * rng.normal(size=(40, 60))) == rank
    assert selection.evbmf_rank(np.zeros((3, 4))) == 0


def test_modes_are_balanced():
    assert modes.balanced(784, 2) == (28, 28)
    assert modes.balanced(784, 3) == (14, 8, 7)
    assert modes.balanced(17, 2) == (6, 3)
    assert modes.balanced(1, 3) == (1, 1, 1)
    for size, order in itertools.product(range(1, 200), (1, 2, 3, 4)):
        found = modes.balanced(size, order)
        assert len(found) == order and size <= math.prod(found) <= 1.25 * size + 1


# The spec


def test_short_and_long_forms():
    given = dict(form="tt", rank=(4, 6), order=2, in_modes=(2, 4), run="factorized", always=True)
    made = factorization.parse(given)
    text = "tt:4x6,order=2,in=2x4,run=factorized,always"
    assert made == factorization.parse(text) and str(made) == text
    for text in (*TEXTS.values(), "cp:evbmf", "tt:energy=0.9", "bt:0.25,blocks=5", "tr:3"):
        made = factorization.parse(text)
        assert factorization.parse(str(made)) == made == factorization.parse(made)
    assert factorization.parse("tucker:same").rank == 1.0
    assert factorization.parse("dense") == "dense"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("t", "kernel='t' is not known: allowed bt, cp, dense"),
        ("tt", "give a rank behind a form"),
        ("dense:3", "give a rank behind a form"),
        ("tt:x", "'x' is no rank; give one such as 8"),
        ("tt:many", "'many' is no rank"),
        ("tt:0", "kernel.rank=0: allowed a whole number"),
        ("tt:-0.5", "kernel.rank=-0.5"),
        ("tt:energy=2", "kernel.energy=2.0 with rank='energy'"),
        ("tt:8,energy", "'energy' is not understood; allowed are order="),
        ("tt:8,order=2,order=3", "'order' is given twice"),
        ("tt:8,in=2x,order=2", "'2x' is no list"),
        ("tt:8,in=2x2,order=3", r"in_modes=\(2, 2\): order=3 asks for as many"),
        ("tt:8,layout=pairs", "kernel.layout='pairs' is not known.*did you mean 'paired'"),
        ("tt:8,run=fast", "kernel.run='fast' is not known: allowed auto, factorized"),
        ("tt:8,blocks=2", "blocks=2 with form='tt'"),
        (dict(form="tt"), "kernel has no 'rank'"),
        (dict(form="tt", rank=8, ranks=2), "kernel has no field 'ranks'.*did you mean 'rank'"),
        (dict(form="tt", rank=True), "kernel.rank=True"),
        (dict(form="tt", rank=2, always=1), "kernel.always=1: allowed True, False"),
        (dict(form="tt", rank=2, order=9), "kernel.order=9: allowed 0"),
        (7, "kernel=7 is not known"),
    ],
)
def test_errors_of_the_spec(given, match):
    with pytest.raises(UserError, match=match):
        factorization.parse(given)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tt:2x2", r"rank=\(2, 2\): give one number, or one for each of the bonds r1, r2, r3"),
        ("tt:2,in=2x1,out=2x3", r"kernel.in_modes=\(2, 1\): they make up less than 4"),
        ("tt:2,in=2x2,out=6", "layout='paired' takes as many"),
    ],
)
def test_errors_of_networks(text, match):
    with pytest.raises(UserError, match=match):
        network_of(text)


def test_a_dense_kernel_in_one_pair_is_refused():
    with pytest.raises(UserError, match="one core is the kernel itself"):
        network_of("tt:2,order=1", DENSE)
    assert isinstance(network_of("tt:2,order=1"), network.Network)
