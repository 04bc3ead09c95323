"""A kernel as a network of cores: small arrays whose contraction it is.

An index is a mode of the kernel - of a window, of inputs, of outputs - or a bond, which is summed
over. A bond may be in more than two cores, as the rank of CP is.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops.factorization import order

Cores = Mapping[str, Array]
LAYERS = "l"  # the mode that numbers the layers of a joint network, the first of its window


@dataclasses.dataclass(frozen=True)
class Network:
    """What is static of a factorized kernel `(*kernel_size, in, features)`.

    Attributes:
      cores: Name and indices of each core.
      sizes: Of each index.
      spatial, inputs, outputs: The modes, in the order in which they make up the kernel's window,
        its inputs and its features. The product of the sizes may be larger than what it makes up:
        the kernel is what is in the range.
      kernel_shape: Of the kernel.
    """

    cores: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[tuple[str, int], ...]
    spatial: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kernel_shape: tuple[int, ...]

    def size(self, *indices: str) -> int:
        """Of the product of these indices."""
        return math.prod(self._sizes[index] for index in indices)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def indices(self) -> dict[str, tuple[str, ...]]:
        """Of each core, by its name."""
        return dict(self.cores)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each core, by its name."""
        return {name: tuple(map(self.size, indices)) for name, indices in self.cores}

    @property
    def modes(self) -> tuple[str, ...]:
        return (*self.spatial, *self.inputs, *self.outputs)

    @property
    def bonds(self) -> tuple[str, ...]:
        """In the order in which the cores have them."""
        found = dict.fromkeys(index for _, indices in self.cores for index in indices)
        return tuple(index for index in found if index not in self.modes)

    @property
    def params(self) -> int:
        """Numbers that the cores hold."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def dense_params(self) -> int:
        """Numbers of the kernel."""
        return math.prod(self.kernel_shape)

    def with_sizes(self, sizes: Mapping[str, int]) -> "Network":
        """The same with other sizes of these indices."""
        return dataclasses.replace(self, sizes=tuple({**self._sizes, **sizes}.items()))

    @property
    def transposed(self) -> "Network":
        """Of the kernel `(features, in)`, of the same cores."""
        inputs, features = self.kernel_shape
        return dataclasses.replace(
            self, inputs=self.outputs, outputs=self.inputs, kernel_shape=(features, inputs)
        )

    def padded_kernel(self, kernel: Array) -> Array:
        """The kernel as a tensor `(modes)`, with zeros where the modes make up more."""
        lead = math.prod(self.kernel_shape[:-2])
        full = (lead, self.size(*self.inputs), self.size(*self.outputs))
        kernel = kernel.reshape(lead, *self.kernel_shape[-2:])
        kernel = jnp.pad(
            kernel, [(0, more - size) for more, size in zip(full, kernel.shape, strict=True)]
        )
        return kernel.reshape(tuple(map(self.size, self.modes)))

    def cut_kernel(self, tensor: Array) -> Array:
        """Undoes `padded_kernel`."""
        lead = math.prod(self.kernel_shape[:-2])
        tensor = tensor.reshape(lead, self.size(*self.inputs), self.size(*self.outputs))
        inputs, features = self.kernel_shape[-2:]
        return tensor[:, :inputs, :features].reshape(self.kernel_shape)


def contract(
    operands: Sequence[tuple[Array, Sequence[str]]],
    out: Sequence[str],
    *,
    optimize="auto",
    precision=None,
) -> Array:
    """The sum over all indices but those of the result, in which each operand may have others."""
    numbers = {}
    arguments = []
    for array, indices in operands:
        arguments += [array, [numbers.setdefault(index, len(numbers)) for index in indices]]
    arguments.append([numbers[index] for index in out])
    return jnp.einsum(*arguments, optimize=optimize, precision=precision)


def tensor(network: Network, cores: Cores) -> Array:
    """What the cores make: `(modes)`, each with its size."""
    operands = [(cores[name], indices) for name, indices in network.cores]
    path = order.best([of for _, of in operands], network.modes, dict(network.sizes))
    # Of parameters: as exact as the kernel that a dense layer holds.
    return contract(operands, network.modes, optimize=path, precision=lax.Precision.HIGHEST)


def reconstruct(network: Network, cores: Cores) -> Array:
    """The kernel that the cores make: `(*kernel_size, in, features)`."""
    return network.cut_kernel(tensor(network, cores))


def core_scale(network: Network, variance: float | Array) -> float | Array:
    """Standard deviation of independent cores whose contraction has this variance.

    An element is a sum over all bonds of products of one number a core, so that with d cores

        sigma_core = (variance / prod of bond sizes)^(1 / 2d)
    """
    return (variance / network.size(*network.bonds)) ** (1 / (2 * len(network.cores)))
