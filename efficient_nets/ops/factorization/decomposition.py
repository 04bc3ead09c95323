"""Cores from a kernel: the inverse of `network.reconstruct`, as near as the bonds allow.

All of it can be traced: shapes depend on the network alone.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops.factorization.network import Cores, Network, contract, tensor

HIGHEST = lax.Precision.HIGHEST
SWEEPS = {"cp": 100, "tr": 20, "tucker": 8, "bt": 4}  # of the methods that repeat
MOST_UNKNOWNS = 600  # of the normal equations with which rings and block terms end
POWERS = 20  # iterations for an eigenvalue, which need not be exact
NOISE = 0.01  # of what a ring has beyond TR-SVD
# Of normal equations, as a share of their trace: rounding makes errors of a few epsilon of it,
# beyond which eigenvalues can be negative.
RIDGE = 4


def decompose(form: str, network: Network, kernel: Array) -> dict[str, Array]:
    """Cores as of `approximate`, with scales with which all learn alike: see `_paced`."""
    found = _paced(network, approximate(form, network, kernel))
    return {name: core.astype(kernel.dtype) for name, core in found.items()}


def approximate(form: str, network: Network, kernel: Array) -> dict[str, Array]:
    """Cores whose contraction is near the kernel, equal to it where the bonds are large enough.

    TT-SVD, TR-SVD, HT-SVD and ST-HOSVD split one core after another off the tensor. Tucker goes on
    with HOOI, TR with alternating least squares, which is all of CP; of block terms each is in turn
    the Tucker form of what the others leave. Of the scales of cores the product alone is given.

    Args:
      form: A key of `forms.FORMS`.
      network: Of this form.
      kernel: `network.kernel_shape`.
    """
    x = network.padded_kernel(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    methods = {"cp": _cp, "tucker": _tucker, "tr": _ring, "bt": _block_terms}
    return methods.get(form, split)(network, x)


def _paced(network: Network, cores: Cores) -> dict[str, Array]:
    """The same product, with scales under which a step moves it equally far through each core.

    A step of gradient descent along core c moves the kernel by up to `lambda_c` times what it would
    move a dense one: the largest eigenvalue of E'E, E being the contraction of the others. Factors
    s_c whose product is 1 make it `lambda_c / s_c^2`, and the sum of these is least where all are
    the same. Equal sizes of numbers instead leave a small core between large ones with a rate that
    diverges.
    """
    curvatures = {name: _curvature(network, cores, name) for name in cores}
    positive = functools.reduce(jnp.logical_and, [value > 0 for value in curvatures.values()])
    logs = {name: jnp.log(jnp.where(positive, value, 1.0)) for name, value in curvatures.items()}
    mean = sum(logs.values()) / len(logs)
    return {name: core * jnp.exp((logs[name] - mean) / 2) for name, core in cores.items()}


def _curvature(network: Network, cores: Cores, name: str) -> Array:
    """Largest eigenvalue of E'E of this core, by power iteration."""

    def made(core):
        return tensor(network, {**cores, name: core})

    _, back = jax.vjp(made, cores[name])

    def step(_, found):
        vector, _ = found
        moved = back(made(vector))[0]  # made is linear in the core
        size = jnp.linalg.norm(moved.ravel())
        return moved / jnp.maximum(size, jnp.finfo(moved.dtype).tiny), size

    start = jax.random.normal(jax.random.key(0), cores[name].shape, cores[name].dtype)
    start = start / jnp.linalg.norm(start.ravel())
    zero = jnp.zeros((), start.dtype)
    return lax.fori_loop(0, POWERS, step, (start, zero))[1]


def relative_error(network: Network, cores: Cores, kernel: Array) -> Array:
    """`|kernel - reconstructed| / |kernel|`, in Frobenius norms."""
    x = network.padded_kernel(kernel)
    return _distance(network, cores, x) / jnp.linalg.norm(x.ravel())


def _distance(network: Network, cores: Cores, x: Array) -> Array:
    return jnp.linalg.norm((x - tensor(network, cores)).ravel())


def split(network: Network, x: Array) -> dict[str, Array]:
    """Splits one core after another off: an SVD between its indices and the rest.

    Of a chain that is TT-SVD, of a ring TR-SVD, of a tree HT-SVD, of a star ST-HOSVD.
    """
    have, cores = network.modes, {}
    for position, (name, indices) in enumerate(network.cores[:-1]):
        later = {index for _, others in network.cores[position + 1 :] for index in others}
        bonds = tuple(index for index in indices if index in later)
        own = tuple(index for index in indices if index not in later)
        rest = tuple(index for index in have if index not in own)
        matrix = contract([(x, have)], (*own, *rest)).reshape(network.size(*own), -1)
        basis, x = _low_rank(matrix, network.size(*bonds))
        shape = tuple(map(network.size, (*own, *bonds)))
        cores[name] = contract([(basis.reshape(shape), (*own, *bonds))], indices)
        have = (*bonds, *rest)
        x = x.reshape(tuple(map(network.size, have)))
    name, indices = network.cores[-1]
    cores[name] = contract([(x, have)], indices)
    return _balanced(cores)


