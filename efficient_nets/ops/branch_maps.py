"""The linear maps of a neuron's branches, of what precision makes of input and kernels.

Branches that read the same thing are fused into one map. Where input and kernels both have codes on
a uniform grid, the map is of the codes, and their scales multiply its result:

    z = map(codes_x, codes_w) * (scale_x * scale_w)

Sums of whole numbers below 2^24 are exact in float32, whatever the order, and bfloat16 holds the
codes of 8 bits: this is what integer arithmetic gives, bit for bit. The gradient is that of
`map(scale_x * codes_x, scale_w * codes_w)`.

A map with transforms (`ops.winograd`) has the same inside of them, and sites of its own.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.errors import UserError
from efficient_nets.ops import factorization, forms, linear_maps, quantizers
from efficient_nets.ops.factorization import Factored
from efficient_nets.ops.packing import narrowest
from efficient_nets.ops.precision import Precision
from efficient_nets.ops.quantizers import Arrays, Quantizer
from efficient_nets.ops.quantizers.spec import Rounded
from efficient_nets.ops.straight_through import straight_through
from efficient_nets.ops.winograd import PRODUCTS, WinogradMap, apply

# What a map computes with beside kernels, by name: the arrays of each site's quantizer, of 'kernel'
# a tuple, one a branch; of a site inside of transforms under `inner_name`; `LEARNED` transforms.
Ranges = Mapping[str, Arrays | tuple[Arrays, ...]]
LEARNED = "learned_transforms"

# What a branch may read, `(map, x, kernels) -> (..., B*C)`.
READS = {
    "x": lambda linear_map, x, kernels: _mapped(linear_map, x, kernels),
    "square": lambda linear_map, x, kernels: _mapped(linear_map, x * x, kernels),
    "form": lambda linear_map, x, kernels: linear_maps.fuse(
        [_form(linear_map, x, kernel) for kernel in kernels], linear_map.groups
    ),
}


def _mapped(linear_map, x: Array, kernels: Sequence[Array | Factored]) -> Array:
    if isinstance(kernels[0], Factored):  # all of a layer are, or none
        return factorization.factorized_map(linear_map, x, kernels)
    return linear_map(x, kernels)


@functools.partial(jax.checkpoint, static_argnums=0)
def _form(linear_map, x: Array, kernel: Array) -> Array:
    """Keeps x and not its windows, which are kernel_h * kernel_w times as large."""
    return forms.quadratic_form(linear_map.windows(x), kernel).astype(x.dtype)


def observe(precision: Precision, x: Array, kernels: Sequence[Array], ranges: Ranges) -> Ranges:
    """The ranges as x and the kernels move them; that of the output stays."""
    moved = dict(ranges)
    if precision.input is not None:
        moved["input"] = quantizers.observe(precision.input, x, ranges["input"])
    if precision.gradient is not None:
        moved["gradient"] = quantizers.observe(precision.gradient, x, ranges["gradient"])
    if precision.kernel is not None:
        pairs = zip(map(factorization.dense, kernels), ranges["kernel"], strict=True)
        moved["kernel"] = tuple(quantizers.observe(precision.kernel, *pair) for pair in pairs)
    return moved


def inner_name(site: str, name: str) -> str:
    """Of a site inside of transforms, for the values that `ops.winograd.apply` calls so."""
    return f"{site}_{name}"


def learned_of(ranges: Ranges) -> Ranges:
    """The ranges without what is observed: what has a gradient."""
    return jax.tree.map(lambda found: Arrays(found.learned, None), ranges, is_leaf=_is_arrays)


def with_learned(ranges: Ranges, learned: Ranges) -> Ranges:
    return jax.tree.map(
        lambda found, learned: found._replace(learned=learned.learned),
        ranges,
        learned,
        is_leaf=_is_arrays,
    )


def _is_arrays(node) -> bool:
    return isinstance(node, Arrays)


def branch_maps(
    precision: Precision,
    linear_map: linear_maps.DenseMap | linear_maps.ConvMap | WinogradMap,
    kinds: Mapping[str, Sequence[int]],
    x: Array,
    kernels: Sequence[Array],
    ranges: Ranges,
    *,
    branches: Sequence[str] = (),
    observes: bool = False,
) -> tuple[dict[str, Array], Ranges]:
    """One fused value `(..., B*C)` for each kind of read, in x's type; and the ranges.

    Of these the ones of sites inside of transforms are moved by the call, if it observes.

    Args:
      precision: What is rounded; the site 'output' is not looked at.
      linear_map: The map.
      kinds: From a key of `READS` to the positions of the branches that read so.
      x, kernels: As `linear_map` takes them; kernels may be `Factored`.
      ranges: Of the quantizers that precision has.
      branches: Their names, which a map with transforms asks for.
      observes: Whether it is one of training.
    """
    given, ranges = ranges, dict(ranges)
    if precision.kernel is not None or isinstance(linear_map, WinogradMap):
        kernels = [factorization.dense(kernel) for kernel in kernels]
    x_rounded, padless = _rounded_input(precision.input, linear_map, x, ranges.get("input"))
    of_kernels = ranges.get("kernel", (None,) * len(kernels))
    rounded = [_rounded(precision.kernel, *pair) for pair in zip(kernels, of_kernels, strict=True)]
    z = {}
    for kind, positions in kinds.items():
        parts = [rounded[i] for i in positions]
        own = [kernels[i] for i in positions]
        if isinstance(linear_map, WinogradMap):
            names = tuple(branches[i] for i in positions)
            # Transforms are of float32 kernels. All kinds move the ranges from what was given, so
            # that those of the transforms, which they share, move once.
            wide = linear_maps.wide(x.dtype)
            values = tuple(_value(*pair, wide) for pair in zip(parts, own, strict=True))
            inside = {name: given[name] for name in _inside(precision, given)}
            z[kind], moved = _transformed(
                padless,
                precision,
                (kind, names),
                observes,
                _value(x_rounded, x, x.dtype),
                values,
                inside,
            )
            ranges |= moved
        else:
            z[kind] = _direct(precision, padless, kind, x, x_rounded, own, parts)
        z[kind] = _scaled_output(
            precision, linear_map, x, ranges, [of_kernels[i] for i in positions], z[kind]
        )
        if precision.gradient is not None:
            z[kind] = quantizers.quantize(precision.gradient, z[kind], ranges["gradient"])
    return z, ranges


def _direct(precision, linear_map, kind: str, x, x_rounded, own, parts) -> Array:
    """The map as `lax` computes it: of codes where they allow that, else of values."""
    exact = None
    if kind == "x" and _has_codes(x_rounded, parts) and _whole(precision, own):
        exact = lax.stop_gradient(_of_codes(precision, linear_map, x, x_rounded, own, parts))
        if not _trainable(own):
            return exact
    values = [_value(part, kernel, x.dtype) for part, kernel in zip(parts, own, strict=True)]
    z = READS[kind](linear_map, _value(x_rounded, x, x.dtype), values)
    return z if exact is None else straight_through(exact, z)


def _inside(precision: Precision, ranges: Ranges) -> list[str]:
    """The names of what a map with transforms takes of the ranges."""
    sites = tuple(inner_name(site, "") for site in precision.inner)
    return [name for name in ranges if name == LEARNED or name.startswith(sites)]


# The transforms are computed again in the backward pass: transformed tiles are (a/m)^2 as large as
# what they are made of. The products are not, where it needs them (learned transforms, clipped
# sums): they cost as much as the convolution.
@functools.partial(
    jax.checkpoint,
    static_argnums=(0, 1, 2, 3),
    policy=jax.checkpoint_policies.save_only_these_names(PRODUCTS),
)
def _transformed(
    linear_map: WinogradMap, precision: Precision, names, observes: bool, x, kernels, ranges
):
    """Its value, and the ranges that it moved."""
    moved = {}

    def visit(site: str, name: str, values: Array) -> Rounded | None:
        quantizer, key = getattr(precision, site), inner_name(site, name)
        if quantizer is None:
            return None
        arrays = ranges[key]
        if observes:
            arrays = moved[key] = quantizers.observe(quantizer, values, arrays)
        found = quantizers.rounded(quantizer, values, arrays)
        whole = site == "transformed_input" and not (quantizer.pauses or _trainable(kernels))
        if whole and found.codes is not None:
            able = [jnp.int8, jnp.int16, jnp.int32]
            dtype = narrowest(quantizers.code_bounds(quantizer), able)
            found = found._replace(codes=found.codes.astype(dtype))
        return found

    z = transformed_map(linear_map, precision, names, x, kernels, ranges, visit)
    return z, moved


def transformed_map(
    linear_map: WinogradMap, precision: Precision, names, x, kernels, ranges: Ranges, visit
) -> Array:
    """`ops.winograd.apply` of what a kind of branches reads: `names` are the kind and theirs."""
    matrices = linear_map.constants() if LEARNED not in ranges else ranges[LEARNED].learned
    x = x * x if names[0] == "square" else x
    stepwise = precision.between is not None
    return apply(linear_map, x, kernels, matrices, visit, names, stepwise=stepwise)


def _rounded(quantizer, x: Array, arrays: Arrays | None) -> Rounded | None:
    return None if quantizer is None else quantizers.rounded(quantizer, x, arrays)


def _rounded_input(quantizer: Quantizer | None, linear_map, x: Array, arrays: Arrays | None):
    """The rounded input, and the map of it: with pad='before' it is padded already."""
    if quantizer is None or quantizer.pad != "before":
        return _rounded(quantizer, x, arrays), linear_map
    rounded = quantizers.rounded(quantizer, x, arrays, lambda x: linear_map.padded(x)[0])
    return rounded, linear_map.padded(x)[1]


def _value(rounded: Rounded | None, x: Array, dtype: jnp.dtype) -> Array:
    """What is computed with; of its own type, or of this one if that is a whole number's."""
    if rounded is None:
        return x
    return quantizers.value(rounded).astype(x.dtype if _trainable([x]) else dtype)


