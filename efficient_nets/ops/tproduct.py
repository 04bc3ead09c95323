"""Products of third-order tensors, slice by slice behind a transform along their tubes.

    from efficient_nets.ops import tproduct

    dct = tproduct.transform("dct", 28)
    y = tproduct.product(x, kernel, dct)  # (28, N, in), (28, in, out) to (28, N, out)

The literature multiplies W `(out, in, n)` by X `(in, N, n)`, rows x columns x tubes of n numbers,
under an invertible M along the tubes (Kernfeld, Kilmer, Aeron 2015, "Tensor-tensor products with
invertible linear transforms"; the DFT is the t-product of Kilmer, Martin 2011):

    W * X = M^-1( M(W) . M(X) ),    . one matrix product for each frontal slice

Here the axis of the tubes comes first and rows last: x `(n, ..., in)`, kernel `(n, in, out)`. The
slices are then the leading axis of one batched matrix product, and a transform is one matrix
product with what lies behind it as columns: neither moves an axis, forward or backward.

M is a constant `(n, n)` matrix: for tubes of a few dozen numbers one matrix product takes no longer
than a fast transform. The DFT runs as an FFT nevertheless, in float32 at least, as XLA has one for
any n: of real tubes it gives the n // 2 + 1 slices that are not conjugates of others.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops.linear_maps import wide

GIVEN = "given"  # the kind of a transform whose matrix a caller gives
MAX_CONDITION = 1e4  # of such a matrix: float32 keeps about 3 of its 7 digits


def _dct(size: int) -> np.ndarray:
    """The orthonormal DCT-II."""
    k, j = np.ogrid[:size, :size]
    scale = np.where(k == 0, 1, 2) / size
    return np.sqrt(scale) * np.cos(np.pi * k * (2 * j + 1) / (2 * size))


def _toeplitz_hankel(size: int) -> np.ndarray:
    """W^-1 C (I + Z) of Kernfeld et al.: C is the DCT-II, W its first column as a diagonal matrix.

    Z has ones above the diagonal. Tensors then multiply as the block-Toeplitz-plus-Hankel matrices
    do that have their frontal slices as entries. 1 in column 0, 2 cos(pi k j / n) in the others.
    """
    k, j = np.ogrid[:size, :size]
    return np.where(j == 0, 1, 2) * np.cos(np.pi * k * j / size)


def _dft(size: int) -> np.ndarray:
    k, j = np.ogrid[:size, :size]
    return np.exp(-2j * np.pi * k * j / size)


def _wavelet(step: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """A periodic wavelet transform, of as many levels as the size can be halved evenly."""
    if size % 2:
        raise UserError(
            f"tubes={size}: a wavelet halves tubes, so their length must be even; it has as many "
            "levels as that length has factors of 2"
        )
    matrix, low = np.eye(size), size
    while low % 2 == 0:
        matrix[:low] = step(matrix[:low])
        low //= 2
    return matrix


def _haar_step(x: np.ndarray) -> np.ndarray:
    even, odd = x[::2], x[1::2]
    return np.concatenate([even + odd, even - odd]) / math.sqrt(2)


def _cdf53_step(x: np.ndarray) -> np.ndarray:
    """By lifting: what the mean of both neighbours does not predict, then means that stay."""
    even, odd = x[::2], x[1::2]
    detail = odd - (even + np.roll(even, -1, 0)) / 2
    smooth = even + (detail + np.roll(detail, 1, 0)) / 4
    return np.concatenate([smooth * math.sqrt(2), detail / math.sqrt(2)])


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family of transforms: its matrix by size, and how products under it are computed.

    `execution` is 'matmul', 'fft', or 'dense': one product with the matrix of `to_dense`.
    """

    matrix: Callable[[int], np.ndarray]
    execution: str = "matmul"


