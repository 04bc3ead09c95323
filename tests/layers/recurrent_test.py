"""LSTM and GRU: their formulas, kernels of every form, quantizers, observers, costs, errors."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_nets import analysis, deploy, layers
from efficient_nets.errors import UserError
from efficient_nets.layers import CELLS, GRU, LSTM, LayerSpec, calibrate, collecting, convert
from efficient_nets.layers import precision as precisions
from efficient_nets.layers.linear import layer_norm_act

each_cell = pytest.mark.parametrize("name", CELLS)
FORMS = ["tt:2,order=2", "tr:2", "ht:2,order=2", "bt:2,blocks=2", "tucker:2"]
# float32 rounding of sums of some ten products, over four steps.
close = dict(rtol=1e-4, atol=1e-5)


def make(name="lstm", in_features=6, features=8, hidden="dense", input="dense", **options):  # noqa: A002
    specs = dict(input_spec=LayerSpec(**_axes(input)), hidden_spec=LayerSpec(**_axes(hidden)))
    return CELLS[name](in_features, features, **specs, **options, rngs=nnx.Rngs(0))


def _axes(given):
    return dict(kernel=f"{given},always" if given != "dense" else given)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def single(x):
    return jnp.asarray(x, jnp.float32)


X = draws(2, 4, 6)  # two sequences of four steps
WEIGHTS = single(draws(2, 4, 8, seed=5))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def of_lstm(z, u, h, c):
    """One unit: its four numbers from the input, four from the state, in Python's floats."""
    (zi, zf, zg, zo), (ui, uf, ug, uo) = z, u
    c = sigmoid(zf + uf + 1) * c + sigmoid(zi + ui) * math.tanh(zg + ug)
    return sigmoid(zo + uo) * math.tanh(c), c


def of_gru(z, u, h):
    (zr, zz, zn), (ur, uz, un) = z, u
    update = sigmoid(zz + uz)
    return ((1 - update) * math.tanh(zn + sigmoid(zr + ur) * un) + update * h,)


@pytest.mark.parametrize(("name", "unit"), [("lstm", of_lstm), ("gru", of_gru)])
def test_a_cell_is_its_formula(name, unit, x64):
    cell = make(name, features=3, param_dtype=jnp.float64)
    values = {}
    for i, (path, layer) in enumerate(layers.layers(cell)):
        kernel = draws(*layer.w.kernel.shape, seed=i + 1)
        bias = 0 if layer.w.bias is None else draws(kernel.shape[1], seed=i + 9)
        layer.w.kernel[...] = jnp.asarray(kernel)
        if layer.w.bias is not None:
            layer.w.bias[...] = jnp.asarray(bias)
        values[path] = kernel, bias + np.zeros(kernel.shape[1])
    start = [draws(2, 3, seed=20 + i) for i in range(len(cell.states))]
    y, last = cell(jnp.asarray(X), tuple(map(jnp.asarray, start)))
    for n in range(2):
        state = [tuple(part[n, j] for part in start) for j in range(3)]
        for t in range(4):
            h = [s[0] for s in state]
            for j in range(3):
                z, u = (
                    [
                        float(bias[gate * 3 + j])
                        + sum(float(v) * float(kernel[i, gate * 3 + j]) for i, v in enumerate(read))
                        for gate in range(cell.gates)
                    ]
                    for read, (kernel, bias) in ((X[n, t], values["input"]), (h, values["hidden"]))
                )
                state[j] = unit(z, u, *state[j])
            # float64 rounding of sums of ten products, over four steps.
            expected = [s[0] for s in state]
            np.testing.assert_allclose(y[n, t], expected, rtol=1e-12, atol=1e-13)
        for i, part in enumerate(last):
            np.testing.assert_allclose(part[n], [s[i] for s in state], rtol=1e-12, atol=1e-13)


@nnx.jit
def call(cell):
    return cell(single(X))[0]


def looped(cell, x):
    """The same step after step, each calling both layers."""
    state = tuple(jnp.zeros((x.shape[0], cell.features)) for _ in cell.states)
    outputs = []
    for t in range(x.shape[1]):
        z = layer_norm_act(x[:, t], cell.input)
        state = cell.step(z, layer_norm_act(state[0], cell.hidden), *state)
        outputs.append(state[0])
    return jnp.stack(outputs, axis=1)


