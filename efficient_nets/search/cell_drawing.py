"""A picture of an architecture's two cells.

A cell goes from left to right: its inputs, then of each node the two ops and their sum, then the
concatenation of the loose ends. A sum stands in the column of its depth, its ops one before it. As
Sugiyama et al. (1981) do, a connection over several columns has a place in each that it passes, so
that it runs behind no box; places are ordered for few crossings, then set for straight lines.
"""

import dataclasses
import pathlib

import numpy as np

from efficient_nets.analysis import figures
from efficient_nets.models import operations
from efficient_nets.models.space import CELLS, INPUT, OP, PRECISION, Space

COLORS = {"input": "white", "op": "khaki", "sum": "palegreen", "concat": "lightpink"}
# Inches; "" is a passage, which is as wide as its column.
WIDTHS = {"input": 0.7, "op": 1.0, "sum": 0.42, "concat": 0.42, "": 0.0}
HEIGHTS = {"input": 0.42, "op": 0.42, "sum": 0.42, "concat": 0.42, "": 0.05}
GAP, ROOM = 0.42, 0.16  # between columns, and between what stands in one
LETTER = 0.075
SWEEPS = 12
STRAIGHT = (1.0, 3.0, 20.0)  # weights of slopes, by how many of both ends are passages


@dataclasses.dataclass
class Place:
    """A box, or a passage of a connection; `before` it are the places that lead to it."""

    kind: str
    label: str
    column: int
    before: list["Place"] = dataclasses.field(default_factory=list)
    x: float = 0.0
    width: float = 0.0
    y: float = 0.0


