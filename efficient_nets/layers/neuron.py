"""The parameters of a neuron's branches, and the ways in which they start."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers import kernel as kernels
from efficient_nets.layers.geometry import Geometry
from efficient_nets.layers.norm import BatchNorm
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.layers.spectral import SpectralNorm
from efficient_nets.ops import factorization, forms
from efficient_nets.ops.factorization import Factored, Network

# What the coefficients of one layer's quadratic forms may take, and the kernels of forms of low
# rank: the former grow with the square of the inputs. 3x3 kernels on 64 channels, 64 features, take
# 43 MB; on 512, 512 features, 22 GB.
FORM_BYTES = 2**30

# E x^4 / (E x^2)^2 of the inputs that start='variance' is made for.
KURTOSIS = {"variance": 3.0, "variance:relu": 6.0}  # of a Gaussian, and of one cut off at 0
# The output's second moment that keeps the next layer's input at 1; half of it passes a ReLU, but
# where no output is negative.
MOMENT = {"variance": 1.0, "variance:relu": 2.0}


class Branch(nnx.Module):
    """Parameters of one linear map: `kernel`, perhaps `bias` `(C,)`, perhaps a branch norm.

    The kernel is an array, a `Kernel` with the cores of a factorized one, or a layer's part of one
    that layers share, `Joint`. `spectral` is what it is divided by, or None.
    """

    def __init__(
        self,
        shape,
        *,
        network=None,
        run="",
        use_bias,
        norm,
        spectral=False,
        kernel_init,
        bias_init,
        param_dtype,
        rngs,
    ):
        features = shape[-1]
        if network is None:
            self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        else:
            cores = kernels.fresh(network, kernel_init, param_dtype, rngs)
            self.kernel = kernels.Kernel(network, run, cores)
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (features,), param_dtype)) if use_bias else None
        )
        self.norm = BatchNorm(features, rngs=rngs) if norm else None
        # Drawn last: with and without it all else starts alike.
        self.spectral = SpectralNorm(features, param_dtype, rngs=rngs) if spectral else None

    @property
    def factored(self) -> bool:
        return isinstance(self.kernel, kernels.Kernel | kernels.Joint)

    @property
    def held(self) -> Array | Factored:
        """The kernel as its parameters say, not divided by its spectral norm."""
        return self.kernel.value() if self.factored else self.kernel[...]

    def value(self) -> Array | Factored:
        """The kernel as `ops` take it."""
        return self.held if self.spectral is None else self.spectral.normed(self.held)

    def dense(self) -> Array:
        """The kernel as an array."""
        return factorization.dense(self.value())

    def fix(self) -> None:
        """Puts the kernel as it is computed with in the place of the one that was divided."""
        if self.spectral is None:
            return
        value, self.spectral = self.value(), None
        if self.factored:
            self.kernel.take(value.cores)
        else:
            self.kernel[...] = value

    def set_dense(self, kernel: Array, form: str) -> None:
        """Takes the values of a kernel, a factorized one those of its decomposition."""
        if isinstance(self.kernel, kernels.Joint):
            raise UserError("a kernel that layers share cannot be set for one of them alone")
        if self.factored:
            self.kernel.take(factorization.decompose(form, self.kernel.network, kernel))
        else:
            self.kernel[...] = kernel


@dataclasses.dataclass(frozen=True)
class Neuron:
    """What `make` gives: a `Branch` a name, and the bias of the combined value, if any."""

    branches: dict[str, Branch]
    bias: nnx.Param | None


def kernel_shape(geometry: Geometry, reads: str) -> tuple[int, ...]:
    """Of a branch that reads 'x', 'square' or 'form'."""
    if reads != "form":
        return geometry.kernel_shape
    return forms.pairs(geometry.inputs), geometry.features


def make(
    geometry: Geometry,
    spec: LayerSpec,
    rngs: nnx.Rngs,
    network: Network | None = None,
    before: Mapping[str, Branch] | None = None,
) -> Neuron:
    """Fresh branches by `spec.start`; from those that there were `before` if it says so.

    Args:
      geometry, spec: Of the layer.
      rngs: Of fresh values.
      network: That of factorized kernels.
      before: The branches whose values a 'relinear' start, a single one, or 'kept' carries on.

    Raises:
      UserError: if a form is too large or has a rank above its size, or the start does not fit.
    """
    parts = spec.parts
    _check_forms(geometry, spec)
    use_bias = geometry.use_bias or parts.biased
    made = {}
    for index, name in enumerate(parts.branches):
        reads = parts.read_by(name)
        made[name] = Branch(
            kernel_shape(geometry, reads),
            network=network,
            run="" if network is None else spec.kernel.run,
            use_bias=use_bias and parts.bias == "branch",
            norm=spec.norm == "branch",
            spectral=spec.kernel_norm == "spectral",
            kernel_init=_kernel_init(geometry, spec, index, reads),
            bias_init=geometry.bias_init,
            param_dtype=geometry.param_dtype,
            rngs=rngs,
        )
    bias = None
    if use_bias and parts.bias == "output":
        initial = geometry.bias_init(rngs.params(), (geometry.features,), geometry.param_dtype)
        bias = nnx.Param(initial)
    neuron = Neuron(made, bias)
    if spec.start == "relinear":
        _start_linear(neuron, spec, next(iter((before or {}).values()), None))
    elif spec.start == "kept":
        _keep(neuron, spec, before)
    return neuron


def _check_forms(geometry: Geometry, spec: LayerSpec) -> None:
    inputs, features = geometry.inputs, geometry.features
    largest = inputs + spec.parts.biased  # the form of cqnn has a constant 1 as one more input
    if spec.parts.rank > largest:
        raise UserError(
            f"neuron={spec.neuron!r}: the form of a kernel with {inputs} inputs has rank "
            f"{largest} at most"
        )
    item = jnp.dtype(geometry.param_dtype).itemsize
    factors = len(spec.branches) * inputs * features * item
    if spec.parts.rank and factors > FORM_BYTES:
        raise UserError(
            f"neuron={spec.neuron!r}: {len(spec.branches)} kernels of {inputs} inputs and "
            f"{features} features take {factors:,} bytes, allowed are {FORM_BYTES:,}; give a lower "
            "rank"
        )
    size = forms.pairs(inputs) * features * item
    if "form" in spec.parts.reads and size > FORM_BYTES:
        raise UserError(
            f"neuron={spec.neuron!r}: {features} forms of {inputs} inputs have "
            f"{forms.pairs(inputs):,} coefficients each and take {size:,} bytes, allowed are "
            f"{FORM_BYTES:,}; give a rank, as in neuron='t1:4' or 'cqnn:4'"
        )


def _kernel_init(geometry: Geometry, spec: LayerSpec, index: int, reads: str):
    if spec.start not in KURTOSIS:
        return geometry.kernel_init
    n, kurtosis = geometry.inputs, KURTOSIS[spec.start]
    # Second moment of what a branch of unit coefficients of random signs gives, for inputs of 1.
    of_ones = {
        "x": n,
        "square": n * kurtosis,
        "form": n * (n - 1) / 2 + n * kurtosis,
    }[reads]
    target = 1.0 if spec.parts.nonnegative else MOMENT[spec.start]
    moment = spec.parts.moments(target)[index] / _spread(spec, index, 1 + (kurtosis - 1) / n)
    return nnx.initializers.normal(math.sqrt(moment / of_ones))


def _spread(spec: LayerSpec, index: int, spread: float) -> float:
    """What to divide a branch's moment by, where it is a factor of products.

    Two maps of one x share its scale: E (u x)^2 (v x)^2 is E (|x|^2 / n)^2 = `spread` times the
    product of their moments, for weights of mean 0. A factor that is a term too keeps its own.
    """
    name = spec.branches[index]
    alone = {term[0] for term in spec.parts.terms if len(term) == 1}
    partners = [
        (set(term) - {name} or {name}).pop()
        for term in spec.parts.terms
        if len(term) == 2 and name in term
    ]
    if not partners or name in alone:
        return 1.0
    return spread if partners[0] in alone else math.sqrt(spread)


def _start_linear(neuron: Neuron, spec: LayerSpec, linear: Branch | None) -> None:
    """Gives each branch its role of `relinear`, so that the neuron is the linear one (ReLinear).

    A branch norm takes the part of the kernel: scale 0 makes its branch a constant. That of the
    carried branch starts with statistics of 0 and 1, so in evaluation it changes nothing. In
    training it normalises: that changes nothing more only where a norm follows the layer.
    """
    for name, role in zip(spec.parts.branches, spec.parts.relinear, strict=True):
        branch = neuron.branches[name]
        if role == "carry":
            _carry(neuron, spec, branch, linear)
        elif role in ("zero", "one"):
            _make_constant(name, branch, spec, float(role == "one"))


def _keep(neuron: Neuron, spec: LayerSpec, before: Mapping[str, Branch] | None) -> None:
    """The kernels, biases and norms that there were; a layer that is new has none to keep."""
    for name, old in (before or {}).items():
        branch = neuron.branches[name]
        _set_kernel(branch, old, spec)
        if old.bias is not None and branch.bias is not None:
            branch.bias[...] = old.bias[...]
        if old.norm is not None and branch.norm is not None:
            branch.norm = old.norm


def _set_kernel(branch: Branch, old: Branch, spec: LayerSpec) -> None:
    if branch.factored and old.factored and branch.kernel.network == old.kernel.network:
        branch.kernel.take(old.value().cores)
    else:
        form = spec.kernel.form if branch.factored else ""
        branch.set_dense(old.dense(), form)


def _carry(neuron: Neuron, spec: LayerSpec, branch: Branch, linear: Branch | None) -> None:
    if branch.norm is not None:
        branch.norm.var[...] = jnp.full_like(branch.norm.var[...], 1 - branch.norm.epsilon)
    if linear is None:
        return
    _set_kernel(branch, linear, spec)
    if linear.norm is not None:
        if branch.norm is None:
            raise UserError("start='relinear' carries a branch norm on only with norm='branch'")
        branch.norm = linear.norm
    if linear.bias is None:
        for own in (branch.bias, neuron.bias):  # that the formula has, whatever the layer asks for
            if own is not None:
                own[...] = jnp.zeros_like(own[...])
        return
    if branch.bias is not None:
        branch.bias[...] = linear.bias[...]
    elif linear.norm is None:
        neuron.bias[...] = linear.bias[...]
    else:  # in front of the norm, which takes it away again, and there is no place for it now
        neuron.bias[...] = jnp.zeros_like(neuron.bias[...])
        branch.norm.mean[...] = branch.norm.mean[...] - linear.bias[...]


def _make_constant(name: str, branch: Branch, spec: LayerSpec, value: float) -> None:
    weight, bias = branch.kernel, branch.bias
    if branch.norm is not None:
        weight, bias = branch.norm.scale, branch.norm.bias
    elif branch.factored:  # one core of zeros makes a kernel of zeros, which has a gradient
        weight = getattr(branch.kernel, branch.kernel.network.cores[-1][0])
    if bias is None and value:
        raise UserError(
            f"start='relinear': branch {name!r} of neuron={spec.neuron!r} starts at 1, which takes "
            "use_bias=True or norm='branch'"
        )
    weight[...] = jnp.zeros_like(weight[...])
    if bias is not None:
        bias[...] = jnp.full_like(bias[...], value)