TRANSFORMS = {
    "dct": Kind(_dct),
    # The DFT's product, the t-product: by FFT, and by its definition, which takes n times as many
    # multiplications, but in the input's type and in one matrix product.
    "dft": Kind(_dft, "fft"),
    "circulant": Kind(_dft, "dense"),
    "toeplitz_hankel": Kind(_toeplitz_hankel),
    "haar": Kind(functools.partial(_wavelet, _haar_step)),  # orthonormal
    "bior": Kind(functools.partial(_wavelet, _cdf53_step)),  # CDF 5/3, also called bior2.2
    "identity": Kind(np.eye),  # slices that have nothing to do with each other
}


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible linear map of tubes, hashable; made by `transform`.

    Attributes:
      kind: A key of `TRANSFORMS`, or 'given'.
      size: n, the length of the tubes.
      rows: The matrix of a 'given' one.
    """

    kind: str
    size: int
    rows: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"tubes={self.size}: must be at least 1")
        if self.kind != GIVEN:
            names.pick("transform", self.kind, TRANSFORMS).matrix(self.size)

    def __str__(self) -> str:
        return self.kind

    @property
    def execution(self) -> str:
        return TRANSFORMS[self.kind].execution if self.kind in TRANSFORMS else "matmul"

    @property
    def is_real(self) -> bool:
        return not np.iscomplexobj(self.matrices[0])

    @property
    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """M and its inverse `(n, n)`, in double precision."""
        return _matrices(self)


@functools.lru_cache
def _matrices(of: Transform) -> tuple[np.ndarray, np.ndarray]:
    matrix = np.array(of.rows) if of.kind == GIVEN else TRANSFORMS[of.kind].matrix(of.size)
    found = matrix, np.linalg.inv(matrix)
    for shared in found:
        shared.flags.writeable = False
    return found


def transform(given: str | np.ndarray, size: int) -> Transform:
    """The transform of tubes of `size` numbers: a key of `TRANSFORMS`, or a matrix `(size, size)`.

    Wavelets have as many levels as the size has factors of 2: 2 for 28, 5 for 32.

    Raises:
      UserError: on another name, an odd size of a wavelet, or a matrix that is not real, finite, of
        that shape, and invertible in float32 (condition number at most `MAX_CONDITION`).
    """
    if isinstance(given, str):
        return Transform(given, size)
    matrix = np.asarray(given)
    if matrix.shape != (size, size) or matrix.dtype.kind not in "iuf":
        raise UserError(
            f"transform: a matrix {matrix.shape} of {matrix.dtype} for tubes={size}; allowed are "
            f"real ones {(size, size)}, and {', '.join(sorted(TRANSFORMS))}"
        )
    matrix = matrix.astype(np.float64)
    condition = np.linalg.cond(matrix) if np.all(np.isfinite(matrix)) else np.inf
    if not condition <= MAX_CONDITION:
        raise UserError(
            f"transform: the matrix has a condition number of {condition:.3g}; allowed are those "
            f"up to {MAX_CONDITION:.0e}, with which float32 can go there and back"
        )
    return Transform(GIVEN, size, tuple(map(tuple, matrix.tolist())))


def to_slices(x: Array, by: Transform) -> Array:
    """M along the tubes: `(n, ...)` to the frontal slices `(slices, ...)`.

    There are n of them, of x's type; of the DFT of real tubes the first n // 2 + 1, complex.
    """
    if not by.is_real:
        return jnp.fft.rfft(x.astype(wide(x.dtype)), axis=0)
    return _along_tubes(by.matrices[0], x, by)


def from_slices(x: Array, by: Transform) -> Array:
    """Undoes `to_slices`: real tubes `(n, ...)` of slices."""
    if not by.is_real:
        return jnp.fft.irfft(x, n=by.size, axis=0)
    return _along_tubes(by.matrices[1], x, by)


def _along_tubes(matrix: np.ndarray, x: Array, by: Transform) -> Array:
    if by.kind == "identity":
        return x
    return jnp.tensordot(jnp.asarray(matrix, x.dtype), x, axes=1)


def product(x: Array, kernel: Array, by: Transform) -> Array:
    """The tensors' product `W * X` under a transform.

    Both are real and so is the result. Linear in x and in the kernel; the gradients are products
    with transposed slices, under the transposed transforms.

    Args:
      x: `(n, ..., in)`: each of the tensors that lie along `...` is a lateral slice of X.
      kernel: `(n, in, out)`, W with its rows and columns exchanged.
      by: Of tubes of n numbers.

    Returns:
      `(n, ..., out)`, of x's type.

    Raises:
      UserError: if the shapes do not go together.
    """
    if x.ndim < 2 or kernel.ndim != 3 or {x.shape[0], kernel.shape[0]} != {by.size}:
        raise UserError(
            f"tubes={by.size}: x {x.shape} and kernel {kernel.shape} must be (tubes, ..., in) and "
            "(tubes, in, out)"
        )
    if x.shape[-1] != kernel.shape[1]:
        rows = kernel.shape[1]
        raise UserError(f"x {x.shape} has not the {rows} rows of a kernel {kernel.shape}")
    kernel = kernel.astype(x.dtype)
    if by.execution == "dense":
        return jnp.einsum("j...i,jiko->k...o", x, _blocks(kernel, by))
    slices = jnp.einsum("s...i,sio->s...o", to_slices(x, by), to_slices(kernel, by))
    return from_slices(slices, by).astype(x.dtype)


def to_dense(kernel: Array, by: Transform) -> Array:
    """The matrix of a kernel: `(n, in, out)` to `(n in, n out)`, for x with tubes and rows as one.

    Block-circulant under the DFT, block-Toeplitz-plus-Hankel under the DCT.
    """
    tubes, rows, columns = kernel.shape
    return _blocks(kernel, by).reshape(tubes * rows, tubes * columns)


def _blocks(kernel: Array, by: Transform) -> Array:
    """`(n, in, n, out)`: from tube entry j and row i to tube entry k and column o."""
    if not by.is_real:
        j, k = np.ogrid[: by.size, : by.size]
        return jnp.swapaxes(kernel[(k - j) % by.size], 1, 2)
    forward, inverse = (jnp.asarray(matrix, kernel.dtype) for matrix in by.matrices)
    return jnp.einsum("ks,sio,sj->jiko", inverse, to_slices(kernel, by), forward)


def tubal_softmax(x: Array, by: Transform) -> Array:
    """The softmax over rows whose scalars are tubes: `M^-1 softmax(M x)`, slice by slice.

    Args:
      x: `(n, ..., rows)`.
      by: Of tubes of n numbers, real.

    Returns:
      `(n, ..., rows)`: tubes that add up over the rows to the algebra's one, which is `M^-1 1`.

    Raises:
      UserError: under the DFT. Its slices are complex: what the exponentials are divided by can be
        0 there, and what comes out is no probability.
    """
    return from_slices(jax.nn.softmax(_real_slices(x, by), axis=-1), by)


def log_probabilities(x: Array, by: Transform) -> Array:
    """The tubal softmax reduced to numbers: `log(mean over slices of softmax(M x))`.

    A tube y acts on others as a matrix with the eigenvalues M y; their mean is its trace / n, y[0]
    for a circulant one. It is linear, takes the algebra's one to 1 and slices from 0 on to numbers
    from 0 on: so tubes become probabilities. M^-1 and the reduction are one step here. The sum
    along a tube would not do: under a DCT it is slice 0 up to a factor, and all others were lost.

    Args:
      x, by: As in `tubal_softmax`.

    Returns:
      `(..., rows)`, of x's type: logits, of which `softmax` gives the probabilities as they are.
    """
    slices = _real_slices(x.astype(wide(x.dtype)), by)
    found = jax.nn.logsumexp(jax.nn.log_softmax(slices, axis=-1), axis=0)
    return (found - math.log(by.size)).astype(x.dtype)


def check_real(by: Transform) -> None:
    """Raises a UserError if a tubal softmax is not defined under this transform."""
    if not by.is_real:
        allowed = sorted(k for k, kind in TRANSFORMS.items() if kind.matrix is not _dft)
        raise UserError(
            f"transform={by.kind!r}: its slices are complex, and a softmax of these gives no "
            f"probabilities; allowed {', '.join(allowed)}, or a real matrix"
        )


def _real_slices(x: Array, by: Transform) -> Array:
    check_real(by)
    return to_slices(x, by)


def gain(by: Transform) -> float:
    """Variance of a product's values for one row, x and kernel being independent of variance 1.

    The mean over the tube. 1 for orthonormal transforms, n for the DFT: with G = M M^H and
    P = M^-T conj(M^-1), it is sum(P G^2) / n, element by element.
    """
    forward, inverse = by.matrices
    gram = forward @ forward.conj().T
    return float(np.sum((inverse.T @ inverse.conj()) * gram**2).real) / by.size


def multiplications(by: Transform, rows: int, columns: int) -> int:
    """Real ones for one lateral slice: those of the slices, 4 for a complex one, and of both M.

    An FFT's are not counted, nor those of the kernel's transform, which no input changes.
    """
    if by.execution == "dense":
        return by.size**2 * rows * columns
    if by.execution == "fft":
        return 4 * (by.size // 2 + 1) * rows * columns
    of_slices = by.size * rows * columns
    return of_slices + (by.kind != "identity") * by.size**2 * (rows + columns)
