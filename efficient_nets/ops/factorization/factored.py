"""A factorized kernel in the place of an array."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.ops.factorization.network import Cores, Network, reconstruct


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["cores"], meta_fields=["network", "run"]
)
@dataclasses.dataclass(frozen=True)
class Factored:
    """The cores of a kernel, their network, and a key of `spec.RUNS`. A tree of arrays."""

    network: Network
    run: str
    cores: Cores

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.result_type(*self.cores.values())


def dense(kernel: Array | Factored) -> Array:
    """The kernel as an array: `(*kernel_size, in, features)`."""
    return reconstruct(kernel.network, kernel.cores) if isinstance(kernel, Factored) else kernel
