"""Looks into a net with one batch: what its layers hold, compute, and take as gradients.

    found = analysis.analyze(model, images, labels)
    for layer in found.layers:
        print(layer.name, layer.shares, layer.product_max, layer.spectrum)

Layers are run once, in evaluation mode; each layer's terms are then computed again from its input.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm import tqdm

from efficient_nets.analysis.histogram import Histogram, histogram
from efficient_nets.analysis.spectrum import Spectrum, layer_spectrum
from efficient_nets.analysis.terms import KINDS, OTHER, measured
from efficient_nets.errors import UserError
from efficient_nets.layers import layers, watched
from efficient_nets.ops import factorization

CHANNELS = 12  # of which maps are kept
ROWS = 64  # of kernels without a window


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """One Dense or Conv, in its first call. Arrays are NumPy's.

    Attributes:
      name: Path in the net, such as `stage1/0/conv2`.
      neuron, norm: See `layers.LayerSpec`.
      activations: Of the output: behind the batch norm and activation that run as one unit with the
        layer, see `layers.layer_norm_act`.
      weights: Of the kernels, by branch.
      gradients: Of the loss, with respect to the kernels, by branch; of a factorized kernel what a
        step along the gradient of its cores adds to it, per unit of the step.
      moments: Second moments of the terms, E t^2 over images, positions and channels, by kind (see
        `analysis.terms`), before the norm and activation.
      moment: That of the sum of all terms.
      product_max, product_rms: Of the sum of the terms of second order; 0 if there is none. The
        largest finite magnitude, and the root of the second moment.
      product_nonfinite, input_nonfinite: Its values, and the input's, that are NaN or infinite;
        histograms count their own.
      weight_maps, gradient_maps: Of each branch's kernel and of its gradient, by branch, those of
        the first input channel to the first `CHANNELS` outputs: `(*kernel_size, channels)`. Of a
        kernel without a window, of its first `ROWS` inputs: `(rows, channels)`.
      spectrum: Of the quadratic form, None if there is none.
      map: Output for the first image, `(*spatial, channels)`, the first `CHANNELS` channels.
      first_map, second_map: Its terms of first and of second order, None where there is none.
    """

    name: str
    neuron: str
    norm: str
    activations: Histogram
    weights: dict[str, Histogram]
    gradients: dict[str, Histogram]
    weight_maps: dict[str, np.ndarray]
    gradient_maps: dict[str, np.ndarray]
    moments: dict[str, float]
    moment: float
    product_max: float
    product_rms: float
    product_nonfinite: int
    input_nonfinite: int
    spectrum: Spectrum | None
    map: np.ndarray
    first_map: np.ndarray | None
    second_map: np.ndarray | None

    @property
    def shares(self) -> dict[str, float]:
        """Each term's part of the sum of the terms' second moments: E t^2 / sum of E t^2.

        They add up to 1. What terms share is in none of them, see `cross`.
        """
        total = sum(self.moments.values())
        return {kind: x / total if total else float("nan") for kind, x in self.moments.items()}

    @property
    def cross(self) -> float:
        """2 sum of E t_i t_j over pairs of terms, in parts of the sum of E t^2.

        E (sum of t)^2 = (1 + cross) * sum of E t^2. Below 0 terms cancel, at -1 to nothing; above 0
        they strengthen each other, up to their number less 1.
        """
        total = sum(self.moments.values())
        return self.moment / total - 1 if total else float("nan")

    @property
    def nonfinite(self) -> dict[str, int]:
        """Numbers of NaN and infinities."""
        return {
            "input": self.input_nonfinite,
            "products": self.product_nonfinite,
            "activations": int(self.activations.nonfinite),
            "weights": sum(int(h.nonfinite) for h in self.weights.values()),
            "gradients": sum(int(h.nonfinite) for h in self.gradients.values()),
        }


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A net on a batch.

    Attributes:
      loss: In training mode: that of the gradients.
      images: Their number.
      image: The first one, `(*spatial, C)`, as the net gets it.
      layers: In the order of their first call; layers that are not called are left out.
    """

    loss: float
    images: int
    image: np.ndarray
    layers: tuple[LayerAnalysis, ...]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean over the batch, of logits `(N, classes)` and integer labels `(N,)`."""
    logits = logits.astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def analyze(
    model: nnx.Module, images: Array, labels: Array, loss: Callable = cross_entropy
) -> Analysis:
    """Looks into any net that holds `Dense` and `Conv` layers; it is left as it is.

    Args:
      model: NNX module, images to logits.
      images: `(N, H, W, C)`, normalised, or whatever the net takes.
      labels: Integers `(N,)`, or whatever `loss` takes.
      loss: `(logits, labels)` to a scalar. Gradients are those of training: batch statistics
        normalise. All else is in evaluation mode.

    Raises:
      UserError: if it holds none of them.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    model = nnx.merge(*nnx.split(model))
    model.eval()
    found = dict(layers(model))
    if not found:
        raise UserError(f"{type(model).__name__} has no Dense or Conv to look into")
    hidden = jax.process_index() > 0
    with tqdm(total=2 + len(found), desc="analysis", leave=False, delay=5, disable=hidden) as bar:
        calls = _captured(*nnx.split(model), images)
        bar.update()
        value, _, gradients = _gradients(model, images, labels, loss)
        bar.update()
        looked = []
        for path, x, y in zip(calls.paths, calls.inputs, calls.outputs, strict=True):
            looked.append(_look(path, found[path], x, y, gradients[path]))
            bar.update()
    return Analysis(float(value), len(images), np.asarray(images[0]), tuple(looked))


