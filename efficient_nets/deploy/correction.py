"""Biases that make up for what rounding does to the mean of each output."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import layers
from efficient_nets.deploy import affine
from efficient_nets.errors import UserError
from efficient_nets.layers import Layer, linear


def correct_biases(
    rounded: nnx.Module, plain: nnx.Module, *inputs
) -> tuple[nnx.Module, dict[str, str]]:
    """A copy of the rounded net whose layers give on average what those of the plain one give.

    Empirical bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2 and appendix): in
    the order of the calls, each layer's bias takes, for each feature,

        E[y of the plain net] - E[y of the rounded net, whose earlier layers are corrected already]

    y being the layer's own output, before any norm or activation behind it. Layers without a bias
    get one; `affine` says where it is. One pass through each net, traced once: a layer is corrected
    in front of its own call. Of a layer that is called twice the first call counts.

    Args:
      rounded: The net with ranges, see `layers.calibrate`; it is left as it is.
      plain: The same net, nothing rounded.
      *inputs: What both are called with; one batch, over which and over space means are taken.

    Returns:
      The copy, in evaluation mode, and `{path of a layer that stayed: why}`.

    Raises:
      UserError: if the nets do not have the same layers.
    """
    rounded, plain = nnx.clone(rounded), nnx.clone(plain)
    left, found = {}, dict(layers.layers(rounded))
    if found.keys() != dict(layers.layers(plain)).keys():
        others = sorted(found.keys() ^ dict(layers.layers(plain)).keys())
        raise UserError(f"rounded and plain are different nets: one has no {', '.join(others)}")
    for path, layer in found.items():
        if reason := affine.no_shifting(layer):
            left[path] = reason
        else:
            affine.add_biases(layer)
    for net in (rounded, plain):
        net.eval()
    graphs, states = zip(nnx.split(rounded), nnx.split(plain), strict=True)

    @jax.jit
    def corrected(states, inputs):
        rounded, plain = map(nnx.merge, graphs, states)
        expected: dict[str, Array] = {}
        done = set(left)

        def learn(path, layer, x):
            if path not in expected:
                expected[path] = _mean_output(layer, x)

        def correct(path, layer, x):
            if path not in done:
                done.add(path)
                affine.shift_output(layer, expected[path] - _mean_output(layer, x))

        layers.watched(plain, before=learn)(*inputs)
        rounded = layers.watched(rounded, before=correct)
        rounded(*inputs)
        return nnx.state(rounded)

    return nnx.merge(graphs[0], corrected(states, inputs)), left


def _mean_output(layer: Layer, x: Array) -> Array:
    """The mean of the layer's own output over all axes but the last, `(C,)`, in float32."""
    y = linear.without_norm(x, layer)
    return jnp.mean(y, axis=tuple(range(y.ndim - 1)), dtype=jnp.promote_types(y.dtype, jnp.float32))