def _low_rank(matrix: Array, rank: int) -> tuple[Array, Array]:
    """`(n, rank)` with orthonormal columns, and what times it is next to the matrix.

    Both end in zeros where the rank is above what the matrix can have, as a ring's may be.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    u, rest = u[:, :rank], s[:rank, None] * vt[:rank]
    missing = max(rank - u.shape[1], 0)
    return jnp.pad(u, ((0, 0), (0, missing))), jnp.pad(rest, ((0, missing), (0, 0)))


def _balanced(cores: Cores) -> dict[str, Array]:
    """The same product, all cores having the same root of mean square, for training."""
    sizes = {name: jnp.sqrt(jnp.mean(jnp.square(core))) for name, core in cores.items()}
    logs = [jnp.log(jnp.maximum(size, jnp.finfo(size.dtype).tiny)) for size in sizes.values()]
    mean = jnp.exp(sum(logs) / len(logs))
    able = functools.reduce(jnp.logical_and, [size > 0 for size in sizes.values()])
    return {
        name: core * jnp.where(able, mean / jnp.where(able, sizes[name], 1), 1)
        for name, core in cores.items()
    }


def _tucker(network: Network, x: Array, start: Cores | None = None) -> dict[str, Array]:
    """ST-HOSVD, and HOOI from there (De Lathauwer et al. 2000)."""
    *leaves, (name, bonds) = network.cores
    first = split(network, x) if start is None else start
    factors = {leaf: _orthonormal(first[leaf]) for leaf, _ in leaves}

    def project(factors, but=None):
        have = dict(leaves)
        others = [(factors[leaf], have[leaf]) for leaf in have if leaf != but]
        out = bonds
        if but is not None:
            *own, bond = have[but]
            out = (*own, *(index for index in bonds if index != bond))
        return contract([(x, network.modes), *others], out, precision=HIGHEST)

    def sweep(_, factors):
        for leaf, indices in leaves:
            *own, bond = indices
            matrix = project(factors, but=leaf).reshape(network.size(*own), -1)
            basis = _low_rank(matrix, network.size(bond))[0]
            factors = factors | {leaf: basis.reshape(tuple(map(network.size, indices)))}
        return factors

    factors = lax.fori_loop(0, SWEEPS["tucker"], sweep, factors)
    return _balanced(factors | {name: project(factors)})


def _orthonormal(factor: Array) -> Array:
    """Columns of unit length again: `_balanced` multiplied them all alike."""
    flat = factor.reshape(-1, factor.shape[-1])
    lengths = jnp.linalg.norm(flat, axis=0, keepdims=True)
    return (flat / jnp.maximum(lengths, jnp.finfo(factor.dtype).tiny)).reshape(factor.shape)


def _block_terms(network: Network, x: Array) -> dict[str, Array]:
    """Each block in turn is the Tucker form of what the others leave; small ones join in the end.

    Least squares for a core of all blocks at once finds what one block after another does not.
    """
    blocks = network.size("n")
    one = dataclasses.replace(
        network,
        cores=tuple(
            (name, tuple(i for i in indices if i != "n")) for name, indices in network.cores
        ),
    )
    empty = {name: jnp.zeros((blocks, *shape), x.dtype) for name, shape in one.shapes.items()}

    def each(step, cores):
        block = step % blocks
        own = {name: core[block] for name, core in cores.items()}
        rest = x - tensor(network, cores) + tensor(one, own)
        found = _tucker(one, rest)
        return {name: core.at[block].set(found[name]) for name, core in cores.items()}

    found = lax.fori_loop(0, SWEEPS["bt"] * blocks, each, empty)
    if not _solvable(network):
        return found
    return _least_squares(network, x, found, lambda cores: cores, SWEEPS["tr"])


def _cp(network: Network, x: Array) -> dict[str, Array]:
    """Least squares from the singular vectors of each unfolding, beyond these from random numbers.

    Of as many terms as there are slices the terms are these themselves.
    """
    if exact := _slices(network, x):
        return _equal_columns(exact)
    rank, start = network.size("r"), _random(network, x.dtype)
    for name, (*own, _) in network.cores:
        rest = tuple(mode for mode in network.modes if mode not in own)
        matrix = contract([(x, network.modes)], (*own, *rest)).reshape(network.size(*own), -1)
        vectors = _low_rank(matrix, min(rank, *matrix.shape))[0]
        more = start[name].reshape(-1, rank)[:, vectors.shape[1] :] / len(vectors) ** 0.5
        start[name] = jnp.concatenate([vectors, more], axis=1).reshape(network.shapes[name])
    return _least_squares(network, x, start, _equal_columns, SWEEPS["cp"])


def _ring(network: Network, x: Array) -> dict[str, Array]:
    """TR-SVD (Zhao et al., arXiv 1606.05535), and least squares from there.

    The bonds of the first core share what rank its unfolding has; what the others, or larger bonds,
    have beyond that starts small at random, and is put to use by the least squares: but for bonds
    so large that their normal equations are.
    """
    (_, (first, *own, second)), *_ = network.cores
    able = min(network.size(*own), network.size(*network.modes) // network.size(*own))
    one = min(network.size(first), max(math.isqrt(able), -(-able // network.size(second))))
    other = min(network.size(second), max(able // one, 1))
    limited = network.with_sizes({first: one, second: other})
    start = split(limited, x)
    for (name, shape), noise in zip(
        network.shapes.items(), _random(network, x.dtype).values(), strict=True
    ):
        grown = [(0, size - has) for size, has in zip(shape, start[name].shape, strict=True)]
        size = jnp.sqrt(jnp.mean(jnp.square(start[name])))
        noise = NOISE * size * noise / jnp.std(noise) if shape != limited.shapes[name] else 0
        start[name] = jnp.pad(start[name], grown) + noise
    if not _solvable(network):
        return _balanced(start)
    return _least_squares(network, x, start, _balanced, SWEEPS["tr"])


def _solvable(network: Network) -> bool:
    bonds = [[i for i in of if i not in network.modes] for _, of in network.cores]
    return max(network.size(*of) for of in bonds) <= MOST_UNKNOWNS


def _random(network: Network, dtype) -> dict[str, Array]:
    keys = jax.random.split(jax.random.key(0), len(network.cores))
    pairs = zip(keys, network.shapes.items(), strict=True)
    return {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in pairs}


def _least_squares(network: Network, x: Array, start: Cores, balanced, sweeps: int):
    """Each core in turn is the best beside the others (ALS), as long as that brings it nearer.

    With E the contraction of the others, the core solves `core (E'E) = x E'`, over its bonds. Both
    sides are contracted core by core: E itself, as large as x times the bonds, never exists.
    """

    def primed(indices):
        return tuple(i if i in network.modes else f"{i}'" for i in indices)

    def solve(name, indices, cores):
        bonds = tuple(i for i in indices if i not in network.modes)
        own = tuple(i for i in indices if i in network.modes)
        others = [(cores[other], of) for other, of in network.cores if other != name]
        seen = contract([(x, network.modes), *others], (*own, *bonds), precision=HIGHEST)
        twice = [(core, primed(of)) for core, of in others]
        normal = contract([*others, *twice], (*bonds, *primed(bonds)), precision=HIGHEST)
        size = network.size(*bonds)
        normal = normal.reshape(size, size)
        float_type = jnp.finfo(x.dtype)
        ridge = jnp.maximum(RIDGE * float_type.eps * jnp.trace(normal), float_type.tiny)
        normal += ridge * jnp.eye(size, dtype=x.dtype)
        solved = jax.scipy.linalg.solve(normal, seen.reshape(-1, size).T, assume_a="pos").T
        shape = tuple(map(network.size, (*own, *bonds)))
        return contract([(solved.reshape(shape), (*own, *bonds))], indices)

    def sweep(_, found):
        best, least = found
        cores = best
        for name, indices in network.cores:
            cores = cores | {name: solve(name, indices, cores)}
        cores = balanced(cores)
        distance = _distance(network, cores, x)
        better = distance < least  # not so if a solution failed
        return jax.tree.map(functools.partial(jnp.where, better), (cores, distance), found)

    start = balanced(start)
    return lax.fori_loop(0, sweeps, sweep, (start, _distance(network, start, x)))[0]


def _slices(network: Network, x: Array) -> dict[str, Array] | None:
    """Where the rank is that of all slices: unit vectors, and the slices in the largest factor."""
    *_, (largest, own) = sorted(network.cores, key=lambda core: network.size(*core[1]))
    others = [(name, indices[:-1]) for name, indices in network.cores if name != largest]
    number, rank = network.size(*(i for _, modes in others for i in modes)), network.size("r")
    if rank < number:
        return None
    modes = [i for _, other in others for i in other]
    flat = contract([(x, network.modes)], (*own[:-1], *modes))
    flat = flat.reshape(*map(network.size, own[:-1]), number)
    spread = [(0, 0)] * (len(own) - 1) + [(0, rank - number)]
    found, after = {largest: jnp.pad(flat, spread)}, number
    for name, indices in others:
        size = network.size(*indices)
        after //= size
        which = (jnp.arange(number) // after) % size
        found[name] = jnp.pad(
            jax.nn.one_hot(which, size, axis=0, dtype=x.dtype), [(0, 0), (0, rank - number)]
        ).reshape(network.shapes[name])
    return found


def _equal_columns(factors: Cores) -> dict[str, Array]:
    """The same terms, the length of each spread over its factors alike."""
    flat = {name: factor.reshape(-1, factor.shape[-1]) for name, factor in factors.items()}
    lengths = {name: jnp.linalg.norm(f, axis=0, keepdims=True) for name, f in flat.items()}
    whole = math.prod(lengths.values()) ** (1 / len(lengths))  # 0 where one of them is
    return {
        name: (f * (whole / jnp.where(lengths[name] > 0, lengths[name], 1))).reshape(
            factors[name].shape
        )
        for name, f in flat.items()
    }