def _trainable(kernels: Sequence[Array]) -> bool:
    """A net for use has kernels of whole numbers, see `deploy.to_integers`."""
    return all(jnp.issubdtype(kernel.dtype, jnp.floating) for kernel in kernels)


def _has_codes(x: Rounded | None, kernels: Sequence[Rounded | None]) -> bool:
    """Whether scales can be taken out of the sums: at most samples and features have their own."""
    return (
        all(part is not None and part.codes is not None for part in (x, *kernels))
        and set(x.scale.shape[1:]) <= {1}
        and all(set(kernel.scale.shape[:-1]) <= {1} for kernel in kernels)
    )


def _whole(precision: Precision, kernels: Sequence[Array]) -> bool:
    """Whether the input's codes are whole numbers where the kernels are: in float epochs not."""
    return _trainable(kernels) or not precision.input.pauses


def _of_codes(precision, linear_map, x, x_rounded, own, kernels: Sequence[Rounded]) -> Array:
    """See the module. In x's type; sums in float32, or in int32 for kernels of whole numbers."""
    wide = linear_maps.wide(x.dtype)
    if _trainable(own):
        codes = [kernel.codes for kernel in kernels]
        codes = linear_map(x_rounded.codes.astype(x.dtype), codes, out=wide)
    else:
        codes = _integer_sums(precision.input, linear_map, x_rounded.codes, own).astype(wide)
    features = codes.shape[-1] // len(kernels)
    scales = [jnp.broadcast_to(kernel.scale.ravel(), (features,)) for kernel in kernels]
    scale = linear_maps.fuse(scales, linear_map.groups)
    per_sample = x_rounded.scale.reshape(-1, *(1,) * (codes.ndim - 1))
    scale = per_sample * scale.reshape(*(1,) * (codes.ndim - 1), -1)
    return (codes * scale).astype(x.dtype)


