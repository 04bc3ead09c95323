"""Eigenvalues and rank of the quadratic form that an output feature of a layer computes.

The form of a neuron is the symmetric matrix Q of its terms of second order, in the n inputs of an
output value, the layer's window: x'Qx. It is the sum of

    (Ax)(Bx)   (a b' + b a') / 2   of rows a and b; (Ax)^2 gives a a', of rank 1
    C x^2      diag(c)
    x'Qx       Q itself

A branch norm multiplies its branch's kernel by scale / sqrt(var + epsilon), running statistics; its
shift, as a bias, changes no term of second order. The norm behind the layer is left out.

R products alone are M J M' with M the n x 2R matrix of their rows and J the 2R x 2R one that pairs
them, so M = QR gives the 2R eigenvalues R J R' that are not zero for certain, exactly and without a
matrix of n x n. For one product these are (a.b + |a||b|) / 2 and (a.b - |a||b|) / 2: a form of rank
2 has one eigenvalue of either sign.
"""

import dataclasses

import numpy as np

from efficient_nets.analysis.terms import SECOND_ORDER, kind_of
from efficient_nets.layers import Layer
from efficient_nets.ops import forms

# Eigenvalues kept of one layer: with more, only its first features are looked at. A feature with a
# diagonal has n of them, which take an n x n matrix.
EIGENVALUES = 8192


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Of the first F features of a layer.

    Attributes:
      inputs: n.
      features: That the layer has; F of them are here.
      eigenvalues: `(F, min(n, 2R))` for R products alone, else `(F, n)`; largest first. The others
        are zero. NaN where a coefficient is not finite.
      rank: `(F,)`, eigenvalues above n times float32's epsilon times the largest, in magnitude.
    """

    inputs: int
    features: int
    eigenvalues: np.ndarray
    rank: np.ndarray


def layer_spectrum(layer: Layer, most: int = EIGENVALUES) -> Spectrum | None:
    """None for a neuron without terms of second order.

    Args:
      layer: A Dense or Conv; of a convolution with groups, n counts the inputs of one group.
      most: Eigenvalues to keep: features beyond `most` of them are left out, but for the first.
    """
    parts, n = layer.spec.parts, layer.geometry.inputs
    terms = [term for term in parts.terms if kind_of(parts, term) in SECOND_ORDER]
    if not terms:
        return None
    kinds = {kind_of(parts, term) for term in terms}
    width = min(n, 2 * len(terms)) if kinds == {"product"} else n
    features = min(layer.geometry.features, max(most // width, 1))
    kernels = {
        name: _folded_kernel(layer, name)[:, :features] for name in {k for t in terms for k in t}
    }
    finite = np.all([np.isfinite(kernel).all(axis=0) for kernel in kernels.values()], axis=0)
    kernels = {name: np.where(finite, kernel, 0.0) for name, kernel in kernels.items()}
    if kinds == {"product"}:
        found = _of_products([[kernels[name] for name in term] for term in terms])
    elif kinds == {"square"}:
        found = sum(kernels[name] for (name,) in terms).T
    else:
        found = np.linalg.eigvalsh(
            sum(_matrices(kind_of(parts, term), [kernels[k] for k in term]) for term in terms)
        )
    found = -np.sort(-found, axis=-1)
    largest = np.abs(found).max(axis=-1, keepdims=True)
    rank = np.sum(np.abs(found) > n * np.finfo(np.float32).eps * largest, axis=-1)
    found = np.where(finite[:, None], found, np.nan)
    return Spectrum(n, layer.geometry.features, found, rank)


def _folded_kernel(layer: Layer, name: str) -> np.ndarray:
    """A branch's kernel as it is computed with, times its norm's slope: `(rows, features)`."""
    branch = getattr(layer, name)
    kernel = np.asarray(layer.rounded_kernel(name), np.float64)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    if branch.norm is None:
        return kernel
    scale, var = (np.asarray(x[...], np.float64) for x in (branch.norm.scale, branch.norm.var))
    return kernel * scale / np.sqrt(var + branch.norm.epsilon)


def _of_products(pairs) -> np.ndarray:
    """`(features, min(n, 2R))`, of R pairs of rows `(n, features)`."""
    rows = np.stack([row for pair in pairs for row in pair], axis=-1)  # (n, features, 2R)
    triangle = np.linalg.qr(np.moveaxis(rows, 1, 0), mode="r")
    pairing = np.kron(np.eye(len(pairs)), [[0.0, 0.5], [0.5, 0.0]])
    return np.linalg.eigvalsh(triangle @ pairing @ np.moveaxis(triangle, -1, -2))


def _matrices(kind: str, kernels) -> np.ndarray:
    """`(features, n, n)` of one term."""
    if kind == "product":
        a, b = (kernel.T for kernel in kernels)
        outer = a[:, :, None] * b[:, None, :]
        return (outer + np.moveaxis(outer, -1, -2)) / 2
    if kind == "square":
        return kernels[0].T[:, :, None] * np.eye(len(kernels[0]))
    return np.asarray(forms.form_matrices(kernels[0].astype(np.float32)), np.float64)
