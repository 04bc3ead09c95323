"""Dense and Conv: the one layer, with its four axes given by a `LayerSpec`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers import kernel as kernels
from efficient_nets.layers import neuron as neurons
from efficient_nets.layers import norm as norms
from efficient_nets.layers import precision as precisions
from efficient_nets.layers.collect import add, wanted
from efficient_nets.layers.geometry import Geometry, Initializer, padding_of, per_axis
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.ops import (
    branch_maps,
    factorization,
    linear_maps,
    quadratic,
    quantizers,
    winograd,
)
from efficient_nets.ops.precision import Precision

lecun_normal = nnx.initializers.lecun_normal()
AROUND = ("input", "output", "gradient")  # sites of a map that its kernels do not reach
kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


class Layer(nnx.Module):
    """What Dense and Conv share: branches of parameters, and a linear map that reads them.

    Attributes:
      geometry: Static shape and initialisation.
      spec: Static `LayerSpec`.
      One `Branch` a branch of the neuron, under its name: `w` for linear, `a`, `b`, `c` for `ours`.
      bias: Of the combined value `(features,)`, in neurons that have it there, else None.
      ranges: Arrays of the quantizers, by site, branch and core, else None; see
        `layers.precision`.
      transforms: The learned matrices of Winograd's algorithm, such as `BT3` of 3 taps, else None.
      watch, prepare: Static; what each call is shown to, behind and in front of it, see
        `observe.watched`.
      removed: Static; the layer has become the identity and has no parameters.
      stacked: Static; its variables have a leading axis, see `switch.stacked`.
    """

    watch = prepare = None
    stacked = False

    def __init__(self, geometry: Geometry, spec: LayerSpec | None, rngs: nnx.Rngs):
        self.geometry, self.spec, self.removed = geometry, spec or LayerSpec(), False
        self.transforms = nnx.data(None)
        _check_joined(self.spec)
        self._make_branches(rngs)

    def _make_branches(
        self, rngs: nnx.Rngs, before: Mapping[str, neurons.Branch] | None = None
    ) -> None:
        kept = {name: branch.dense() for name, branch in (before or {}).items()}
        network = None
        if not self.spec.joint:  # else `joint.tie` makes the kernels, of dense ones of all layers
            kernel = kernels.resolved(self.geometry, self.spec, kept)
            self.spec = self.spec.with_kernel(kernel)
            network = self._network(kernel)
        made = neurons.make(self.geometry, self.spec, rngs, network, before)
        for name, branch in made.branches.items():
            setattr(self, name, branch)
        self.bias = nnx.data(made.bias)  # or a None now could not become a parameter later
        self._make_transforms()
        self._make_ranges(rngs)
        self._specify_kernels(rngs)  # last: with and without dropout all else is drawn alike

    def _network(self, kernel: factorization.Factorization | str) -> factorization.Network | None:
        """Of a resolved kernel; None of a dense one."""
        return None if kernel == factorization.DENSE else kernel.network(self.geometry.kernel_shape)

    def _specify_kernels(self, rngs: nnx.Rngs) -> None:
        for branch in self.branches:
            if branch.factored:
                branch.kernel.specify(self.spec.kernel, rngs)

    def _make_transforms(self) -> None:
        """Those that the algorithm learns; they stay if there are any."""
        found = self.linear_map  # which says what the geometry does not allow
        learned = isinstance(found, winograd.WinogradMap) and found.form.learned
        if learned and self.transforms is None:
            dtype = self.geometry.param_dtype
            exact = found.constants().items()
            made = nnx.Dict({name: nnx.Param(jnp.asarray(m, dtype)) for name, m in exact})
            self.transforms = nnx.data(made)

    def _make_ranges(self, rngs: nnx.Rngs) -> None:
        branches = {name: getattr(self, name) for name in self.spec.branches}
        made = precisions.make(self.geometry, self.spec.precision, branches, rngs)
        if self.spec.precision.inner:
            x = precisions.typical_images(self.geometry, self.spec.precision.input)
            given = {
                name: precisions.typical_kernel(self.geometry, branch.dense(), rngs)
                for name, branch in branches.items()
            }
            values = self.inner_values(x, self.spec.precision, given)
            made |= precisions.inner(values, self.spec.precision, rngs)
        self.ranges = nnx.data(nnx.Dict(made) if made else None)

    def respecify(self, spec: LayerSpec, rngs: nnx.Rngs, *, joins: bool = False) -> None:
        """Gives this layer another spec; its parameters stay where they can.

        They are made anew, by `spec.start`, if the new spec stores other ones or names a start.
        Where kernels are kept, ranges of input, output and gradient with the same quantizer are,
        and where cores are, theirs.

        Args:
          spec: The new one.
          rngs: Of fresh values.
          joins: The caller goes on with `joint.tie`: kernels that layers share are dense till then.

        Raises:
          UserError: on a 'relinear' start of a layer that is not linear, or transformed kernels.
        """
        if self.kernel_site != "kernel":
            raise UserError("its kernels are transformed, for use: they have no other form again")
        before = self.spec
        if spec.start == "own" and not spec.joint:  # whose ranks are numbers
            spec = spec.with_kernel(kernels.resolved(self.geometry, spec, {}))
        stays = spec.start == "own" and self._stores(before, spec)
        if not (stays or joins):
            _check_joined(spec)
        self.spec = spec
        if spec.algorithm != before.algorithm:
            self.transforms = nnx.data(None)
        if stays:
            if spec.algorithm != before.algorithm:
                self._make_transforms()
            if (spec.precision, spec.algorithm) != (before.precision, before.algorithm):
                ranges = self.ranges or {}
                self._make_ranges(rngs)
                self._keep_ranges(ranges, (*AROUND, *self.cores))
            self._specify_kernels(rngs)
            return
        if spec.start == "relinear" and before.neuron != "linear":
            raise UserError(f"start='relinear': the layer is {before.neuron!r}, not linear")
        if spec.start == "kept" and (spec.neuron, spec.norm) != (before.neuron, before.norm):
            raise UserError(
                f"start='kept': the layer has neuron={before.neuron!r}, norm={before.norm!r}, not "
                f"neuron={spec.neuron!r}, norm={spec.norm!r}"
            )
        bias, ranges = self.bias, self.ranges
        old = {name: getattr(self, name) for name in before.branches}
        for name in before.branches:
            delattr(self, name)
        self._make_branches(rngs, old if spec.start in ("relinear", "kept") else None)
        if spec.start == "kept":
            self.bias = bias
            cores = self.cores if self._stores(before, self.spec) else ()
            self._keep_ranges(ranges or {}, (*AROUND, *cores))

    def _stores(self, before: LayerSpec, after: LayerSpec) -> bool:
        """Whether both have the same parameters in the branches."""
        fields = ("neuron", "norm", "kernel_norm")
        same = all(getattr(before, field) == getattr(after, field) for field in fields)
        if not same or before.joint != after.joint:
            return False
        if after.joint:
            return before.kernel == dataclasses.replace(after.kernel, run=before.kernel.run)
        return self._network(before.kernel) == self._network(after.kernel)

    def remake_ranges(self, rngs: nnx.Rngs) -> None:
        """Those of kernels anew, which have changed; the others are kept."""
        ranges = self.ranges
        self._make_ranges(rngs)
        self._keep_ranges(ranges or {}, AROUND)

    def _keep_ranges(self, before: Mapping[str, precisions.Range], names: Iterable[str]) -> None:
        for name in names:
            own = (self.ranges or {}).get(name)
            if own is not None and name in before and before[name].quantizer == own.quantizer:
                self.ranges[name] = before[name]

    def remove(self, rngs: nnx.Rngs) -> None:
        """Makes this layer the least that its place allows.

        That is the identity where the output has the input's shape, and then the norm and the
        activation behind it go too; else a channel adapter: a linear 1x1 convolution, with fresh
        parameters, the same strides and groups, norm and activation.

        Raises:
          UserError: if neither can stand in, see `Geometry.adapter`.
        """
        adapter = None if self.geometry.keeps_shape else self.geometry.adapter()
        if (adapter, LayerSpec()) == (self.geometry, self.spec):
            return  # it is one, perhaps a trained one
        for name in self.spec.branches:
            delattr(self, name)
        self.bias = self.ranges = self.transforms = nnx.data(None)
        self.spec, self.removed = LayerSpec(), adapter is None
        if adapter is not None:
            self.geometry = adapter
            self._make_branches(rngs)

    @property
    def linear_map(self) -> linear_maps.DenseMap | linear_maps.ConvMap | winograd.WinogradMap:
        """The static map that this layer applies, by `spec.algorithm`.

        Raises:
          UserError: if Winograd's algorithm cannot compute it.
        """
        direct = self.geometry.direct_map
        if self.spec.algorithm == winograd.DIRECT:
            return direct
        if not self.geometry.kernel_size:
            raise UserError(
                f"algorithm='{self.spec.algorithm}': a dense layer has no window; give 'direct'"
            )
        return winograd.WinogradMap(direct, self.spec.algorithm)

    def inner_values(
        self, x: Array, precision: Precision, given: Mapping[str, Array] | None = None
    ) -> dict[tuple[str, str], Array]:
        """What comes to each site inside of the map's transforms, nothing being rounded.

        By the site and the name of what is there, see `ops.winograd.apply`; x as the layer reads
        it. The precision says which sites are asked for. Given kernels are by branch; else they are
        the layer's own.

        Raises:
          UserError: if it asks for what is between the steps of transforms that have one each.
        """
        found = {}

        def visit(site, name, values):
            found[site, name] = values

        ranges = self.learned_transforms()
        for kind, positions in self.spec.parts.kinds.items():
            branches = tuple(self.spec.branches[i] for i in positions)
            own = [given[name] if given else getattr(self, name).dense() for name in branches]
            branch_maps.transformed_map(
                self.linear_map, precision, (kind, branches), x, own, ranges, visit
            )
        if precision.between is not None and not any(site == "between" for site, _ in found):
            raise UserError(
                f"precision.between: the transforms of algorithm='{self.spec.algorithm}' with "
                f"kernel_size={self.geometry.kernel_size} have one step each; leave it out"
            )
        return found

    @property
    def kernel_site(self) -> str:
        """Where the kernels that the layer holds are rounded: 'kernel', or what they became."""
        form = self.spec.algorithm
        transformed = form != winograd.DIRECT and form.transformed
        return "transformed_kernel" if transformed else "kernel"

    def kernel_range(self, branch: str) -> str:
        """The key in `ranges` of the quantizer of a branch's kernel."""
        site = self.kernel_site
        return branch if site == "kernel" else branch_maps.inner_name(site, branch)

    def learned_transforms(self) -> branch_maps.Ranges:
        """The layer's own transforms as `ops` take them, nothing where these are constants."""
        if self.transforms is None:
            return {}
        learned = {name: matrix[...] for name, matrix in self.transforms.items()}
        return {branch_maps.LEARNED: quantizers.Arrays(learned, {})}

    def check_input(self, x: Array) -> None:
        """Raises a UserError unless x is `(..., in_features)`, floating, of the right rank."""
        geometry = self.geometry
        rank = len(geometry.kernel_size)
        if x.ndim == 0 or x.shape[-1] != geometry.in_features or (rank and x.ndim != rank + 2):
            window = f", kernel_size={geometry.kernel_size}" if rank else ""
            raise UserError(
                f"in_features={geometry.in_features}{window}: the input cannot be {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"the input has dtype {x.dtype}: a floating one is needed")

    @property
    def branches(self) -> list[neurons.Branch]:
        return [getattr(self, name) for name in self.spec.branches]

    @property
    def cores(self) -> dict[str, nnx.Variable]:
        """Those of factorized kernels, by the key in `ranges` that a quantizer of them has."""
        return {
            precisions.core_name(name, core): variable
            for name, branch in zip(self.spec.branches, self.branches, strict=True)
            if isinstance(branch.kernel, kernels.Kernel)  # shared ones are not rounded
            for core, variable in branch.kernel.variables.items()
        }

    def value(self, branch: str) -> Array | factorization.Factored:
        """The kernel of a branch as `ops` take it, its cores rounded."""
        kernel, quantizer = getattr(self, branch).value(), self.spec.precision.core
        if quantizer is None or not isinstance(kernel, factorization.Factored):
            return kernel
        dtype = self.geometry.param_dtype  # cores of a net for use are whole numbers
        rounded = {}
        for name, core in kernel.cores.items():
            found = self.ranges[precisions.core_name(branch, name)]
            found = quantizers.rounded(found.quantizer, core, found.arrays())
            rounded[name] = quantizers.value(found).astype(dtype)
        return dataclasses.replace(kernel, cores=rounded)

    def drawn(self, branch: str) -> Array | factorization.Factored:
        """The same as a call computes with it, with the dropout of bonds."""
        kernel, value = getattr(self, branch).kernel, self.value(branch)
        return kernel.dropped(value) if isinstance(value, factorization.Factored) else value

    def held(self, name: str) -> Array | None:
        """What the layer has for the range of this name to round: a kernel, a core, or nothing."""
        if name in self.spec.branches:
            return factorization.dense(self.value(name))
        core = self.cores.get(name)
        return None if core is None else core[...]

    def rounded_kernel(self, branch: str) -> Array:
        """The kernel of a branch as it is computed with."""
        kernel, quantizer = factorization.dense(self.value(branch)), self.spec.precision.kernel
        if quantizer is None:
            return kernel
        found = quantizers.rounded(quantizer, kernel, self.ranges[branch].arrays())
        found = quantizers.value(found)
        return found.astype(kernel.dtype) if jnp.issubdtype(kernel.dtype, jnp.floating) else found

    @property
    def observes(self) -> bool:
        """Whether a call moves the ranges, as in training."""
        return any(not found.use_running_average for found in (self.ranges or {}).values())

    def unit_arguments(self) -> tuple[quadratic.Unit, dict]:
        """What `ops.quadratic` takes of this layer: the unit, and arguments by name."""
        branches = self.branches
        biases = branch_norms = None
        static = quadratic.Unit(
            self.spec.neuron,
            self.linear_map,
            precision=self.spec.precision,
            observes=self.observes,
        )
        if branches[0].bias is not None:
            biases = tuple(branch.bias[...] for branch in branches)
        if self.spec.norm == "branch":
            branch_norms = tuple(branch.norm.arrays() for branch in branches)
            static = dataclasses.replace(static, branch_epsilon=branches[0].norm.epsilon)
        return static, dict(
            kernels=tuple(map(self.drawn, self.spec.branches)),
            biases=biases,
            branch_norms=branch_norms,
            ranges=precisions.arrays(self.ranges, self.spec.branches) | self.learned_transforms(),
        )

    def unit(
        self,
        x: Array,
        norm: norms.BatchNorm | None = None,
        activation: Callable[[Array], Array] | None = None,
    ) -> Array:
        """`activation(norm(layer(x)))`: what `layer_norm_act` computes, x being checked."""
        if self.observes and self.spec.precision.core is not None:
            for name, core in self.cores.items():
                found = self.ranges[name]
                found.update(quantizers.observe(found.quantizer, core[...], found.arrays()))
        self.advance()
        static, arguments = self.unit_arguments()
        static = dataclasses.replace(static, activation=activation, peak=wanted("peaks"))
        if norm is not None:
            static = dataclasses.replace(static, outer_epsilon=norm.epsilon)
        apply = quadratic.hybrid_unit if self.spec.backward == "hybrid" else quadratic.unit
        if self.spec.neuron == "linear" and self.spec.norm == "none":
            apply = quadratic.unit  # nothing but its input is kept as it is
        y, statistics = apply(
            static,
            x,
            outer_norm=norms.arrays_or_none(norm),
            bias=None if self.bias is None else self.bias[...],
            **arguments,
        )
        if statistics.peak is not None:
            add("peaks", self, statistics.peak)
        if self.ranges is not None:
            _after_rounding(x, self, statistics.ranges)
        if statistics.branches is not None:
            for branch, batch in zip(self.branches, statistics.branches, strict=True):
                branch.norm.update(batch)
        if norm is not None:
            norm.update(statistics.outer)
        self.count()
        return y

    def advance(self) -> None:
        """Spectral norms come nearer to their kernels, in front of a call in training."""
        for branch in self.branches:
            if branch.spectral is not None:
                branch.spectral.advance(branch.held)

    def fix_kernels(self) -> None:
        """Gives the kernels the norm that they are computed with, for use, in place."""
        for branch in self.branches:
            branch.fix()
        self.spec = dataclasses.replace(self.spec, kernel_norm="none")

    def count(self) -> None:
        """A call was made: dropout draws anew for the next."""
        for branch in self.branches:
            if branch.factored:
                branch.kernel.count()

    @property
    def has_penalty(self) -> bool:
        return self.spec.kernel != factorization.DENSE and self.spec.kernel.lasso > 0

    @property
    def penalty(self) -> Array:
        """What the lasso of factorized kernels adds to the loss, however often they are used."""
        values = [branch.value() for branch in self.branches]
        return self.spec.kernel.lasso * sum(
            factorization.rank_lasso(v.network, v.cores) for v in values
        )

    def __call__(self, x: Array) -> Array:
        """x `(N, *spatial, in_features)` to `(N, *spatial', features)`."""
        return layer_norm_act(x, self)


def _check_joined(spec: LayerSpec) -> None:
    if spec.joint:
        raise UserError(
            f"joint={spec.joint!r}: one layer by itself shares nothing; make the layers and then "
            "`layers.join` them, or name them in a rule of `layers.convert`"
        )


class Dense(Layer):
    """`neuron(x @ kernel + bias)`: x `(..., in_features)` to `(..., features)`.

    Args:
      in_features: Size of the last axis of the input.
      features: Size of the last axis of the output.
      use_bias: Adds the neuron's biases: see `ops.neurons` for where they are.
      spec: The axes; linear, dense, direct and float if not given.
      dtype: Compute type of the products, the input's if not given; parameters stay in
        `param_dtype`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        use_bias: bool = True,
        spec: LayerSpec | None = None,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        init = (use_bias, kernel_init, bias_init, dtype, param_dtype)
        super().__init__(Geometry(in_features, features, (), (), "VALID", (), 1, *init), spec, rngs)


class Conv(Layer):
    """`neuron(convolution(x, kernel) + bias)`: NHWC input, HWIO kernel (1-D and 3-D alike).

    Args:
      in_features: Channels of the input.
      features: Channels of the output.
      kernel_size: One number a spatial axis; `(3, 3)` for images.
      strides: Window strides, a number or one a spatial axis.
      padding: 'SAME', 'VALID', or zeros added to each spatial axis: a number for both sides, one
        number an axis, or a (low, high) pair an axis. 'SAME' under stride 2 pads more on the high
        side; the papers' nets pad `kernel_size // 2` on both.
      dilation: Kernel dilation, a number or one a spatial axis.
      groups: Channel groups; `groups=in_features` is a depthwise convolution.
      use_bias, spec, dtype, param_dtype, kernel_init, bias_init, rngs: As in `Dense`.

    Raises:
      UserError: naming the argument, if groups do not divide the channels or a tuple's length is
        not that of kernel_size.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = "SAME",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        use_bias: bool = True,
        spec: LayerSpec | None = None,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: Initializer = kaiming_normal,
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        rank = np.size(kernel_size)
        if np.ndim(kernel_size) != 1 or not 1 <= rank <= 3:
            raise UserError(f"kernel_size={kernel_size}: give 1, 2 or 3 numbers in a tuple")
        window = (
            per_axis("kernel_size", kernel_size, rank),
            per_axis("strides", strides, rank),
            padding_of(padding, rank),
            per_axis("dilation", dilation, rank),
        )
        init = (use_bias, kernel_init, bias_init, dtype, param_dtype)
        super().__init__(Geometry(in_features, features, *window, groups, *init), spec, rngs)


def layer_norm_act(
    x: Array,
    layer: Layer,
    norm: nnx.Module | None = None,
    activation: Callable[[Array], Array] | None = None,
) -> Array:
    """`activation(norm(layer(x)))`, as one unit where the hybrid backward can take both in.

    Models call it instead of the three in turn: then a quadratic layer followed by a batch norm and
    an activation keeps nothing but its input for the backward pass. A layer that was removed is x,
    and so is its whole unit.

    Args:
      x: `(N, *spatial, in_features)`.
      layer: Dense or Conv.
      norm: A module on `(N, *spatial', features)`, or None.
      activation: Elementwise and hashable (a plain function), or None.
    """
    geometry = layer.geometry
    layer.check_input(x)
    if layer.removed:
        if norm is not None:
            raise UserError("a layer was removed, but its norm was not: see `rules.norm_name`")
        return x
    x = x.astype(geometry.dtype or x.dtype)
    if layer.prepare is not None:
        layer.prepare(layer, x)
    if wanted("norms"):
        add("norms", layer, norm)
    whole = norm is None or isinstance(norm, norms.BatchNorm)
    if isinstance(norm, norms.BatchNorm) and norm.num_features != geometry.features:
        raise UserError(
            f"the norm is for {norm.num_features} channels, the layer has features="
            f"{geometry.features}"
        )
    y = layer.unit(x, norm if whole else None, activation if whole else None)
    if layer.watch is not None:
        layer.watch(layer, x, y)
    if whole:
        return y
    y = norms.normalise(norm, y)
    return y if activation is None else activation(y)


def without_norm(x: Array, layer: Layer) -> Array:
    """The layer's value alone, before any norm behind it; no observer is shown it."""
    return layer.unit(x)


def _after_rounding(x: Array, layer: Layer, moved) -> None:
    """Keeps what the quantizers observed; adds their losses where these are collected."""
    if layer.observes:
        precisions.update(layer.ranges, layer.spec.branches, moved)
    if wanted("losses"):
        for loss in precisions.losses(layer.ranges, x, layer.held):
            add("losses", layer, loss)
