"""Costs of candidates: counted, measured, and looked up in a table that must be of this net."""

import json

import numpy as np
import pytest

from efficient_nets import config as configs
from efficient_nets import reporting
from efficient_nets.errors import UserError
from efficient_nets.search import candidates, costs, latency
from tests.search import winas_test

CANDIDATES = winas_test.CANDIDATES
LAYERS = ["stage1/0/conv1", "stage1/0/conv2"]
SHAPE = "8x8x2 to 2, 3x3, strides 1x1, padding 1+1x1+1"


def tiny_config(**fields):
    """Of a net with two layers of one shape."""
    config = winas_test.tiny_config(**{"layers": "stage1"} | fields)
    config.model = configs.model("resnet", blocks=(1, 1, 1), width=0.125)
    return config


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("latency")
    config = tiny_config(candidates=CANDIDATES[:2], latency_batch_size=2, latency_repeats=3)
    return workdir, latency.measure(config, workdir)


def test_a_table_has_each_shape_once_and_what_it_was_measured_with(measured):
    workdir, table = measured
    assert list(table["seconds"]) == [SHAPE]  # of two layers
    assert list(table["seconds"][SHAPE]) == list(map(candidates.label, CANDIDATES[:2]))
    assert all(0 < seconds < 10 for seconds in table["seconds"][SHAPE].values())
    assert (table["batch_size"], table["repeats"], table["dtype"]) == (2, 3, "float32")
    assert table["device"].startswith("cpu")
    assert json.loads((workdir / latency.FILE).read_text()) == table


def of_table(path, table, **fields):
    reporting.write_json(path, table)
    fields = dict(cost="latency", latency=str(path), candidates=CANDIDATES[:2]) | fields
    return tiny_config(**fields)


def test_costs_are_shares_of_the_times_of_direct_layers_in_float(measured, tmp_path):
    own = measured[1]["seconds"][SHAPE]
    times = dict(zip(own, (0.002, 0.0005), strict=True))
    config = of_table(tmp_path / "table.json", measured[1] | {"seconds": {SHAPE: times}})
    found = costs.costs(config, LAYERS, CANDIDATES[:2])
    np.testing.assert_allclose(found, [[0.5, 0.125]] * 2)


@pytest.mark.parametrize("cost, share", [("macs", 16 / 36), ("bops", 16 / 36 / 16)])
def test_counted_costs(cost, share):
    found = costs.costs(tiny_config(cost=cost), LAYERS, CANDIDATES[:2])
    np.testing.assert_allclose(found, [[0.5, 0.5 * share]] * 2)


def test_a_table_of_another_net_names_what_is_missing(measured, tmp_path):
    path = tmp_path / "table.json"
    config = of_table(path, measured[1], candidates=CANDIDATES)
    with pytest.raises(UserError, match=r"lacks 1 of the times.*8x8x2 to 2.*: direct lsq:w4a4s$"):
        costs.costs(config, LAYERS, CANDIDATES)
    with pytest.raises(UserError, match="lacks 2 of the times.*8x8x2 to 4, 3x3, strides 2x2"):
        costs.costs(config, [*LAYERS, "stage2/0/conv1"], CANDIDATES[:2])


@pytest.mark.parametrize(
    "table, words",
    [
        ("{", "is no table of --mode=latency"),
        ("{}", "is no table of --mode=latency"),
        ('{"seconds": {"a": {"direct float": -1.0}}}', "a number of seconds above 0"),
        ('{"seconds": {"a": {"direct float": null}}}', "a number of seconds above 0"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_table(tmp_path, table, words):
    path = tmp_path / "table.json"
    if table is not None:
        path.write_text(table)
    config = tiny_config(cost="latency", latency=str(path))
    with pytest.raises(UserError, match=words):
        costs.costs(config, LAYERS, CANDIDATES)
