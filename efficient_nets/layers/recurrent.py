"""LSTM and GRU over sequences, whose two linear maps a step are `Dense` layers with all the axes.

The map of the inputs runs for all steps at once, in front of the scan; that of the state runs in
each. `convert` finds them as `input` and `hidden` behind the module's own path.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from efficient_nets.errors import UserError
from efficient_nets.layers import kernel as kernels
from efficient_nets.layers import precision as precisions
from efficient_nets.layers.collect import collecting_nothing
from efficient_nets.layers.geometry import Initializer
from efficient_nets.layers.linear import Dense, layer_norm_act, lecun_normal
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.ops import factorization, linear_maps

State = tuple[Array, ...]


def orthogonal(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
    """An orthogonal matrix for each gate: `(features, gates * features)`.

    Each keeps the length of the state (Saxe et al. 2014, arXiv 1312.6120), which one drawn with
    orthonormal rows for all gates together would shorten by the root of their number.
    """
    features, out = shape
    make = nnx.initializers.orthogonal()
    keys = jax.random.split(key, out // features)
    return jnp.concatenate([make(key, (features, features), dtype) for key in keys], axis=-1)


class Recurrent(nnx.Module):
    """What LSTM and GRU share: x `(N, T, in_features)` to `(N, T, features)` and the last state.

    Features of both layers are gate after gate, so that the first output mode of a factorized
    kernel holds the gates: `out=16x4x4x4` is of four gates and 4x4x4x4 features.

    Attributes:
      gates: How many the formula has.
      states: Names of what it carries from step to step, what it puts out first.
      features: Size of each.
      input: Dense, `in_features` to `gates * features`.
      hidden: Dense, `features` to `gates * features`.

    Args:
      in_features: Size of the last axis of the input.
      features: Size of the last axis of the output.
      input_spec, hidden_spec: Axes of the two layers, as in `Dense`. Branches of `hidden` have no
        norms, and during the steps of a call its quantizers do not move: behind them they observe
        all steps at once.
      dtype: Compute type of the products, the input's if not given. State and gates are in float32
        at least: sums over many steps round to nothing in less.
      param_dtype: Type of the parameters.
      kernel_init, hidden_init: Of the kernels of `input` and `hidden`.
      rngs: Source of the initial values.

    Raises:
      UserError: if a number of features is below 1; on a call, if input or state have other shapes
        or types, or `hidden` has branch norms.
    """

    gates: int
    states: tuple[str, ...]
    hidden_bias: bool  # whether the formula has one that is not the same as that of `input`

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        input_spec: LayerSpec | None = None,
        hidden_spec: LayerSpec | None = None,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        hidden_init: Initializer = orthogonal,
        rngs: nnx.Rngs,
    ):
        if features < 1:
            raise UserError(f"features={features}: must be at least 1")
        self.features = features
        types = dict(dtype=dtype, param_dtype=param_dtype)
        self.input = Dense(
            in_features,
            self.gates * features,
            spec=input_spec,
            kernel_init=kernel_init,
            **types,
            rngs=rngs,
        )
        self.hidden = Dense(
            features,
            self.gates * features,
            use_bias=self.hidden_bias,
            spec=hidden_spec,
            kernel_init=hidden_init,
            **types,
            rngs=rngs,
        )

    def step(self, z: Array, u: Array, *state: Array) -> State:
        """The next state, of what `input` and `hidden` give: `(N, gates * features)` each."""
        raise NotImplementedError

    def __call__(self, x: Array, state: State | None = None) -> tuple[Array, State]:
        """x `(N, T, in_features)` to `(N, T, features)`, from zeros if no state is given.

        The state, given and returned, is a tuple of `(N, features)`, one for each of `states`.
        """
        state = self._start(x, state)
        z = layer_norm_act(x, self.input)
        batch, time = z.shape[:2]
        wide = linear_maps.wide(z.dtype)
        state = tuple(part.astype(wide) for part in state)
        graph, arrays = nnx.split(_for_steps(self.hidden, batch * time))

        def step(state, inputs):
            index, z = inputs
            hidden = nnx.merge(graph, arrays, copy=True)
            precisions.draw_later(hidden.ranges, index)
            u = layer_norm_act(state[0].astype(z.dtype), hidden)
            state = self.step(z.astype(wide), u.astype(wide), *state)
            return state, state[0].astype(z.dtype)

        with collecting_nothing():
            last, y = lax.scan(step, state, (jnp.arange(time), jnp.swapaxes(z, 0, 1)))
        y = jnp.swapaxes(y, 0, 1)
        # Once more, for all steps at once and for those who look on: observers, which count T
        # positions, quantizers, lists of `collecting`. Where there are none, jit drops it.
        read = jnp.concatenate([state[0].astype(y.dtype)[:, None], y[:, :-1]], axis=1)
        layer_norm_act(read, self.hidden)
        return y, last

    def _start(self, x: Array, state: State | None) -> State:
        """The checked state, zeros if there is none."""
        if x.ndim != 3:
            raise UserError(f"the input, (N, T, in_features), cannot be {x.shape}")
        if self.hidden.spec.norm != "none":
            raise UserError(
                f"hidden: norm={self.hidden.spec.norm!r}: statistics of a state change from step "
                "to step, and those of zeros, which the first one reads, are 0; allowed 'none'"
            )
        shape = (x.shape[0], self.features)
        if state is None:
            return tuple(jnp.zeros(shape, x.dtype) for _ in self.states)
        if len(state) != len(self.states) or any(part.shape != shape for part in state):
            given = ", ".join(str(part.shape) for part in state)
            raise UserError(
                f"the state is ({', '.join(self.states)}), {shape} each: it cannot be ({given})"
            )
        return tuple(state)


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000: f).

        i, f, g, o = W x + U h + b
        c' = sigmoid(f + forget_bias) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(c')

    The state is (h, c). The bias of `input` is b.

    Args:
      forget_bias: Added to f, no parameter. 1 lets gradients through many steps from the start on,
        where 0 halves them in each (Gers et al. 2000; Jozefowicz et al. 2015 measure the gain). It
        is not in b, so that it is the same under any neuron and weight decay leaves it alone.
      The others: As in `Recurrent`.
    """

    gates, states, hidden_bias = 4, ("h", "c"), False

    def __init__(self, in_features: int, features: int, *, forget_bias: float = 1.0, **options):
        self.forget_bias = forget_bias
        super().__init__(in_features, features, **options)

    def step(self, z: Array, u: Array, h: Array, c: Array) -> State:
        i, f, g, o = jnp.split(z + u, self.gates, axis=-1)
        c = nnx.sigmoid(f + self.forget_bias) * c + nnx.sigmoid(i) * jnp.tanh(g)
        return nnx.sigmoid(o) * jnp.tanh(c), c


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), the reset gate behind the map.

        r = sigmoid(Wr x + Ur h + br),  z = sigmoid(Wz x + Uz h + bz)
        h' = (1 - z) tanh(Wn x + bn + r (Un h + cn)) + z h

    That is cuDNN's, and version 1 of the paper: one map of h gives all three gates, where U (r h)
    of version 3 takes a second map, which cannot begin before r is there. The state is (h,). The
    biases of `input` are (br, bz, bn), those of `hidden` are added to br and bz, and are cn.
    """

    gates, states, hidden_bias = 3, ("h",), True

    def step(self, z: Array, u: Array, h: Array) -> State:
        reset, update, new = jnp.split(z, self.gates, axis=-1)
        of_reset, of_update, of_new = jnp.split(u, self.gates, axis=-1)
        update = nnx.sigmoid(update + of_update)
        new = jnp.tanh(new + nnx.sigmoid(reset + of_reset) * of_new)
        return ((1 - update) * new + update * h,)


CELLS = {"lstm": LSTM, "gru": GRU}


def _for_steps(layer: Dense, positions: int) -> Dense:
    """A copy with what all steps share made once, which no one looks at and nothing moves.

    Cores become the dense kernel where that takes fewer operations and bytes for all steps
    together, being made once, or where it is rounded; else the state goes from core to core.
    These are rounded once.
    """
    layer = nnx.merge(*nnx.split(layer))
    layer.watch = layer.prepare = None
    if layer.spec.kernel_norm != "none":
        layer.advance()  # as the call for all steps will
    for found in (layer.ranges or {}).values():
        found.use_running_average = True
    if layer.branches[0].factored:
        reconstructs = _reconstructs(layer, positions)
        for name in layer.spec.branches:
            kernel = layer.drawn(name)  # for all steps (Gal and Ghahramani, arXiv 1512.05287)
            getattr(layer, name).kernel = (
                nnx.Param(factorization.dense(kernel))
                if reconstructs
                else kernels.Kernel(kernel.network, kernel.run, kernel.cores)
            )
            getattr(layer, name).spectral = None
        precision = dataclasses.replace(layer.spec.precision, core=None)
        layer.spec = dataclasses.replace(layer.spec, precision=precision)
    layer.fix_kernels()
    return layer


def _reconstructs(layer: Dense, positions: int) -> bool:
    own = [branch.kernel for branch in layer.branches]
    return layer.spec.precision.kernel is not None or any(
        factorization.makes_kernel(k.network, k.run, (positions, positions)) for k in own
    )