def value_and_gradient(run, cell, x):
    graph, state = nnx.split(cell)

    @jax.jit
    @jax.value_and_grad
    def value(state):
        return jnp.sum(jnp.sin(run(nnx.merge(graph, state, copy=True), x)) * WEIGHTS)

    return value(state)


def scanned(cell, x):
    return cell(x)[0]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("lstm", "tt:2,order=2,run=factorized"), ("gru", "tucker:2,run=reconstructed")],
)
def test_values_and_gradients_are_those_of_a_loop(name, hidden):
    cell = make(name, hidden=hidden)
    ours, expected = (value_and_gradient(run, cell, single(X)) for run in (scanned, looped))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected
    )


def test_quadratic_neurons_too():
    rules = [
        dict(match="hidden", neuron="ours", kernel="tt:2,order=2,always"),
        dict(match="input", neuron="ours", norm="branch"),
    ]
    cell = convert(make("gru"), rules, jax.random.key(0))
    cell.eval()
    np.testing.assert_allclose(cell(single(X))[0], looped(cell, single(X)), **close)


def test_a_tt_lstm_has_as_many_weights_as_the_published_one():
    """57,600 inputs, 256 features (Yang et al. 2017, arXiv 1707.01786), gates in one product."""
    spec = LayerSpec(kernel="tt:4,in=8x20x20x18,out=16x4x4x4")
    made = nnx.eval_shape(lambda: LSTM(57_600, 256, input_spec=spec, rngs=nnx.Rngs(0)))
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(made.input.w.kernel)))
    assert weights == 3_360 and round(57_600 * 1024 / weights) == 17_554
    y, (h, c) = nnx.eval_shape(lambda m, x: m(x), made, jnp.zeros((2, 6, 57_600)))
    assert (y.shape, h.shape, c.shape) == ((2, 6, 256), (2, 256), (2, 256))


def test_the_first_output_mode_holds_the_gates():
    cell = make(input="tt:2,in=2x3,out=8x4")  # four gates of 2x4 features
    kernel = cell.input.w.kernel.value()
    core, rest = (kernel.cores[name] for name, _ in kernel.network.cores)
    for gate in range(4):
        own = jnp.einsum("iar,rjb->ijab", core[:, 2 * gate : 2 * gate + 2], rest).reshape(6, 8)
        found = cell.input.w.dense()[:, 8 * gate : 8 * gate + 8]
        np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "text"), [*zip(itertools.cycle(CELLS), FORMS)])
def test_a_kernel_of_any_form_is_what_its_cores_make(name, text):
    cell, plain = make(name, input=text, hidden=text), make(name)
    for path, layer in layers.layers(plain):
        layer.w.kernel[...] = getattr(cell, path).w.dense()
    np.testing.assert_allclose(call(cell), call(plain), **close)


def products_a_step(cell):
    """How many a step of the scan computes."""
    graph, state = nnx.split(cell)
    made = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, single(X))
    (scan,) = [eqn for eqn in made.eqns if eqn.primitive.name == "scan"]
    return str(scan.params["jaxpr"]).count("dot_general")


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        ("dense", 1),
        ("tt:2,order=3,run=reconstructed", 1),
        ("tt:2,order=3,run=factorized", 3),
    ],
)
def test_a_kernel_is_made_once_and_not_in_each_step(hidden, expected):
    assert products_a_step(make(hidden=hidden)) == expected


def test_a_rounded_one_too():
    rule = dict(match="hidden", kernel="tt:2,order=3,always", precision="w=dorefa:4")
    assert products_a_step(convert(make(), [rule], jax.random.key(0))) == 1


def test_kept_kernels_leave_a_cell_as_it_is():
    rules = [dict(match="input|hidden", kernel="tucker:32,always", start="kept")]
    cell = make("gru")
    made = convert(cell, rules, jax.random.key(0))
    assert made.hidden.w.factored and made.input.w.factored
    np.testing.assert_allclose(call(made), call(cell), **close)


def rounded(name, text, match="input|hidden"):
    return convert(make(name), [dict(match=match, precision=text)], jax.random.key(0))


