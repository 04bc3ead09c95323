"""A convolution by Winograd's algorithm, in any number of dimensions, strides and groups.

    z = A' [ sum_c (G g_c G') * (B' d_c B) ] A       (2-D: Lavin and Gray, equation 8)

with one matrix product over the channels c for each of the a^2 taps of a transformed tile. No value
exists for each tap and pair of channels.

A kernel of stride s, or with more taps than a tile is to have, is one of stride 1 and fewer taps on
more channels (DWM, arXiv 2002.00552): along an axis

    y_i = sum_k w_k x_(s i + k) = sum_(j, p) sum_t w_(s (j r + t) + p) x^p_(i + j r + t)

with the phases x^p_i = x_(s i + p) and pieces j of r taps. Their products are added up before the
output transform.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from efficient_nets.errors import UserError
from efficient_nets.ops import linear_maps
from efficient_nets.ops.linear_maps import ConvMap, wide
from efficient_nets.ops.quantizers.spec import Rounded, value
from efficient_nets.ops.straight_through import straight_through
from efficient_nets.ops.winograd.spec import Winograd
from efficient_nets.ops.winograd.transforms import Transforms, as_floats

# `(site, name, values) -> Rounded`, or None where nothing is rounded there. Names tell the values
# of a site apart.
Visit = Callable[[str, str, Array], Rounded | None]
PRODUCTS = "winograd_products"  # what a policy of `jax.checkpoint` can save
OF_KERNELS = "G"  # the names of the matrices that transform kernels begin so


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution: `phases` x `pieces` of `taps` taps, tiles of `tile`."""

    tile: int
    taps: int
    pieces: int
    phases: int

    @property
    def size(self) -> int:
        """a, values of a tile."""
        return self.tile + self.taps - 1

    @property
    def parts(self) -> int:
        return self.pieces * self.phases

    def tiles(self, outputs: int) -> int:
        return -(-outputs // self.tile)


def axis_of(form: Winograd, kernel: int, stride: int) -> Axis:
    """How an axis with so many taps and this stride is cut."""
    taps = -(-kernel // stride)
    pieces = -(-taps // (form.taps or taps))
    taps = -(-taps // pieces)
    form.check_taps(taps)
    # Phases behind the kernel's end have nothing of it.
    return Axis(form.tile if taps > 1 else 1, taps, pieces, min(stride, kernel))


@dataclasses.dataclass(frozen=True)
class WinogradMap:
    """Static: the convolution, and how it is computed. x and kernels as `direct` takes them.

    Raises:
      UserError: on a dilated convolution, or one of one tap.
    """

    direct: ConvMap
    form: Winograd

    def __post_init__(self):
        if set(self.direct.dilation) != {1}:
            raise UserError(
                f"algorithm='{self.form}' with dilation={self.direct.dilation}: tiles have no "
                "gaps; allowed for dilation 1, or algorithm='direct'"
            )
        if max(axis.taps for axis in self.axes) == 1:
            raise UserError(
                f"algorithm='{self.form}' with kernel_size={self.direct.kernel_size} and strides="
                f"{self.direct.strides}: one tap saves nothing; give algorithm='direct'"
            )

    @property
    def groups(self) -> int:
        return self.direct.groups

    @functools.cached_property
    def axes(self) -> tuple[Axis, ...]:
        pairs = zip(self.direct.kernel_size, self.direct.strides, strict=True)
        return tuple(axis_of(self.form, *pair) for pair in pairs)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The different numbers of taps that have transforms."""
        return tuple(sorted({axis.taps for axis in self.axes if axis.taps > 1}))

    def constants(self) -> dict[str, Array]:
        """The exact transforms by the names of the learned ones, such as 'BT3' of 3 taps."""
        found = {}
        for taps in self.kinds:
            exact = as_floats(self.form.transforms(taps))
            found |= {f"{name}{taps}": matrix for name, matrix in exact._asdict().items()}
        return {
            name: matrix
            for name, matrix in found.items()
            if not (self.form.transformed and name.startswith(OF_KERNELS))
        }

    def padded(self, x: Array) -> "tuple[Array, WinogradMap]":
        """x with its padding of zeros, and the map of that, which pads no more."""
        x, direct = self.direct.padded(x)
        return x, dataclasses.replace(self, direct=direct)

    def window_mean(self, x: Array) -> Array:
        return self.direct.window_mean(x)

    def multiplications(self, outputs: Sequence[int]) -> int:
        """Of one input channel and one feature, for so many outputs along each axis of an image."""
        pairs = zip(self.axes, outputs, strict=True)
        return math.prod(axis.size * axis.parts * axis.tiles(count) for axis, count in pairs)

    def output_size(self, x: Array) -> tuple[int, ...]:
        """Positions of the output along each spatial axis."""
        pads = self.direct.pads(x)
        sizes = zip(x.shape[1:-1], pads, self.direct.kernel_size, self.direct.strides, strict=True)
        return tuple(max((n + lo + hi - k) // s + 1, 0) for n, (lo, hi), k, s in sizes)


def apply(
    static: WinogradMap,
    x: Array,
    kernels: Sequence[Array],
    matrices: Mapping[str, Array],
    visit: Visit,
    names: tuple[str, Sequence[str]] = ("x", ("w",)),
    *,
    stepwise: bool = False,
) -> Array:
    """`(N, *spatial', B*C)`: what `static.direct` gives of x and the kernels.

    Args:
      static: The map.
      x: `(N, *spatial, in)`; transforms run in float32, products in x's type with float32 sums.
      kernels: B kernels `(*kernel_size, in/groups, C)`.
      matrices: As `WinogradMap.constants` has them.
      visit: Told of the values of each inner site, which it may round: 'transforms',
        'transformed_input' `(taps, N, tiles, in)`, 'transformed_kernel' `(taps, in/groups, C)`,
        'hadamard' `(taps, N, tiles, B*C)`, and 'between' the steps of a transform.
      names: By which `visit` is told what x is, and each kernel.
      stepwise: Whether `visit` is to be told of what is between the steps of all transforms. If
        not, kernels and outputs take theirs at once, which is faster.
    """
    of_x, of_kernels = names
    spatial = static.output_size(x)
    tiles = tuple(axis.tiles(n) for axis, n in zip(static.axes, spatial, strict=True))
    matrices = _seen_matrices(matrices, wide(x.dtype), visit)
    us = kernels
    if not static.form.transformed:
        us = [
            _kernel(
                static,
                kernel.astype(wide(x.dtype)),
                matrices,
                _between(visit, "kernel", name) if stepwise else None,
            )
            for kernel, name in zip(kernels, of_kernels, strict=True)
        ]
    v = _input(static, x, spatial, matrices, _between(visit, "input", of_x))
    v = v.reshape(-1, x.shape[0], math.prod(tiles), math.prod(v.shape[-2:]))
    found = visit("transformed_input", of_x, v)
    of_us = [visit("transformed_kernel", name, u) for u, name in zip(us, of_kernels, strict=True)]
    z = checkpoint_name(_products(static, x.dtype, v, us, found, of_us), PRODUCTS)
    found = visit("hadamard", of_x, z)
    z = z if found is None else value(found)
    seen = _between(visit, "output", of_x) if stepwise else None
    z = _output(static, z, tiles, spatial, matrices, seen)
    return z.astype(x.dtype)


def transformed_kernel(
    static: WinogradMap,
    kernel: Array,
    matrices: Mapping[str, Array],
    visit: Visit,
    name: str = "w",
    *,
    stepwise: bool = False,
) -> Array:
    """`(taps, parts * in/groups, C)`: what `apply` makes of a kernel before it rounds that."""
    matrices = _seen_matrices(matrices, kernel.dtype, visit)
    seen = _between(visit, "kernel", name) if stepwise else None
    return _kernel(static, kernel, matrices, seen)


def _seen_matrices(matrices: Mapping[str, Array], dtype, visit: Visit) -> dict[str, Array]:
    made = {}
    for name, matrix in matrices.items():
        made[name] = jnp.asarray(matrix, dtype)
        found = visit("transforms", name, made[name])
        made[name] = made[name] if found is None else value(found)
    return made


def _between(visit: Visit, transform: str, name: str) -> Callable[[str, Array, int], Array]:
    """What is made of the values behind a step of a transform.

    `visit` is told of `(taps, N, positions, C)`, for a kernel `(taps, positions, C)`.
    """

    def seen(step, x, lead):
        # `lead` axes of positions, then the batch where there is one, as at other inner sites.
        batch = () if transform == "kernel" else (x.shape[lead],)
        shape = (math.prod(x.shape[:lead]), *batch, -1, _channels(transform, x))
        found = visit("between", f"{transform}_{step}_{name}", x.reshape(shape))
        return x if found is None else value(found).reshape(x.shape)

    return seen


def _channels(transform: str, x: Array) -> int:
    """Of an input they are in the last two axes, groups and the channels of each."""
    return math.prod(x.shape[-2:]) if transform == "input" else x.shape[-1]


def _groups(static: WinogradMap, which: str, matrices) -> list[tuple[str, list[Array | None]]]:
    """A transform's steps, those along all axes at once together: a matrix for each axis."""
    passes = [matrices[f"{which}{axis.taps}"] if axis.taps > 1 else None for axis in static.axes]
    field, bases = Transforms._fields.index(which), []
    for axis, matrix in zip(static.axes, passes, strict=True):
        found = None if matrix is None else static.form.bases(axis.taps)
        exact = None if found is None else as_floats(found)[field]
        bases.append(None if exact is None else jnp.asarray(exact, matrix.dtype))
    groups = [("pass", passes)]
    if static.form.base != "canonical":
        groups.insert(len(groups) if which == "AT" else 0, ("base", bases))
    return groups


def _times(matrix: Array, x: Array) -> Array:
    """The matrix times x along its first axis."""
    # Of two matrices: XLA:CPU gives products of more axes layouts that it has to turn. Exact: by
    # default a TPU rounds the operands to bfloat16.
    y = jnp.matmul(matrix, x.reshape(x.shape[0], -1), precision=lax.Precision.HIGHEST)
    return y.reshape(-1, *x.shape[1:])


def _at_once(groups, x: Array) -> Array:
    """Takes x, whose first axes are the positions along the spatial ones, through all steps.

    A group is one product, with the Kronecker product of its matrices: more multiplications than
    along one axis after the other, but one pass over x.
    """
    for _, group in groups:
        group = [jnp.ones((1, 1), x.dtype) if matrix is None else matrix for matrix in group]
        whole = functools.reduce(jnp.kron, group)
        y = _times(whole, x.reshape(whole.shape[1], *x.shape[len(group) :]))
        x = y.reshape(*(len(matrix) for matrix in group), *y.shape[1:])
    return x


def _step_by_step(groups, x: Array, seen, enter=None) -> Array:
    """The same along one axis after the other, the last one first.

    With `enter` the positions are put in front one axis at a time: `enter(x, axis)`.
    """
    done, todo = 0, sum(matrix is not None for _, group in groups for matrix in group)
    for number, (kind, group) in enumerate(groups):
        for index in reversed(range(len(group))):
            if enter is not None and number == 0:
                x = enter(x, index)
            else:
                x = jnp.moveaxis(x, len(group) - 1, 0)
            if group[index] is None:
                continue
            x = _times(group[index], x)
            done += 1
            more = any(matrix is not None for matrix in group[:index])
            if done < todo and (kind == "pass" or not more):
                lead = len(group) - index if enter is not None and number == 0 else len(group)
                x = seen(f"{kind}{index}", x, lead)
    return x


def _input(static: WinogradMap, x: Array, outputs, matrices, seen) -> Array:
    """The transformed tiles, `(*sizes, N, *tiles, groups, parts * in/groups)`."""
    rank = len(static.axes)
    lows = [low for low, _ in static.direct.pads(x)]
    sides = []
    for axis, stride, size, low, count in zip(
        static.axes, static.direct.strides, x.shape[1:-1], lows, outputs, strict=True
    ):
        last = stride * (axis.tile * (axis.tiles(count) - 1) + axis.size - 1)
        last += stride * axis.taps * (axis.pieces - 1) + stride - 1
        sides.append((low, max(last + 1 - low - size, 0)))
    x = x.astype(wide(x.dtype)).reshape(*x.shape[:-1], static.groups, -1)
    x = jnp.pad(x, ((0, 0), *sides, (0, 0), (0, 0)))

    def enter(x, index):
        axis, stride = static.axes[index], static.direct.strides[index]
        place, step = rank, stride * axis.tile  # behind rank - 1 - index axes of positions, and N
        span = step * (axis.tiles(outputs[index]) - 1) + 1
        positions = []
        for u in range(axis.size):
            starts = [
                stride * (u + piece * axis.taps) + phase
                for piece in range(axis.pieces)
                for phase in range(axis.phases)
            ]
            parts = [lax.slice_in_dim(x, i, i + span, step, place) for i in starts]
            positions.append(jnp.concatenate(parts, axis=-1))
        return jnp.stack(positions)

    # Tiles overlap, so that one axis at a time is less to hold.
    return _step_by_step(_groups(static, "BT", matrices), x, seen, enter)


def _kernel(static: WinogradMap, kernel: Array, matrices, seen) -> Array:
    """The transformed kernel, `(taps, parts * in/groups, C)`."""
    rank = len(static.axes)
    missing = [
        axis.parts * axis.taps - size for axis, size in zip(static.axes, kernel.shape, strict=False)
    ]
    kernel = jnp.pad(kernel, (*((0, more) for more in missing), (0, 0), (0, 0)))

    def enter(kernel, index):
        axis, place = static.axes[index], rank - 1  # the last of the axes that are left
        shape = kernel.shape
        cut = (axis.pieces, axis.taps, axis.phases)
        kernel = kernel.reshape(*shape[:place], *cut, *shape[place + 1 :])
        kernel = jnp.moveaxis(kernel, place + 1, 0)
        kernel = jnp.moveaxis(kernel, (place + 1, place + 2), (-4, -3))
        return kernel.reshape(*kernel.shape[:-4], -1, kernel.shape[-1])

    groups = _groups(static, "G", matrices)
    if seen is None:
        kernel = _at_once(groups, functools.reduce(enter, reversed(range(rank)), kernel))
    else:
        kernel = _step_by_step(groups, kernel, seen, enter)
    return kernel.reshape(-1, *kernel.shape[-2:])


def _output(static: WinogradMap, z: Array, tiles, outputs, matrices, seen) -> Array:
    """z `(taps, N, tiles, C)` to `(N, *spatial', C)`."""
    rank = len(static.axes)
    sizes = [axis.size for axis in static.axes]
    z = z.reshape(*sizes, z.shape[1], *tiles, z.shape[-1])
    groups = _groups(static, "AT", matrices)
    z = _at_once(groups, z) if seen is None else _step_by_step(groups, z, seen)
    order = [axis for i in range(rank) for axis in (rank + 1 + i, i)]
    z = jnp.transpose(z, (rank, *order, 2 * rank + 1))
    whole = [n * axis.tile for axis, n in zip(static.axes, tiles, strict=True)]
    z = z.reshape(z.shape[0], *whole, z.shape[-1])
    return z[(slice(None), *map(slice, outputs))]


def _products(
    static: WinogradMap, dtype, v: Array, us: Sequence[Array], seen, seen_kernels
) -> Array:
    """`(taps, N, tiles, B*C)`: v `(taps, N, tiles, in)` times the kernels `(taps, in/groups, C)`.

    Where both have codes and scales that can be taken out of the sums, the products are of the
    codes, as in `ops.branch_maps`. Where all are whole numbers they are in the widest type of
    these, and their sums in int32.
    """

    def products(v, us, operand, out):
        u = linear_maps.fuse([u.astype(operand) for u in us], static.groups)
        v = v.astype(operand).reshape(*v.shape[:-1], static.groups, -1)
        u = u.reshape(*u.shape[:-1], static.groups, -1)
        z = jnp.einsum("antgd,adgo->antgo", v, u, preferred_element_type=out)
        return z.reshape(*z.shape[:-2], -1)

    def values(x, found):
        return x if found is None else value(found)

    exact, sums = None, wide(dtype)
    if _has_codes(seen, seen_kernels):
        # In float epochs v's codes are the values themselves.
        types = [x.dtype for x in (seen.codes, *us)]
        whole = all(jnp.issubdtype(each, jnp.integer) for each in types)
        codes = us if whole else [found.codes for found in seen_kernels]
        widest = max(types, key=lambda each: jnp.iinfo(each).bits) if whole else dtype
        operands = (widest, jnp.int32) if whole else (dtype, sums)
        z = products(seen.codes, codes, *operands).astype(sums)
        scales = [
            jnp.broadcast_to(found.scale, (*found.scale.shape[:2], u.shape[-1]))
            for u, found in zip(us, seen_kernels, strict=True)
        ]
        exact = z * (seen.scale * linear_maps.fuse(scales, static.groups)[:, None])
        if whole:
            return exact
    kernels = [values(*pair) for pair in zip(us, seen_kernels, strict=True)]
    plain = products(values(v, seen), kernels, dtype, sums)
    return plain if exact is None else straight_through(lax.stop_gradient(exact), plain)


def _has_codes(v: Rounded | None, us: Sequence[Rounded | None]) -> bool:
    """Whether all have codes, and scales for taps and features alone."""
    return (
        all(found is not None and found.codes is not None for found in (v, *us))
        and set(v.scale.shape[1:]) <= {1}
        and all(found.scale.shape[-2] == 1 for found in us)
    )
