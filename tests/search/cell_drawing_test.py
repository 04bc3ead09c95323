"""The picture of cells: what is in it, and that nothing covers anything."""

import itertools

import jax
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.models.space import Space
from efficient_nets.search import cell_drawing

SPACE = Space(nodes=7, precisions=("ternary", "float", "lsq:w4a4,granularity=channel"))
CHAIN = "".join(f"{node} 0 {node + 1} 1 " for node in range(7))
WIDE = "0 2 1 3 " * 7


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_it_names_every_op_and_precision_and_writes_a_png(tmp_path):
    architecture = np.asarray(SPACE.random(jax.random.key(0)))
    path = tmp_path / "plots" / "cells.png"
    cell_drawing.draw(SPACE, architecture, path, "found")
    assert path.read_bytes().startswith(b"\x89PNG")
    found = texts(cell_drawing.picture(SPACE, architecture))
    for _, op, precision in architecture.reshape(-1, 3):
        name = SPACE.ops[op]
        rounds = name not in ("avg3", "max3", "identity")
        found.remove(f"{name}\n{SPACE.precisions[precision]}" if rounds else name)
    sums = [f"+\n{number}" for number in range(2, 9)]
    rest = ["input 0", "input 1", *sums, "con\ncat"]
    assert sorted(found) == sorted([*rest, *rest, "normal cell", "reduction cell"])
    plain = Space(nodes=7)
    assert "max3" in texts(cell_drawing.picture(plain, plain.parse(CHAIN + WIDE)))


@pytest.mark.parametrize("text", ["random", CHAIN, WIDE])
def test_no_box_and_no_connection_is_behind_a_box(text):
    architecture = SPACE.random(jax.random.key(1))
    if text != "random":
        architecture = Space(nodes=7).parse(text + text)
    columns = cell_drawing.columns_of(SPACE, np.asarray(architecture)[0])
    cell_drawing._order(columns)
    cell_drawing._set(columns)
    for column in columns:
        for one, other in itertools.combinations(column, 2):
            heights = cell_drawing.HEIGHTS[one.kind] + cell_drawing.HEIGHTS[other.kind]
            assert abs(one.y - other.y) > heights / 2 + 0.1
    for left, right in itertools.pairwise(columns):
        assert left[0].x + left[0].width / 2 < right[0].x - right[0].width / 2
    # Connections go from a column to the next one, and so behind no box.
    assert all(one.column + 1 == place.column for one, place in cell_drawing._links(columns))


def test_connections_are_those_of_the_tokens():
    space = Space(nodes=3)
    cell = space.parse("0 0 1 1 0 2 2 3 3 4 1 0 " * 2)[0]
    columns = cell_drawing.columns_of(space, cell)

    def source(place):
        return source(place.before[0]) if not place.kind else place.label

    found = {
        place.label: [source(one) for one in place.before]
        for column in columns
        for place in column
        if place.kind in ("sum", "concat")
    }
    assert found == {
        "+\n2": ["sep3", "sep5"],
        "+\n3": ["avg3", "max3"],
        "+\n4": ["identity", "sep3"],
        "con\ncat": ["+\n4"],
    }
    ops = [place for column in columns for place in column if place.kind == "op"]
    assert [source(op.before[0]) for op in ops[2:5]] == ["input 0", "+\n2", "+\n3"]


def test_what_is_no_architecture_is_refused(tmp_path):
    with pytest.raises(UserError, match="arc has the shape"):
        cell_drawing.draw(SPACE, np.zeros((2, 3, 2, 3)), tmp_path / "cells.png")
