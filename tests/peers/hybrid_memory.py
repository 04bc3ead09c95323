"""Memory of the hybrid backward beside its rivals: QVGG-7, compiled ahead of time for a TPU.

    pip install libtpu
    python -m tests.peers.hybrid_memory [--batch=256] [--layout=Q7] [hybrid autodiff ...]

No TPU is needed: the gradient of the loss at float32 is compiled for one TPU v5e core, about a
minute a row, and the compiler tells what the program takes. XLA:CPU drops the barriers that the
hybrid backward works by, so nothing can be seen there. The rows differ in the blocks alone;
pooling, head and loss are the same:

    flax             nnx.Conv to 3C channels, nnx.BatchNorm over them, a * b + c, norm, ReLU
    flax remat       the same, each block under nnx.remat (jax.checkpoint)
    autodiff         our block with backward='autodiff'
    autodiff remat   the same, each block under nnx.remat
    hybrid           our block with backward='hybrid'
"""

import argparse
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles, it shall not look for a TPU
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from efficient_nets import models  # noqa: E402
from efficient_nets.layers import convert  # noqa: E402

IMAGE = (32, 32, 3)


class FlaxBlock(nnx.Module):
    """The quadratic block as a Flax user would write it, the three branches in one convolution."""

    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(in_features, 3 * features, (3, 3), rngs=rngs)
        self.branch_norms = nnx.BatchNorm(3 * features, momentum=0.9, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        a, b, c = jnp.split(self.branch_norms(self.conv(x)), 3, axis=-1)
        return nnx.relu(self.norm(a * b + c))


class Remat(nnx.Module):
    """A block that keeps its input alone and runs again in the backward pass."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


def _with_blocks(model: nnx.Module, change) -> nnx.Module:
    """The net with `change(block)` in place of each convolution block."""
    for number in range(1, model.stages + 1):
        blocks = getattr(model, f"stage{number}")
        setattr(model, f"stage{number}", nnx.List([change(block) for block in blocks]))
    return model


def _flax(block) -> FlaxBlock:
    geometry = block.conv.geometry
    return FlaxBlock(geometry.in_features, geometry.features, nnx.Rngs(0))


def _ours(model: nnx.Module, backward: str) -> nnx.Module:
    rule = {"match": "stage", "neuron": "ours", "norm": "branch", "backward": backward}
    return convert(model, [rule], jax.random.key(0))


RIVALS = {
    "flax": lambda model: _with_blocks(model, _flax),
    "flax remat": lambda model: _with_blocks(model, lambda block: Remat(_flax(block))),
    "autodiff": lambda model: _ours(model, "autodiff"),
    "autodiff remat": lambda model: _with_blocks(_ours(model, "autodiff"), Remat),
    "hybrid": lambda model: _ours(model, "hybrid"),
}


def compiled_gradient(model: nnx.Module, batch: int, device, image_shape=IMAGE):
    """The gradient of the mean loss, and the new running averages, compiled for the device."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    sharding = jax.sharding.SingleDeviceSharding(device)

    def gradient(params, rest, images, labels):
        def loss(params):
            net = nnx.merge(graphdef, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(net(images), labels)
            return jnp.mean(losses), nnx.state(net, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def on_device(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    arguments = jax.tree.map(on_device, (params, rest, images, labels))
    return jax.jit(gradient).lower(*arguments).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layout", default="Q7")
    parser.add_argument("rows", nargs="*", default=list(RIVALS), help=f"of {', '.join(RIVALS)}")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1")
    print(f"{'':16}  {'temporary':>13}  {'work':>12}  {'accessed':>10}")
    for row in args.rows:
        started = time.monotonic()
        model = models.create(
            "vgg", image_shape=IMAGE, num_classes=10, layout=args.layout, rngs=nnx.Rngs(0)
        )
        compiled = compiled_gradient(RIVALS[row](model), args.batch, topology.devices[0])
        cost = compiled.cost_analysis()
        print(
            f"{row:16}  {compiled.memory_analysis().temp_size_in_bytes / 2**20:9,.0f} MiB"
            f"  {cost['flops'] / 1e9:6,.0f} GFLOP  {cost['bytes accessed'] / 2**30:6.1f} GiB"
            f"   (compiled in {time.monotonic() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
