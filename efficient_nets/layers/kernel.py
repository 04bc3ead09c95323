"""The kernels of a layer's branches: arrays, or the cores of factorized ones."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers.geometry import Geometry, Initializer
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.ops import factorization
from efficient_nets.ops.factorization import Factored, Factorization, Network


class Kernel(nnx.Module):
    """Parameters of a factorized kernel: an array a core, under its name.

    Attributes:
      network: Static: how they contract.
      run: Static: a key of `factorization.RUNS`.
    """

    def __init__(self, network: Network, run: str, cores: factorization.Cores):
        self.network, self.run = network, run
        for name, core in cores.items():
            setattr(self, name, nnx.Param(core))

    def value(self) -> Factored:
        """The cores as they are held; `Layer.value` rounds them."""
        cores = {name: core[...] for name, core in self.cores.items()}
        return Factored(self.network, self.run, cores)

    @property
    def cores(self) -> dict[str, nnx.Variable]:
        return {name: getattr(self, name) for name, _ in self.network.cores}


def resolved(geometry: Geometry, spec: LayerSpec, kept: Mapping[str, Array]) -> Factorization | str:
    """What the kernels of a layer are: the spec's factorization, its ranks known, or 'dense'.

    The latter where the cores would have as many parameters as the kernels.

    Args:
      kept: The kernels that are decomposed, for ranks that depend on them.

    Raises:
      UserError: if such a rank is asked for where kernels have no numbers, or groups do not go
        with the spec.
    """
    found = spec.kernel
    if found == factorization.DENSE:
        return found
    if geometry.groups > 1 and found.run == "factorized":
        raise UserError(
            f"kernel='{found}' with groups={geometry.groups}: a convolution with groups takes the "
            "whole kernel; leave out run=factorized"
        )
    if found.of_kernel:
        if not kept or any(isinstance(kernel, jax.core.Tracer) for kernel in kept.values()):
            raise UserError(
                f"kernel='{found}': its rank depends on the numbers of a kernel, which are not "
                "known under jit, nor from a config, nor of a new layer: give a number or a "
                "share, or find it by --mode=decompose"
            )
        found = factorization.with_ranks(found, list(kept.values()))
    network = found.network(geometry.kernel_shape)
    gains = network.params < network.dense_params
    return found if gains or found.always else factorization.DENSE


def fresh(
    network: Network, kernel_init: Initializer, dtype: jnp.dtype, rngs: nnx.Rngs
) -> dict[str, Array]:
    """Independent normal cores whose kernel has the mean square of a dense one's.

    They start with the deviation that gives it in the mean (`factorization.core_scale`), and are
    all multiplied by what makes it exact. Where dense kernels start at 0, the last core does.
    """
    dense = kernel_init(rngs.params(), network.kernel_shape, dtype)
    target = jnp.mean(jnp.square(dense))
    starts = target > 0
    target = jnp.where(starts, target, 1 / math.prod(network.kernel_shape[:-1]))
    scale = factorization.core_scale(network, target)
    cores = {
        name: scale * jax.random.normal(rngs.params(), shape, dtype)
        for name, shape in network.shapes.items()
    }
    made = jnp.mean(jnp.square(factorization.reconstruct(network, cores)))
    factor = (target / made) ** (1 / (2 * len(cores)))
    cores = {name: core * factor for name, core in cores.items()}
    last = network.cores[-1][0]
    return cores | {last: jnp.where(starts, cores[last], 0)}