@each_cell
def test_quantizers_observe_all_steps_at_once_behind_them(name):
    cell = rounded(name, "minmax:w8a8s", match="hidden")
    before = cell.hidden.ranges["input"].arrays()
    still = nnx.clone(cell)
    still.eval()
    y, _ = cell(single(X))
    np.testing.assert_array_equal(y, still(single(X))[0])
    np.testing.assert_allclose(y, looped(still, single(X)), **close)
    read = jnp.concatenate([jnp.zeros((2, 1, 8)), y[:, :-1]], axis=1)
    expected = precisions.quantizers.observe(cell.hidden.spec.precision.input, read, before)
    moved = cell.hidden.ranges["input"].arrays()
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    assert any(np.any(moved.observed[n] != before.observed[n]) for n in before.observed)


@pytest.mark.parametrize(
    "text",
    [
        "lsq:w4a4s",
        "dorefa:w4g6",
        pytest.param("w=lq:2,a=lq:2", marks=pytest.mark.slow),
        pytest.param("xnor++:w1a1", marks=pytest.mark.slow),
    ],
)
def test_training_rounded_gives_finite_gradients(text):
    cell = rounded("lstm", text)
    graph, params, rest = nnx.split(cell, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(nnx.merge(graph, params, rest, copy=True)(single(X))[0] ** 2)

    found = nnx.to_pure_dict(gradient(params))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    assert np.any(found["hidden"]["w"]["kernel"])


def test_noise_is_another_one_in_each_step():
    cell = rounded("lstm", "dorefa:w4g2")
    ranges = cell.hidden.ranges
    before = ranges["gradient"].arrays().observed
    precisions.draw_later(ranges, 3)
    after = ranges["gradient"].arrays().observed
    assert after["calls"] == before["calls"] + 3
    np.testing.assert_array_equal(after["seed"], before["seed"])
    precisions.draw_later(None, 3)


def test_whole_numbers_give_the_same():
    cell = calibrate(rounded("lstm", "minmax:w8a8s"), single(X))
    cell.eval()
    whole = deploy.to_integers(cell)
    assert whole.hidden.w.kernel.dtype == jnp.int8
    np.testing.assert_array_equal(whole.hidden(WEIGHTS), cell.hidden(WEIGHTS))
    # Gates of two programs are rounded differently in float32, which may take a code to the next:
    # 1/127 of what is read, times a weight.
    np.testing.assert_allclose(call(whole), call(cell), atol=4e-3)


def test_calibration_sees_the_states_of_all_steps():
    plain, x = make(), single(X)
    read = jnp.concatenate([jnp.zeros((2, 1, 8)), plain(x)[0][:, :-1]], axis=1)
    cell = convert(plain, [dict(match="hidden", precision="a=minmax:8s")], jax.random.key(0))
    quantizer = cell.hidden.spec.precision.input
    expected = precisions.quantizers.calibrate(quantizer, read, "minmax")
    found = calibrate(cell, x, how="minmax").hidden.ranges["input"].arrays()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_what_is_collected_and_watched_is_of_all_steps():
    rule = dict(match="hidden", neuron="ours", precision="w=lq:2,a=lq:2")
    cell, seen = convert(make(), [rule], jax.random.key(0)), {}

    def observer(path, layer, x, y):
        seen[path] = x.shape, y.shape

    graph, state = nnx.split(layers.watched(cell, observer))

    @jax.jit
    def run(state, x):
        with collecting("peaks") as peaks, collecting("losses") as losses, collecting("norms") as n:
            nnx.merge(graph, state, copy=True)(x)
        assert len(n) == 2
        return [value for _, value in peaks], [value for _, value in losses]

    (peak,), _ = run(state, single(X))
    assert peak > 0
    assert seen == {"input": ((2, 4, 6), (2, 4, 32)), "hidden": ((2, 4, 8), (2, 4, 32))}


class Net(nnx.Module):
    def __init__(self, cell):
        self.cell = cell

    def __call__(self, images):
        """(N, H, W, C) by rows."""
        return self.cell(images.reshape(*images.shape[:2], -1))[0]


def test_costs_are_those_of_all_steps():
    spec = dict(hidden="tt:2,order=2,run=factorized")
    dense, compact = (analysis.layer_costs(Net(make(**own)), (4, 3, 2)) for own in ({}, spec))
    assert [cost.name for cost in dense] == ["cell/input", "cell/hidden"]
    assert [cost.macs for cost in dense] == [4 * 6 * 32, 4 * 8 * 32]
    # Modes 4 x 2 to 4 x 8, or 8 x 4, a bond of 2: the cheaper order.
    sizes = dict(make(**spec).hidden.w.kernel.network.sizes)
    i0, i1, o0, o1 = (sizes[name] for name in ("i0", "i1", "o0", "o1"))
    orders = (i0 * i1 * o0 * 2 + i1 * 2 * o0 * o1, i0 * i1 * o1 * 2 + i0 * 2 * o0 * o1)
    assert compact[1].macs == 4 * min(orders)
    assert compact[1].params == 2 * (i0 * o0 + i1 * o1)


def test_bfloat16_products_and_states_of_float32():
    cell = layers.set_compute_dtype(make(), jnp.bfloat16)
    y, last = cell(single(X))
    assert y.dtype == jnp.bfloat16 and {part.dtype for part in last} == {jnp.dtype("float32")}
    narrow = single(X).astype(
        jnp.bfloat16
    )  # without being told a type, products are in the input's
    np.testing.assert_array_equal(make()(narrow)[0], cell(narrow)[0])
    # bfloat16 has 8 bits.
    np.testing.assert_allclose(y.astype(jnp.float32), make()(single(X))[0], atol=0.03)


@each_cell
def test_a_sequence_in_two_parts(name):
    cell, x = make(name), single(X)
    whole, last = cell(x)
    first, state = cell(x[:, :3])
    second, again = cell(x[:, 3:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, **close)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), again, last)


