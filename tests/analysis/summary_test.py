"""The layer table as text, and as JSON."""

import json
import re

import jax
import pytest
from flax import nnx

from efficient_nets import analysis, layers, models
from efficient_nets.analysis import summary


def quadratic_resnet():
    model = models.create(
        "resnet", image_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0), blocks=(1, 1, 1)
    )
    rule = dict(match=r"stage\d/.*/conv\d", neuron="ours", norm="branch")
    return layers.convert(model, [rule], jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(quadratic_resnet)


def test_table_has_a_line_a_layer_with_every_axis(model):
    table = analysis.layer_table(model, (8, 8, 1)).splitlines()
    header, rows = table[0].split(), {line.split()[0]: line for line in table}
    assert tuple(header) == summary.HEADER[:-1]  # nothing is rounded
    assert {path for path, _ in layers.layers(model)} <= set(rows)
    assert re.split(r"\s{2,}", rows["stem"]) == [
        *("stem", "3x3x1x16", "8x8x1", "linear", "dense", "direct", "float", "32"),
        *("0.56 KiB", "0.1%", "9.22 k"),
    ]
    assert re.split(r"\s{2,}", rows["stage2/0/conv1"])[:4] == [
        *("stage2/0/conv1", "3x3x16x32 *3", "8x8x16", "ours+branch")
    ]
    assert rows["other"].startswith("other arrays") and "100.0%" in rows["total"]


def test_columns_are_aligned_and_fit_a_terminal(model):
    *table, totals = analysis.layer_table(model, (8, 8, 1)).splitlines()
    assert max(map(len, table)) <= 120
    assert len({len(line) for line in table if not line.startswith("other")}) == 1
    start = table[0].index("neuron")
    assert {line[start - 2 : start] for line in table if "-" not in line} == {"  "}
    cost = analysis.model_cost(model, (8, 8, 1))
    assert totals == f"{cost['params']:,} parameters, {cost['macs']:,} MACs for an image of 8x8x1"


def test_a_rounded_layer_s_bits_and_bit_operations():
    def lines(precision):
        layer = layers.Dense(4, 8, spec=layers.LayerSpec(precision=precision), rngs=nnx.Rngs(0))
        header, _, row, *_, totals = analysis.layer_table(layer, (4,)).splitlines()
        assert header.split()[-1] == "BOPs"
        return re.split(r"\s{2,}", row)[-5:], totals

    row, totals = lines("lsq:w4a4o8")
    assert row == ["4 o8", "0.07 KiB", "100.0%", "32", "512"]
    assert "32 MACs, 512 bit operations, 76 of 172 bytes for" in totals
    row, totals = lines("w=lsq:2,a=lsq:4,o=lsq:8,g=dorefa:6")
    assert (row[0], row[-1]) == ("2/4 o8 g6", "256")
    row, totals = lines("a=lsq:4")
    assert (row[0], row[-1]) == ("32/4", "4.10 k")
    assert "32 MACs, 4.10 k bit operations for" in totals  # no kernel is packed


def test_a_net_of_one_layer_has_no_other_parameters():
    layer = layers.Dense(4, 8, rngs=nnx.Rngs(0))
    assert "other" not in analysis.layer_table(layer, (4,))


def test_shares_sum_to_the_total(model):
    table = analysis.layer_table(model, (8, 8, 1)).splitlines()
    shares = [float(found) for line in table for found in re.findall(r"([\d.]+)%", line)]
    # 11 shares, each rounded to a tenth: at most 0.05 off.
    assert shares[-1] == 100 and abs(sum(shares[:-1]) - 100) <= 0.05 * len(shares)


def test_summary_dict_survives_json(model):
    given = analysis.summary_dict(model, (8, 8, 1))
    read = json.loads(json.dumps(given))
    assert {key: read[key] for key in ("params", "macs", "bytes")} == {
        "params": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "macs": sum(layer["macs"] for layer in read["layers"]),
        "bytes": 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))),
    }
    assert read["layers"][0]["name"] == "stem" and read["layers"][0]["input_shape"] == [8, 8, 1]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (40, "0.04 KiB"),
        (1024, "1.00 KiB"),
        (28_034, "27.4 KiB"),
        (2**20 - 1, "1024 KiB"),
        (2**21, "2.00 MiB"),
    ],
)
def test_sizes(size, text):
    assert summary._size(size) == text
