"""Costs of architectures against those of the nets that these are."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, data, experiment, layers
from efficient_nets import config as configs
from efficient_nets.errors import UserError
from efficient_nets.models.space import Space
from efficient_nets.search import cell_costs, latency, relaxation

COUNTED = [kind for kind in cell_costs.COSTS if kind != "latency"]
# Sums of a few dozen numbers in single precision.
CLOSE = 2e-6


def tiny_config(**options):
    config = configs.defaults()
    config.data.name = "digits"
    small = dict(arc="", nodes=2, layers=1, features=2, reductions=2)
    config.model = configs.model("cells", **(small | options))
    return config


def space_of(config):
    own = config.model
    return Space(own.nodes, own.ops, own.precisions, own.shared_precision)


def counted(config, architecture):
    """By kind, summed over the layers of the net that the architecture is."""
    config = config.copy_and_resolve_references()
    config.model.arc = space_of(config).text(architecture)
    info = data.describe(config.data)
    found = analysis.layer_costs(experiment.abstract_model(config, info), info.image_shape)
    return {kind: sum(getattr(cost, kind) for cost in found) for kind in COUNTED}


PRECISIONS = ("ternarize", "kbit:w2a2", "float")
SPACES = {
    "one for each operand": dict(ops=("conv1", "max3"), precisions=PRECISIONS),
    "one for all": dict(
        size=9,
        nodes=1,
        ops=("conv3|algorithm=winograd:2",),
        precisions=("float", "minmax:w8i8"),
        shared_precision=True,
        mix_precision="binarize",
    ),
    "rules": dict(
        nodes=1,
        ops=("identity", "conv1|kernel=cp:0.5", "dil3"),
        auxiliary=0.4,
        rules=(
            dict(match="idle"),
            dict(match="cells/1/.*/conv$|end", neuron="ours"),
            dict(match="cells/2/.*depthwise1", remove=True),
            dict(match="cells/0/.*(conv|pointwise)", precision="lsq:w4a4"),
        ),
    ),
}
LARGE = {
    "three reductions, odd sizes": dict(
        size=13,
        reductions=3,
        layers=4,
        nodes=3,
        ops=("sep3", "sep5", "avg3"),
        precisions=PRECISIONS,
    ),
    "three reductions, one for all": dict(
        size=11,
        reductions=3,
        layers=4,
        ops=("conv3|algorithm=winograd:2,flex", "conv5|algorithm=winograd:2|neuron=ours"),
        precisions=("float", "minmax:w8i8"),
        shared_precision=True,
    ),
}


@pytest.mark.parametrize(
    "name", [*SPACES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)
def test_the_cost_of_an_architecture_is_that_of_its_net(name):
    options = dict((SPACES | LARGE)[name])
    size, given = options.pop("size", 0), options.pop("rules", ())
    config = tiny_config(**options)
    config.data.image_size, config.layers = size, given
    found = cell_costs.counted(config)
    space = space_of(config)
    config.layers = [rule for rule in given if rule["match"] != "idle"]
    for seed in range(4 if name in LARGE else 1):
        architecture = space.random(jax.random.key(seed))
        for kind, expected in counted(config, np.asarray(architecture)).items():
            cost = float(found[kind].of(relaxation.one_hots(space, architecture)))
            assert cost == pytest.approx(expected, rel=CLOSE), (kind, seed)


def test_of_probabilities_it_is_the_mean_over_architectures():
    config = tiny_config(nodes=1, ops=("conv1", "max3"), precisions=("float", "kbit:w2a2"))
    space, cost = space_of(config), cell_costs.architecture_cost(config, "bops")
    every = itertools.product(*map(range, space.choices.flat))
    every = jnp.asarray(list(every), jnp.int32).reshape(-1, *space.shape)
    assert len(every) == space.size == 4096
    each = jax.vmap(lambda one: cost.of(relaxation.one_hots(space, one)))(every)
    logits = relaxation.Relaxation(space, noise=0.0)
    uniform = logits.probabilities(logits.init(jax.random.key(0)))
    expected = np.asarray(each, np.float64).mean()
    assert float(cost.of(uniform)) == pytest.approx(expected, rel=CLOSE)
    assert each.min() < expected < each.max()


@pytest.fixture(scope="module")
def timed():
    """Cells of two shapes, and a table of the times of what can be in them."""
    config = tiny_config(ops=("identity", "conv1", "max3"), precisions=("float", "kbit:w2a2"))
    return config, cell_costs.measure_cells(config, batch_size=2, repeats=3)


def test_each_operation_is_measured_in_the_shape_of_each_cell(timed):
    _, table = timed
    *of_cells, rest = table["seconds"].items()
    assert [shape for shape, _ in of_cells] == ["4x4x4 float32, relu", "2x2x8 float32, relu"]
    for _, own in of_cells:
        assert [label.split(",")[0] for label in own] == ["conv1", "conv1", "max3", "end"]
        assert len(set(own)) == 4 and "conv1, float" in own and "end, float" in own
    # Known to other processes too: no address of an object is in it.
    assert rest[0] == "8x8x1 float32, relu" and list(rest[1]) == ["all else of 3 cells, 20bbda19"]
    assert all(0 < seconds < 10 for own in table["seconds"].values() for seconds in own.values())
    assert (table["batch_size"], table["repeats"]) == (2, 3)


def test_around_operands_and_ends_it_is_all_else_that_is_measured():
    # Many features: products are nearly all that it computes.
    net = cell_costs._net(tiny_config(ops=("max3",), features=32, auxiliary=0.4))
    part = cell_costs._rest(net)
    around = analysis.layer_costs(part.module, net.image_shape)
    assert len(around) == len(list(layers.layers(part.module)))
    whole = analysis.layer_costs(net.model, net.image_shape)
    names = [cost.name for cost in whole if not re.search("/(nodes|end)", cost.name)]
    assert [cost.name for cost in around] == names and len(names) == 10
    # XLA drops what nothing reads.
    graph, state = nnx.split(cell_costs._with_arrays(part.module))
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    compiled = run.lower(state, jnp.zeros((1, *part.input_shape))).compile()
    assert compiled.cost_analysis()["flops"] > 2 * sum(cost.macs for cost in around)


def test_latencies_are_sums_of_a_table(timed, tmp_path, capsys):
    config, table = timed
    latency.write(table, tmp_path)
    assert "conv1, float" in capsys.readouterr().out
    path = tmp_path / latency.FILE
    assert cell_costs.read(str(path)) == table
    numbers = itertools.count()
    seconds = {
        shape: {label: 2.0 ** next(numbers) for label in own}
        for shape, own in table["seconds"].items()
    }
    space = space_of(config)
    cost = cell_costs.architecture_cost(config, "latency", {"seconds": seconds})
    big, small, rest = (list(own.values()) for own in seconds.values())
    # Both reduction cells are in front, one of each shape.
    architecture = np.asarray(
        [
            [[[0, 1, 0], [1, 2, 1]], [[2, 0, 0], [2, 1, 1]]],
            [[[0, 0, 0], [1, 0, 1]], [[0, 1, 0], [1, 2, 1]]],
        ]
    )
    assert [len(own) for own in (big, small, rest)] == [4, 4, 1]
    normal = small[0] + small[2] + small[1] + small[3]
    reduction = sum(own[0] + own[2] + 2 * own[3] for own in (big, small))
    found = float(cost.of(relaxation.one_hots(space, jnp.asarray(architecture))))
    assert found == normal + reduction + rest[0]  # powers of two


def test_a_table_of_another_net_names_what_is_missing(timed):
    config, table = timed
    other = config.copy_and_resolve_references()
    other.model.layers = 2
    with pytest.raises(UserError, match=r"search.latency lacks .*--mode=latency.*all else of 4"):
        cell_costs.architecture_cost(other, "latency", table)
    with pytest.raises(UserError, match="give search.latency, a file of --mode=latency"):
        cell_costs.architecture_cost(config, "latency")
    with pytest.raises(UserError, match="search.latency='none.json' cannot be read"):
        cell_costs.read("none.json")


def test_what_has_no_cost():
    config = tiny_config(nodes=1)
    with pytest.raises(UserError, match="search.cost='flops'.*bops, latency, macs, packed_bytes"):
        cell_costs.architecture_cost(config, "flops")
    config.layers = (dict(match="stem"), dict(match="0/nodes/0/x", neuron="ours"))
    words = r"layers\[1\].match='0/nodes/0/x'.*not all of cells/0/nodes/0/x/"
    with pytest.raises(UserError, match=words):
        cell_costs.architecture_cost(config, "macs")
    config.model = configs.model("lenet")
    with pytest.raises(UserError, match="model.name='lenet'.*'cells' alone"):
        cell_costs.architecture_cost(config, "macs")
