"""The kernels of a layer's branches: arrays, or the cores of factorized ones."""

import dataclasses
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


class Draws(nnx.RngState):
    """Of dropout: the key of a kernel, and how often it was drawn. Of training alone."""


class Kernel(nnx.Module):
    """Parameters of a factorized kernel: an array a core, under its name.

    Attributes:
      network: Static: how they contract.
      run: Static: a key of `factorization.RUNS`.
      dropout: Static: the probability with which an index of a bond is left out.
      seed, calls: With dropout, the key data and the number of draws so far, from which a mask
        follows: a run that is resumed, or is on other devices, has the same ones.
      deterministic: As of `nnx.Dropout`: `model.eval()` sets it, and nothing is left out then.
    """

    def __init__(self, network: Network, run: str, cores: factorization.Cores):
        self.network, self.run, self.dropout, self.deterministic = network, run, 0.0, False
        for name, core in cores.items():
            setattr(self, name, nnx.Param(core))

    @property
    def variables(self) -> dict[str, nnx.Variable]:
        return {name: getattr(self, name) for name, _ in self.network.cores}

    @property
    def cores(self) -> dict[str, Array]:
        return {name: core[...] for name, core in self.variables.items()}

    def value(self, cores: factorization.Cores | None = None) -> Factored:
        """The kernel as `ops` take it, of its own cores if none are given.

        They are as they are held; `Layer.value` rounds them.
        """
        return Factored(self.network, self.run, self.cores if cores is None else cores)

    def specify(self, form: Factorization, rngs: nnx.Rngs) -> None:
        """Takes over what a form with the same network says; a new dropout draws anew."""
        self.run = form.run
        if form.dropout == self.dropout:
            return
        if not form.dropout:
            del self.seed, self.calls
        elif not self.dropout:
            self.seed = Draws(jax.random.key_data(rngs.params()))
            self.calls = Draws(jnp.zeros((), jnp.int32))
        self.dropout = form.dropout

    @property
    def drops(self) -> bool:
        return self.dropout > 0 and not self.deterministic

    def dropped(self, value: Factored) -> Factored:
        """Its value as a call computes with it: in training with dropout, by the next draw.

        Outside of any `custom_vjp`, so that every way of computing with it has its gradient.
        """
        if not self.drops:
            return value
        key = jax.random.fold_in(jax.random.wrap_key_data(self.seed[...]), self.calls[...])
        cores = factorization.dropped(self.network, value.cores, self.dropout, key)
        return dataclasses.replace(value, cores=cores)

    def count(self) -> None:
        """A call was made: the next one draws anew."""
        if self.drops:
            self.calls[...] = self.calls[...] + 1

    def take(self, cores: factorization.Cores) -> None:
        """Takes the values of other cores of the same network."""
        for name, core in cores.items():
            getattr(self, name)[...] = core

    def resize(self, network: Network, cores: factorization.Cores) -> None:
        """Takes the cores of a network with other sizes of bonds."""
        self.network = network
        for name, core in cores.items():
            setattr(self, name, nnx.Param(core))


class Joint(nnx.Module):
    """A layer's part of a kernel that several layers share, in the place of its own `Kernel`.

    Attributes:
      shared: The `Kernel` of all layers, one object that each of them holds.
      index: Static: which of its slices this layer's kernel is.
      run: Static: a key of `factorization.RUNS`.
    """

    def __init__(self, shared: Kernel, index: int):
        self.shared, self.index, self.run = shared, index, shared.run

    @property
    def network(self) -> Network:
        """Of this layer's kernel."""
        return factorization.layer_network(self.shared.network)

    @property
    def cores(self) -> dict[str, Array]:
        """Of all layers together."""
        return self.shared.cores

    def value(self, cores: factorization.Cores | None = None) -> Factored:
        """This layer's kernel as `ops` take it, of the shared cores if none are given."""
        cores = self.cores if cores is None else cores
        network, own = factorization.layer_of(self.shared.network, cores, self.index)
        return Factored(network, self.run, own)

    def specify(self, form: Factorization, rngs: nnx.Rngs) -> None:
        """Takes over what a form with the same network says of this layer."""
        self.run = form.run

    def dropped(self, value: Factored) -> Factored:
        """The value itself: shared cores have no dropout."""
        return value

    def count(self) -> None:
        """Nothing was drawn."""


def resolved(
    geometry: Geometry, spec: LayerSpec, kept: Mapping[str, Array], layers: int = 0
) -> Factorization | str:
    """What the kernels of a layer are: the spec's factorization, its ranks known, or 'dense'.

    The latter where the cores would have as many parameters as the kernels.

    Args:
      kept: The kernels that are decomposed, for ranks that depend on them.
      layers: How many layers share them, `(layers, *kernel_size, in, features)` each; 0: none.

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
        found = factorization.with_ranks(found, list(kept.values()), layers)
    network = found.network(geometry.kernel_shape, layers)
    gains = network.params < network.dense_params
    return found if gains or found.always else factorization.DENSE


def fresh(
    network: Network, kernel_init: Initializer, dtype: jnp.dtype, rngs: nnx.Rngs
) -> dict[str, Array]:
    """Independent normal cores whose kernel has the mean square of a dense one's."""
    dense = kernel_init(rngs.params(), network.kernel_shape, dtype)
    return normal(network, jnp.mean(jnp.square(dense)), rngs)


def normal(network: Network, target: Array, rngs: nnx.Rngs) -> dict[str, Array]:
    """Independent normal cores whose kernel has this mean square, in its type.

    They start with the deviation that gives it in the mean (`factorization.core_scale`), and are
    all multiplied by what makes it exact. Where dense kernels start at 0, the last core does.
    """
    dtype, starts = target.dtype, target > 0
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


def fresh_joint(network: Network, dense: Array, rngs: nnx.Rngs) -> dict[str, Array]:
    """The same of a joint network, in which each layer's kernel has the mean square of its own.

    Args:
      network: Of the layers together.
      dense: Fresh kernels of the layers, `network.kernel_shape`.
    """
    cores = normal(network, jnp.mean(jnp.square(dense)), rngs)
    target, made = (
        jnp.mean(jnp.square(kernels.reshape(len(kernels), -1)), axis=1)
        for kernels in (dense, factorization.reconstruct(network, cores))
    )
    factors = jnp.where(made > 0, jnp.sqrt(target / jnp.where(made > 0, made, 1)), 1)
    return factorization.scale_layers(network, cores, factors)
