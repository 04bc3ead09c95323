"""What tests compare a net with: its layers in NumPy's float64, on random parameters."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_nets import layers, models, paths


def build(name, image_shape, rules=(), dtype="float64", **options):
    """A net with 5 logits in evaluation mode, every array drawn, and these arrays by their path.

    float64 takes the fixture `x64`.
    """

    def make():
        made = models.create(
            name, image_shape=image_shape, num_classes=5, rngs=nnx.Rngs(0), **options
        )
        return layers.convert(made, rules, nnx.Rngs(1).params())

    graph, state = nnx.split(nnx.eval_shape(make))
    draws = np.random.default_rng(0)

    def value(name, x):
        drawn = draws.normal(0, 1, x.shape)
        if name.endswith("kernel"):
            drawn = drawn / np.sqrt(np.prod(x.shape[:-1]))
        return (0.5 + abs(drawn) if name.endswith("var") else drawn).astype(dtype)

    values = paths.map_named(value, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, paths.map_named(lambda _, x: jnp.asarray(x), values))
    model = nnx.merge(graph, state)
    model.eval()
    return model, paths.named_leaves(values)


def part(values, prefix):
    """The arrays below a path, by the rest of theirs."""
    start = prefix + "/"
    return {name[len(start) :]: x for name, x in values.items() if name.startswith(start)}


def conv(x, kernel, stride=1, padding=None, depthwise=False):
    """x `(N, H, W, C)`, kernel `(k, k, C or 1, features)`; zeros around, `k // 2` if not given."""
    size = kernel.shape[0]
    padding = size // 2 if padding is None else padding
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    windows = windows[:, ::stride, ::stride]  # (N, H', W', C, k, k)
    if depthwise:
        return np.einsum("nhwcij,ijc->nhwc", windows, kernel[:, :, 0])
    return np.einsum("nhwcij,ijcf->nhwf", windows, kernel)


def batch_norm(x, norm):
    return (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / deviation * norm["scale"] + norm["bias"]


def dense(x, layer):
    return x @ layer["w/kernel"] + layer.get("w/bias", 0)
