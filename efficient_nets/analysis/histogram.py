"""Histograms of weights, gradients and activations, on the host."""

import dataclasses

import numpy as np

BINS = 64


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Of the finite values of an array; values that are not finite are counted apart.

    Attributes:
      edges: `(B + 1,)`, evenly spaced from the smallest finite value to the largest.
      counts: `(B,)`, integers; a bin holds its lower edge, the last one its upper edge too.
      mean, std: Of the finite values, not of the bins; 0 if there are none.
      nonfinite: Number of NaN and infinities.
    """

    edges: np.ndarray
    counts: np.ndarray
    mean: float
    std: float
    nonfinite: int

    def quantiles(self, shares) -> np.ndarray:
        """Values below which these shares lie, counted as spread evenly inside their bin."""
        below = np.concatenate([[0], np.cumsum(self.counts)])
        return np.interp(np.asarray(shares) * below[-1], below, self.edges)


def histogram(x, bins: int = BINS) -> Histogram:
    """The histogram of an array of any shape and floating type."""
    # In float64, a range of two numbers next to each other can still be cut into bins.
    values = np.asarray(x, np.float32).astype(np.float64).ravel()
    finite = values[np.isfinite(values)]
    counts, edges = np.histogram(finite, bins)
    mean, std = (finite.mean(), finite.std()) if finite.size else (0.0, 0.0)
    return Histogram(edges, counts, float(mean), float(std), values.size - finite.size)