def _integer_sums(quantizer: Quantizer, linear_map, codes: Array, kernels) -> Array:
    """The map of whole numbers, in int32: `(..., B*C)`.

    Operands are of the kernels' type where the codes fit, else int32. 0 ... 255 are moved down by
    128, or 0 ... 15 by 8 for int4, which that many times the sum of a feature's weights makes good;
    what is padded is 0 before that.
    """
    codes, operand = codes.astype(jnp.int32), kernels[0].dtype
    low, high = quantizers.code_bounds(quantizer)
    least, most = int(jnp.iinfo(operand).min), int(jnp.iinfo(operand).max)
    if operand == jnp.int16 or not fits((low, high), operand):
        return linear_map(codes, [kernel.astype(jnp.int32) for kernel in kernels])
    if least <= low and high <= most:
        return _narrow_sums(linear_map, codes, kernels)
    shift = low - least
    codes, linear_map = linear_map.padded(codes)
    sums = _narrow_sums(linear_map, codes - shift, kernels)
    columns = [jnp.sum(k.astype(jnp.int32), axis=tuple(range(k.ndim - 1))) for k in kernels]
    added = shift * linear_maps.fuse(columns, linear_map.groups)
    return sums + added.reshape(*(1,) * (sums.ndim - 1), -1)


def fits(bounds: tuple[int, int], dtype: jnp.dtype) -> bool:
    """Whether whole numbers between these bounds, moved by a constant, fit in a type."""
    return bounds[1] - bounds[0] < 2 ** jnp.iinfo(dtype).bits


def _narrow_sums(linear_map, codes: Array, kernels: Sequence[Array]) -> Array:
    """The map of operands in the kernels' type, sums in int32.

    int4 is multiplied as such on TPUs; elsewhere as int8, which gives the same: XLA:CPU has no int4
    convolution.
    """

    def sums(codes, *kernels):
        return linear_map(codes.astype(kernels[0].dtype), kernels, out=jnp.int32)

    if kernels[0].dtype != jnp.int4:
        return sums(codes, *kernels)
    return lax.platform_dependent(
        codes,
        *kernels,
        tpu=sums,
        default=lambda codes, *kernels: sums(codes, *(k.astype(jnp.int8) for k in kernels)),
    )


def _scaled_output(precision: Precision, linear_map, x, ranges, of_kernels, z: Array) -> Array:
    """z times the factors that XNOR-Net and XNOR-Net++ have behind the map."""
    branches = len(of_kernels)
    factors = [quantizers.output_scale(precision.input, x, ranges.get("input"), linear_map)]
    factors = factors * branches
    for i, arrays in enumerate(of_kernels):
        own = quantizers.output_scale(precision.kernel, x, arrays, linear_map)
        if own is not None and own.shape[1:-1] != z.shape[1:-1]:
            raise UserError(
                f"precision.kernel.size={own.shape[1:-1]}: allowed in this layer, whose output has "
                f"these positions: {z.shape[1:-1]}"
            )
        factors[i] = own if factors[i] is None else factors[i] if own is None else factors[i] * own
    if all(factor is None for factor in factors):
        return z
    parts = linear_maps.split(z, branches, linear_map.groups)
    parts = [
        part if factor is None else part * factor.astype(part.dtype)
        for part, factor in zip(parts, factors, strict=True)
    ]
    return linear_maps.fuse(parts, linear_map.groups)