def batch_histograms(
    model: nnx.Module, images: Array, labels: Array, loss: Callable = cross_entropy
) -> dict[str, Histogram]:
    """Histograms of activations and gradients, in training mode; the net is left as it is.

    Running statistics are far off at the start, where a quadratic net's activations in evaluation
    mode grow beyond all bounds: here batch statistics normalise. Compiled at the first of all calls
    with nets of one make, images of one shape, and one `loss`.

    Returns:
      `activations/LAYER` for each layer that is called, in the order of the calls, then
      `gradients/LAYER/BRANCH`.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    _, calls, gradients = _gradients(model, images, labels, loss, watch=True)
    outputs = dict(zip(calls.paths, calls.outputs, strict=True))
    found = {f"activations/{path}": histogram(y) for path, y in outputs.items()}
    every = dict(layers(model))
    for path in outputs:
        for branch, gradient in _kernel_gradients(every[path], gradients[path]).items():
            found[f"gradients/{path}/{branch}"] = histogram(gradient)
    return found


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["inputs", "outputs"], meta_fields=["paths"]
)
@dataclasses.dataclass(frozen=True)
class _Calls:
    """Input and output of each layer's first call, in the order of the calls."""

    paths: tuple[str, ...]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@functools.partial(jax.jit, static_argnums=0)
def _captured(graph: nnx.GraphDef, state, images: Array) -> _Calls:
    return _called(nnx.merge(graph, state), images)[1]


def _called(model: nnx.Module, images: Array) -> tuple[Array, _Calls]:
    """The net's output, and what its layers read and gave."""
    order: list[str] = []

    def keep(path, layer, x, y):
        if path not in order:
            order.append(path)
        if layer.seen_output.ndim == 0:
            layer.seen_input.set_value(x)
            layer.seen_output.set_value(y)

    watching = watched(model, keep)
    for _, layer in layers(watching):
        # Variables go through nnx.remat and nnx.jit and out again, as values do not.
        layer.seen_input = nnx.Intermediate(jnp.zeros(()))
        layer.seen_output = nnx.Intermediate(jnp.zeros(()))
    output = watching(images)
    seen = dict(layers(watching))
    return output, _Calls(
        tuple(order),
        tuple(seen[path].seen_input[...] for path in order),
        tuple(seen[path].seen_output[...] for path in order),
    )


def _gradients(
    model: nnx.Module, images, labels, loss, watch: bool = False
) -> tuple[Array, _Calls | None, dict[str, nnx.Module]]:
    """The loss, the calls if asked for, and layers with gradients in the place of parameters."""
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)
    (value, calls), gradient = _training_pass(graph, loss, watch, params, rest, images, labels)
    return value, calls, dict(layers(nnx.merge(graph, gradient, rest)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _training_pass(graph: nnx.GraphDef, loss, watch: bool, params, rest, images, labels):
    def value(params):
        copy = nnx.merge(graph, params, rest)
        copy.train()
        if not watch:
            return loss(copy(images), labels), None
        logits, calls = _called(copy, images)
        return loss(logits, labels), dataclasses.replace(calls, inputs=())

    return jax.value_and_grad(value, has_aux=True)(params)


def _look(path: str, layer, x: Array, y: Array, gradient) -> LayerAnalysis:
    kernels = {name: getattr(layer, name).dense() for name in layer.spec.branches}
    of_kernels = _kernel_gradients(layer, gradient)
    found = jax.device_get(measured(*nnx.split(layer), x, y, CHANNELS))
    moments = found.pop("moments")  # JAX has sorted them
    moments = {kind: float(moments[kind]) for kind in (*KINDS, OTHER) if kind in moments}
    for field in ("moment", "product_max", "product_rms"):
        found[field] = float(found.get(field, 0.0))
    for field in ("product_nonfinite", "input_nonfinite"):
        found[field] = int(found.get(field, 0))
    return LayerAnalysis(
        name=path,
        moments=moments,
        neuron=layer.spec.neuron,
        norm=layer.spec.norm,
        activations=histogram(y),
        weights={name: histogram(kernel) for name, kernel in kernels.items()},
        gradients={name: histogram(each) for name, each in of_kernels.items()},
        weight_maps=_maps(kernels),
        gradient_maps=_maps(of_kernels),
        spectrum=layer_spectrum(layer),
        **found,
    )


def _maps(kernels: dict[str, Array]) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(
            kernel[:ROWS, :CHANNELS] if kernel.ndim == 2 else kernel[..., 0, :CHANNELS]
        )
        for name, kernel in kernels.items()
    }


def _kernel_gradients(layer, gradient) -> dict[str, Array]:
    """By branch; of a factorized kernel what a small step along its cores' gradient adds to it."""
    found = {}
    for name in layer.spec.branches:
        own, change = (getattr(of, name) for of in (layer, gradient))
        found[name] = _step(own.kernel, change.kernel) if own.factored else change.held
    return found


def _step(kernel, gradient) -> Array:
    """Of cores, which layers may share, to this layer's kernel."""

    def made(cores):
        return factorization.dense(kernel.value(cores))

    return jax.jvp(made, (kernel.cores,), (gradient.cores,))[1]
