"""The arrays of a layer's quantizers: what is learned, what is observed, and how both start."""

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efficient_nets.layers.geometry import Geometry
from efficient_nets.layers.neuron import Branch
from efficient_nets.ops import branch_maps, quantizers
from efficient_nets.ops.branch_maps import Ranges
from efficient_nets.ops.precision import Precision
from efficient_nets.ops.quantizers import Arrays, Quantizer
from efficient_nets.ops.quantizers.spec import CORE


class Codes(nnx.Variable):
    """A kernel of whole numbers, see `deploy.to_integers`. It is not trained."""


class Observed(nnx.Variable):
    """What a quantizer observes; moved in training only, and not by gradients."""


class Range(nnx.Module):
    """One quantizer's arrays, under the names that its method gives them.

    Attributes:
      quantizer: Static spec.
      use_running_average: As of a batch norm: `model.eval()` sets it, and nothing moves then.
    """

    def __init__(self, quantizer: Quantizer, like: Array, rngs: nnx.Rngs):
        self.quantizer, self.use_running_average = quantizer, False
        self.learned, self.observed = (), ()
        self.set(quantizers.start(quantizer, like))
        if "seed" in self.observed:
            self.seed[...] = jax.random.key_data(rngs.params())

    def set(self, arrays: Arrays) -> None:
        """Takes other arrays for those that it has."""
        for name in (*self.learned, *self.observed):
            delattr(self, name)
        self.learned, self.observed = tuple(arrays.learned), tuple(arrays.observed)
        for kind, found in ((nnx.Param, arrays.learned), (Observed, arrays.observed)):
            for name, value in found.items():
                setattr(self, name, kind(value))

    def arrays(self) -> Arrays:
        learned, observed = (
            {name: getattr(self, name)[...] for name in names}
            for names in (self.learned, self.observed)
        )
        return Arrays(learned, observed)

    def update(self, arrays: Arrays) -> None:
        """Takes the observed arrays as a training step moved them."""
        for name in self.observed:
            getattr(self, name)[...] = arrays.observed[name]


def make(
    geometry: Geometry, precision: Precision, branches: dict[str, Branch], rngs: nnx.Rngs
) -> dict[str, Range]:
    """A `Range` for each site around the map, a kernel's under its branch's name.

    Those of cores are under `core_name`. A kernel's or a core's begins as its values say; that of
    an input or output, which are not known, as for a normal distribution, cut off at 0 where the
    quantizer is unsigned: see `calibration`.
    """
    made = {}
    for site, quantizer in precision.quantizers.items():
        if site in precision.inner:
            continue
        if site == CORE:
            for name, branch in branches.items():
                cores = typical_cores(branch.value().cores, rngs)
                made |= {core_name(name, x): Range(quantizer, v, rngs) for x, v in cores.items()}
            continue
        if site != "kernel":
            channels = geometry.in_features if site == "input" else geometry.features
            made[site] = Range(quantizer, _typical(quantizer, channels), rngs)
            continue
        for name, branch in branches.items():
            like = typical_kernel(geometry, branch.dense(), rngs)
            made[name] = Range(quantizer, like, rngs)
    return made


def inner(
    values: Mapping[tuple[str, str], Array], precision: Precision, rngs: nnx.Rngs
) -> dict[str, Range]:
    """A `Range` for each site inside of a map, for values such as `Layer.inner_values` gives."""
    return {
        branch_maps.inner_name(site, name): Range(precision.quantizers[site], value, rngs)
        for (site, name), value in values.items()
        if site in precision.inner
    }


def typical_kernel(geometry: Geometry, kernel: Array, rngs: nnx.Rngs) -> Array:
    """The kernel, or a fresh one where it is 0 everywhere: ReLinear starts some so."""
    fresh = geometry.kernel_init(rngs.params(), kernel.shape, kernel.dtype)
    return jnp.where(jnp.any(kernel != 0), kernel, fresh)


def core_name(branch: str, core: str) -> str:
    """The key in a layer's `ranges` of the quantizer of a core."""
    return branch_maps.inner_name(CORE, f"{branch}_{core}")