def draw(space: Space, architecture, path: pathlib.Path, title: str = "") -> None:
    """Writes both cells as a PNG, one below the other.

    Numbers of inputs and sums are those that the tokens have. Ops with layers show their precision
    where the space has several.

    Args:
      space: Of the architecture.
      architecture: `(2, B, 2, 3)`.
      path: Of the file; its folder is made if need be.
      title: Above the picture.

    Raises:
      UserError: on an architecture that is none.
    """
    figure = picture(space, architecture, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def picture(space: Space, architecture, title: str = ""):
    """The Matplotlib figure of `draw`."""
    tokens = space.check(architecture)
    cells = [columns_of(space, cell) for cell in tokens]
    for columns in cells:
        _order(columns)
        _set(columns)
    places = [[place for column in columns for place in column] for columns in cells]
    tops = [max(place.y for place in each) + 0.35 for each in places]
    lows = [min(place.y for place in each) - 0.35 for each in places]
    heights = [top - low + 0.35 for top, low in zip(tops, lows, strict=True)]
    width = max(place.x + place.width / 2 for each in places for place in each) + 0.2
    width = max(width, 0.4 + 1.4 * LETTER * len(title))
    head = 0.4 if title else 0.1
    figure = figures.new_figure(width, sum(heights) + head)
    figure.set_layout_engine("none")
    left = sum(heights)
    for name, each, top, height in zip(CELLS, places, tops, heights, strict=True):
        left -= height
        total = sum(heights) + head
        axis = figure.add_axes((0, left / total, 1, height / total))
        axis.set(xlim=(0, width), ylim=(top + 0.35 - height, top + 0.35))
        axis.axis("off")
        axis.text(0.2, top + 0.12, f"{name} cell", fontsize=10, weight="bold", va="center")
        for place in each:
            _draw(axis, place)
    if title:
        figure.suptitle(title, fontsize=11, y=1 - 0.2 / (sum(heights) + head), va="center")
    return figure


def columns_of(space: Space, cell: np.ndarray) -> list[list[Place]]:
    """The places of a cell's tokens `(B, 2, 3)`, by column, passages included."""
    ends = [Place("input", f"input {number}", 0) for number in range(2)]
    columns = [list(ends)]

    def put(place: Place) -> Place:
        while len(columns) <= place.column:
            columns.append([])
        columns[place.column].append(place)
        return place

    passages: dict[tuple[int, int], Place] = {}

    def reached(source: int, column: int) -> Place:
        """What leads from a source to that column; what is on the way is shared."""
        if ends[source].column == column - 1:
            return ends[source]
        if (source, column - 1) not in passages:
            before = reached(source, column - 1)
            passages[source, column - 1] = put(Place("", "", column - 1, [before]))
        return passages[source, column - 1]

    for number, operands in enumerate(cell):
        column = 1 + max(ends[source].column for source in operands[:, INPUT])
        pair = []
        for operand in operands:
            label = space.ops[operand[OP]]
            if len(space.precisions) > 1 and operations.parse(label).has_layers:
                label += f"\n{space.precisions[operand[PRECISION]]}"
            pair.append(put(Place("op", label, column, [reached(operand[INPUT], column)])))
        ends.append(put(Place("sum", f"+\n{number + 2}", column + 1, pair)))
    read = set(cell[..., INPUT].flat)
    loose = [source for source in range(2, len(ends)) if source not in read]
    last = len(columns)
    put(Place("concat", "con\ncat", last, [reached(source, last) for source in loose]))
    return columns


def _links(columns) -> list[tuple[Place, Place]]:
    return [(one, place) for column in columns for place in column for one in place.before]


def _crossings(columns) -> int:
    row = {id(place): index for column in columns for index, place in enumerate(column)}
    links = [(place.column, row[id(one)], row[id(place)]) for one, place in _links(columns)]
    return sum(
        (a - c) * (b - d) < 0
        for index, (column, a, b) in enumerate(links)
        for other, c, d in links[:index]
        if column == other
    )


def _order(columns: list[list[Place]]) -> None:
    """Sorts each column by where its neighbours are, forth and back; the best of all stays."""
    after: dict[int, list[Place]] = {}
    for one, place in _links(columns):
        after.setdefault(id(one), []).append(place)
    best, least = [list(column) for column in columns], _crossings(columns)
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        for index in range(1, len(columns)) if forth else range(len(columns) - 2, -1, -1):
            beside = columns[index - 1 if forth else index + 1]
            row = {id(place): number for number, place in enumerate(beside)}

            def middle(place, row=row, forth=forth, column=columns[index]):
                near = place.before if forth else after.get(id(place), [])
                rows = [row[id(one)] for one in near]
                return np.mean(rows) if rows else column.index(place)

            keys = {id(place): middle(place) for place in columns[index]}
            columns[index].sort(key=lambda place, keys=keys: keys[id(place)])
        _swap(columns)
        if (found := _crossings(columns)) < least:
            best, least = [list(column) for column in columns], found
    for column, kept in zip(columns, best, strict=True):
        column[:] = kept


def _swap(columns: list[list[Place]]) -> None:
    """Changes the places of two neighbours in a column wherever that takes crossings away."""
    least, better = _crossings(columns), True
    while better:
        better = False
        for column in columns:
            for row in range(len(column) - 1):
                column[row], column[row + 1] = column[row + 1], column[row]
                if (found := _crossings(columns)) < least:
                    least, better = found, True
                else:
                    column[row], column[row + 1] = column[row + 1], column[row]


def _set(columns: list[list[Place]]) -> None:
    """Sets x by column; and y such that connections have the least squares of their slopes."""
    # SciPy's optimizers take a quarter of a second to import, which only who draws needs.
    from scipy.optimize import lsq_linear

    right = 0.2
    for column in columns:
        longest = max(len(line) for place in column for line in place.label.split("\n"))
        width = max(0.15 + LETTER * longest, *(WIDTHS[place.kind] for place in column))
        for place in column:
            place.x, place.width = right + width / 2, width
        right += width + GAP
    # y of a place is its column's top less what is above it: at least the room, and a free part.
    sizes = [len(column) for column in columns]
    rows, fixed, count = {}, {}, sum(sizes)
    start = 0
    for column in columns:
        above = 0.0
        for index, place in enumerate(column):
            if index:
                both = HEIGHTS[column[index - 1].kind] + HEIGHTS[place.kind]
                above += both / 2 + ROOM
            row = np.zeros(count)
            row[start], row[start + 1 : start + index + 1] = 1, -1
            rows[id(place)], fixed[id(place)] = row, -above
        start += len(column)
    matrix, target = [], []
    for one, place in _links(columns):
        straight = STRAIGHT[(not one.kind) + (not place.kind)]
        matrix.append(straight * (rows[id(place)] - rows[id(one)]))
        target.append(straight * (fixed[id(one)] - fixed[id(place)]))
    for row in rows.values():  # what nothing holds stays near the middle
        matrix.append(0.03 * row)
        target.append(0.0)
    low = np.full(count, 0.0)
    low[np.cumsum([0, *sizes[:-1]])] = -np.inf
    found = lsq_linear(np.array(matrix), np.array(target), (low, np.inf)).x
    for column in columns:
        for place in column:
            place.y = float(rows[id(place)] @ found + fixed[id(place)])


def _draw(axis, place: Place) -> None:
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    half = place.width / 2
    line = dict(edgecolor="dimgray", linewidth=1.0)
    for one in place.before:
        start, end = one.x + one.width / 2, place.x - half
        middle = (start + end) / 2
        points = [(start, one.y), (middle, one.y), (middle, place.y), (end, place.y)]
        curve = Path(points, [Path.MOVETO, *[Path.CURVE4] * 3])
        axis.add_patch(PathPatch(curve, facecolor="none", zorder=1, **line))
    if not place.kind:
        axis.plot([place.x - half, place.x + half], [place.y] * 2, color="dimgray", lw=1.0)
        return
    height = HEIGHTS[place.kind]
    corner = (place.x - half, place.y - height / 2)
    style = "round,pad=0,rounding_size=" + ("0.06" if place.kind in ("op", "input") else "0.2")
    box = FancyBboxPatch(
        corner, 2 * half, height, style, facecolor=COLORS[place.kind], zorder=2, **line
    )
    axis.add_patch(box)
    text = dict(ha="center", va="center", fontsize=8, linespacing=1.05, zorder=3)
    axis.text(place.x, place.y, place.label, **text)