def test_how_they_start():
    cell = make("gru", features=5)
    for block in jnp.split(cell.hidden.w.kernel[...], 3, axis=1):
        np.testing.assert_allclose(block.T @ block, jnp.eye(5), atol=1e-5)
    assert cell.hidden.w.bias is not None and make("lstm").hidden.w.bias is None
    # With nothing else to say, the forget gate of an LSTM keeps sigmoid(1) of what there is.
    for given, kept in (({}, jax.nn.sigmoid(1.0)), ({"forget_bias": 0.0}, 0.5)):
        lstm = make(**given)
        for _, layer in layers.layers(lstm):
            layer.w.kernel[...] = jnp.zeros_like(layer.w.kernel[...])
        _, (_, c) = lstm(single(X[:, :1]), (jnp.zeros((2, 8)), jnp.ones((2, 8))))
        np.testing.assert_allclose(c, jnp.full((2, 8), kept), rtol=1e-6)


@pytest.mark.slow
def test_sharded_over_the_batch_is_unsharded():
    graph, state = nnx.split(make(hidden="tt:2,order=2"))

    @jax.jit
    @jax.grad
    def gradient(state, x):
        return jnp.sum(nnx.merge(graph, state, copy=True)(x)[0] ** 2)

    x = single(draws(8, 4, 6))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    pairs = zip(*map(jax.tree.leaves, (gradient(everywhere, cut), gradient(state, x))), strict=True)
    for ours, expected in pairs:  # float32 rounding of sums of some hundred terms
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_two_of_a_make_are_traced_once():
    graphs = [nnx.split(make())[0] for _ in range(2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GRU(6, 0, rngs=nnx.Rngs(0)), "features=0: must be at least 1"),
        (lambda: make()(single(X)[0]), r"\(N, T, in_features\), cannot be \(4, 6\)"),
        (lambda: make()(single(X)[..., :5]), r"in_features=6: the input cannot be \(2, 4, 5\)"),
        (
            lambda: make()(single(X), (jnp.zeros((2, 8)),)),
            r"the state is \(h, c\), \(2, 8\) each: it cannot be \(\(2, 8\)\)",
        ),
        (
            lambda: make("gru")(single(X), (jnp.zeros((2, 7)),)),
            r"the state is \(h\), \(2, 8\) each: it cannot be \(\(2, 7\)\)",
        ),
        (
            lambda: convert(
                make(), [dict(match="hidden", neuron="ours", norm="branch")], jax.random.key(0)
            )(single(X)),
            r"hidden: norm='branch': statistics of a state .* allowed 'none'",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
