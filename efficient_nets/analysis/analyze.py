"""Looks into a net with one batch: what its layers hold, compute, and take as gradients.

    found = analysis.analyze(model, images, labels)
    for layer in found.layers:
        print(layer.name, layer.shares, layer.product_max, layer.spectrum)

Layers are run once, in evaluation mode; each layer's terms are then computed again from its input.
"""

import dataclasses
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
from efficient_nets.layers import layers, watched

CHANNELS = 12  # of which maps are kept


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """One Dense or Conv, in its first call. Arrays are NumPy's.

    Attributes:
      name: Path in the net, such as `stage1/0/conv2`.
      neuron, norm: See `layers.LayerSpec`.
      activations: Of the output: behind the batch norm and activation that run as one unit with the
        layer, see `layers.layer_norm_act`.
      weights: Of the kernels, by branch.
      gradients: Of the loss, with respect to the kernels, by branch.
      moments: Second moments of the terms, E t^2 over images, positions and channels, by kind (see
        `analysis.terms`), before the norm and activation.
      moment: That of the sum of all terms.
      product_max, product_rms: Of the sum of the terms of second order; 0 if there is none. The
        largest finite magnitude, and the root of the second moment.
      product_nonfinite, input_nonfinite: Its values, and the input's, that are NaN or infinite;
        histograms count their own.
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
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    model = nnx.merge(*nnx.split(model))
    model.eval()
    found = dict(layers(model))
    hidden = jax.process_index() > 0
    with tqdm(total=2 + len(found), desc="analysis", leave=False, delay=5, disable=hidden) as bar:
        calls = _captured(model, images)
        bar.update()
        value, gradients = _gradients(model, images, labels, loss)
        bar.update()
        looked = []
        for path, (x, y) in calls.items():
            looked.append(_look(path, found[path], x, y, dict(layers(gradients))[path]))
            bar.update()
    return Analysis(float(value), len(images), np.asarray(images[0]), tuple(looked))


def _captured(model: nnx.Module, images: Array) -> dict[str, tuple[Array, Array]]:
    """Input and output of each layer's first call, in the order of the calls."""
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
    graph, state = nnx.split(watching)

    @jax.jit
    def run(state, images):
        copy = nnx.merge(graph, state)
        copy(images)
        seen = dict(layers(copy))
        return {path: (seen[path].seen_input[...], seen[path].seen_output[...]) for path in order}

    calls = run(state, images)
    return {path: calls[path] for path in order}


def _gradients(model: nnx.Module, images, labels, loss) -> tuple[Array, nnx.Module]:
    """The loss, and the net with gradients in the place of its parameters."""
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)

    @jax.jit
    def run(params, rest, images, labels):
        def value(params):
            copy = nnx.merge(graph, params, rest)
            copy.train()
            return loss(copy(images), labels)

        return jax.value_and_grad(value)(params)

    value, gradient = run(params, rest, images, labels)
    return value, nnx.merge(graph, gradient, rest)


def _look(path: str, layer, x: Array, y: Array, gradient) -> LayerAnalysis:
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
        weights=_kernel_histograms(layer),
        gradients=_kernel_histograms(gradient),
        spectrum=layer_spectrum(layer),
        **found,
    )


def _kernel_histograms(layer) -> dict[str, Histogram]:
    kernels = {name: getattr(layer, name).kernel for name in layer.spec.branches}
    return {name: histogram(kernel[...]) for name, kernel in kernels.items()}
