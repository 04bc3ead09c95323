"""What the pictures share: an empty figure, and a grid with the names of its rows and columns."""

from collections.abc import Sequence

import numpy as np


def new_figure(width: float, height: float):
    """A Matplotlib figure of so many inches, at 100 dots an inch."""
    # The import costs more than half a second, which only who draws needs to spend.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def grid(figure, rows: Sequence[str], columns: Sequence[str], **options) -> np.ndarray:
    """Axes `(rows, columns)` with the names of rows on the left and of columns on top."""
    axes = figure.subplots(len(rows), len(columns), squeeze=False, **options)
    for row, name in zip(axes, rows, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=10)
    return axes


def patch(color, label: str):
    """An entry of a legend."""
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
