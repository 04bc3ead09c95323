"""Rows of a kernel `(vocabulary, features)`, of a factorized one by gathering slices of its cores.

An id is a number whose digits are positions along the modes of the inputs, the first the highest:

    id = ((d_1 n_2 + d_2) n_3 + d_3) ...,    0 <= d_j < n_j

and its row is what is left of the network when each core that has such modes is taken at these
digits. So TT gives `row[o_1, o_2, ...] = G_1[d_1, o_1] G_2[d_2, o_2] ...`, a product of matrices
(Khrulkov et al., arXiv 1901.10787). All rows contract at once, and no table of them all exists.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.errors import UserError
from efficient_nets.ops.factorization import order
from efficient_nets.ops.factorization.execution import BATCH, Cost, contraction
from efficient_nets.ops.factorization.factored import Factored, dense
from efficient_nets.ops.factorization.network import Cores, Network, contract


def lookup(kernel: Array | Factored, ids: Array, dtype: jnp.dtype | None = None) -> Array:
    """The rows of these ids: `(...)` whole numbers to `(..., features)`.

    As `jnp.take` and `flax.nnx.Embed` have it, ids from -vocabulary to -1 count from the end, and
    the rows of others outside of the vocabulary are NaN, also those that padded modes would have.

    Args:
      kernel: `(vocabulary, features)`; a factorized one is computed as its `run` says, see
        `lookup_cost`.
      ids: Of any integer type and shape.
      dtype: Of the result, and of the products of cores; the kernel's if not given.

    Raises:
      UserError: if the ids are not integers, or of a type that cannot count the vocabulary.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"the ids have dtype {ids.dtype}: an integer one is needed")
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(jnp.int32)  # which counts from the end too
    dtype = dtype or kernel.dtype
    if isinstance(kernel, Factored):
        network = kernel.network
        cost = lookup_cost(network, kernel.run, ids.size)
        if cost is not None:
            rows = functools.partial(_from_cores, network, dtype)
            # As `factorized_map`: again in the backward pass where keeping it takes more than that.
            rows = jax.checkpoint(rows) if cost.kept > 2 * network.dense_params else rows
            return rows(kernel.cores, ids)
    return jnp.take(dense(kernel), ids, axis=0, mode="fill").astype(dtype)


def lookup_cost(network: Network, run: str, ids: int) -> Cost | None:
    """What the rows of so many ids cost core by core; None if they are taken from the whole table.

    run='reconstructed' makes that first, and so does 'auto' where making and reading it takes fewer
    operations and bytes, as it does for more ids than the vocabulary has.
    """
    if run == "reconstructed":
        return None
    operands = _gathered(network)
    rows = contraction(network, operands, (BATCH, *network.outputs), {BATCH: ids})
    slices = sum(ids * network.size(*of[1:]) for of in operands if of[0] == BATCH)
    # Read from the cores, and written for the contraction, which counts reading them.
    rows += Cost(moved=2 * slices, kept=slices)
    if run == "auto":
        every = [of for _, of in network.cores]
        table = contraction(network, every, network.modes, {})
        table += Cost(moved=2 * ids * network.kernel_shape[-1])
        if table.time < rows.time:
            return None
    return rows


def _gathered(network: Network) -> list[tuple[str, ...]]:
    """Indices of each core once its modes of inputs, if it has any, are gathered."""
    return [
        (BATCH, *(i for i in of if i not in network.inputs))
        if set(of) & set(network.inputs)
        else of
        for _, of in network.cores
    ]


def _from_cores(network: Network, dtype: jnp.dtype, cores: Cores, ids: Array) -> Array:
    vocabulary, features = network.kernel_shape
    sizes = tuple(map(network.size, network.inputs))
    flat = ids.reshape(-1)
    if jnp.iinfo(flat.dtype).max < network.size(*network.inputs):
        raise UserError(
            f"the ids have dtype {ids.dtype}, which does not count up to the "
            f"{network.size(*network.inputs):,} of in_modes={sizes}"
        )
    flat = jnp.where(flat < 0, flat + vocabulary, flat)
    inside = (flat >= 0) & (flat < vocabulary)
    digits = dict(
        zip(network.inputs, jnp.unravel_index(jnp.where(inside, flat, 0), sizes), strict=True)
    )

    def gather(core: Array, indices: tuple[str, ...]) -> Array:
        def at(digits):
            place = tuple(digits.get(index, slice(None)) for index in indices)
            return core.at[place].get(mode="promise_in_bounds")

        own = {index: digits[index] for index in indices if index in digits}
        return (jax.vmap(at)(own) if own else core).astype(dtype)

    operands = _gathered(network)
    out = (BATCH, *network.outputs)
    path = order.best(operands, out, dict(network.sizes) | {BATCH: flat.size})
    arrays = [gather(cores[name], indices) for name, indices in network.cores]
    # Of parameters: as exact as the rows that a table holds.
    rows = contract(
        list(zip(arrays, operands, strict=True)),
        out,
        optimize=path,
        precision=lax.Precision.HIGHEST,
    )
    rows = rows.reshape(flat.size, network.size(*network.outputs))[:, :features]
    rows = jnp.where(inside[:, None], rows, jnp.asarray(jnp.nan, dtype))
    return rows.reshape(*ids.shape, features)