def typical_cores(cores: Mapping[str, Array], rngs: nnx.Rngs) -> dict[str, Array]:
    """The cores; for one that is 0 everywhere normal values of the mean square of the largest.

    Fresh ones have the same, but the last of a kernel that starts at 0.
    """
    size = jnp.sqrt(jnp.max(jnp.stack([jnp.mean(jnp.square(core)) for core in cores.values()])))
    return {
        name: jnp.where(
            jnp.any(core != 0),
            core,
            size * jax.random.normal(rngs.params(), core.shape, core.dtype),
        )
        for name, core in cores.items()
    }


def typical_images(geometry: Geometry, quantizer: Quantizer | None) -> Array:
    """`(4, 16, ..., in_features)` of a normal distribution, cut off at 0 as a quantizer says."""
    shape = (4, *(max(16, 2 * size) for size in geometry.kernel_size), geometry.in_features)
    values = jax.random.normal(jax.random.key(0), shape, geometry.param_dtype)
    return values if quantizer is None or quantizer.signed else jnp.maximum(values, 0)


@functools.cache
def _quantiles() -> np.ndarray:
    """Of a normal distribution, in the middle of 256 equal shares: float64 `(256,)`.

    JAX's own takes longer to trace than all else of a layer.
    """
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])


def _typical(quantizer: Quantizer, channels: int) -> Array:
    """A sample `(1, 256, channels)`: quantiles of a normal distribution, alike for each channel."""
    values = jnp.asarray(_quantiles(), jnp.result_type(float))
    values = values if quantizer.signed else jnp.maximum(values, 0)
    return jnp.broadcast_to(values.reshape(1, -1, 1), (1, 256, channels))


def arrays(ranges: nnx.Dict | None, branches: Sequence[str]) -> Ranges:
    """What `ops` take of the ranges: not those of cores, which they get rounded."""
    ranges = ranges or {}
    found = {
        name: range_.arrays()
        for name, range_ in ranges.items()
        if name not in branches and range_.quantizer.site != CORE
    }
    if of_kernels := tuple(ranges[name].arrays() for name in branches if name in ranges):
        found["kernel"] = of_kernels
    return found


def update(ranges: nnx.Dict, branches: Sequence[str], moved: Ranges) -> None:
    """Undoes `arrays`, for what a training step observed."""
    of_kernels = dict(zip(branches, moved.get("kernel", ()), strict=False))
    for name, found in (moved | of_kernels).items():
        if name not in ("kernel", branch_maps.LEARNED):
            ranges[name].update(found)


def advance(ranges: Iterable[Range], epoch: Array | float) -> None:
    """Moves the ranges to what their schedules say of this epoch, a step's beginning.

    `hold`, behind an optimizer's step, keeps the frozen ones where they are.
    """
    for found in ranges:
        found.set(quantizers.advance(found.quantizer, found.arrays(), epoch))


def hold(ranges: Iterable[Range], before: Iterable[Range]) -> None:
    """Takes back what an optimizer's step did to ranges that their schedules have frozen."""
    for found, old in zip(ranges, before, strict=True):
        found.set(quantizers.held(found.quantizer, old.arrays(), found.arrays()))


def draw_later(ranges: nnx.Dict | None, calls: Array | int) -> None:
    """Noise is drawn as that many calls later."""
    for found in (ranges or {}).values():
        if "calls" in found.observed:
            found.calls[...] = found.calls[...] + calls


def losses(ranges: nnx.Dict | None, x: Array, held: Callable[[str], Array | None]) -> list[Array]:
    """The quantization losses of input, kernels and cores, of those that have a weight.

    Args:
      ranges: Of a layer.
      x: Its input.
      held: What it has for a range to round, see `Layer.held`.
    """
    found = []
    for name, range_ in (ranges or {}).items():
        if range_.quantizer.loss:
            own = held(name)
            value = x if own is None else own
            found.append(quantizers.loss(range_.quantizer, value, range_.arrays()))
    return found
