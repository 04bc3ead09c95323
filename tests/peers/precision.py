"""The step of a rounded layer or net beside that of the float one, ours and other libraries'.

    python -m tests.peers.precision [--batch=64] [--channels=64] [--size=32] [--json=FILE] [ROW ...]
    python -m tests.peers.precision --net [--batch=128] [--depth=20] [--json=FILE] [PRECISION ...]
    pip install brevitas torch qwix  # for the rows of these; what is missing is left out

The layer is a 3x3 convolution without bias; its step is the forward pass and the gradients of
input, kernel and learned ranges. The rows, the first of each line being the float one that the
others are compared with:

    float, lsq:w2a2, w=lsq:2, a=lsq:2   ours; any other precision can be asked for
    nnx.Conv, qwix w2a4, qwix w8a8      Flax
    torch, brevitas w2a2                PyTorch, NCHW, not compiled

Qwix has no LSQ. w2a4 is its OdmlQatProvider, which computes with rounded values in float: weights
by the largest |w| of a channel, inputs and outputs by averages of their least and largest values,
straight through; it refuses inputs of 2 bits. w8a8 is its QtProvider, which scales by the largest
value of each step and computes with codes in int8. Those of int4 and int2 it would convolve in
int4, which XLA:CPU of JAX 0.12.0.1 does not compile.

Brevitas has scales that are parameters, at first the same as in lsq:w2a2. It clips behind the
rounding: what lies less than half a step outside has the gradient of what is inside, and LSQ's
factor of the gradient of a step is not there.

The net is that of `configs/quantized.py`; its step is the whole training step, augmentation and
update included, on random images of CIFAR-10's shape.

All run in one process with as many threads as it has CPUs, in turn; nets in pairs with the float
one, a layer's step after one of its own that is not counted, nor is the first round. `ms` is the
median over rounds, `least_ms` the time least disturbed; `ratio` is the median of the time over the
float row's in the same round, as other work on the machine slows both. `convolutions` counts those
of the step's program, `error` is the largest difference from our output over the largest output, in
rows that compute the same.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import quantized
from efficient_nets import analysis, data
from efficient_nets.layers import Conv, LayerSpec
from tests.peers.neurons import Run

NETS = ["float", "dorefa:w2a2", "w=dorefa:2,a=pact:2", "lsq:w2a2", "lq:w2a2", "fatnn:w3La3L"]
NETS += ["xnor", "bireal"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution and what it is shown; images `(batch, size, size, channels)`."""

    batch: int
    channels: int
    size: int

    @functools.cached_property
    def images(self) -> np.ndarray:
        """What a ReLU leaves of a normal distribution."""
        shape = (self.batch, self.size, self.size, self.channels)
        return np.maximum(np.random.default_rng(0).standard_normal(shape, np.float32), 0)

    @functools.cached_property
    def cotangent(self) -> np.ndarray:
        return np.random.default_rng(1).standard_normal(self.images.shape, np.float32)

    def layer(self, precision: str) -> Conv:
        """Ours; the kernel is the same in each row."""
        spec = LayerSpec(precision=precision)
        c = self.channels
        return Conv(c, c, (3, 3), use_bias=False, spec=spec, rngs=nnx.Rngs(0))

    @property
    def kernel(self) -> np.ndarray:
        """`(3, 3, channels, channels)`."""
        return np.asarray(self.layer("float").w.kernel[...])


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that can be run.

    Attributes:
      run: Does one and waits for it.
      output: The layer's output as NHWC.
      convolutions: In the step's program, where it is one.
    """

    run: Callable[[], object]
    output: Callable[[], np.ndarray]
    convolutions: int | None = None


def _jax_step(case: Case, module: nnx.Module) -> Step:
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def step(params, rest, images, cotangent):
        def outputs(params, images):
            net = nnx.merge(graph, params, rest, copy=True)
            y = net(images)
            return y, nnx.state(net, nnx.Not(nnx.Param))

        y, gradient, moved = jax.vjp(outputs, params, images, has_aux=True)
        return y, gradient(cotangent), moved

    arguments = (params, rest, jnp.asarray(case.images), jnp.asarray(case.cotangent))
    return Step(
        lambda: jax.block_until_ready(step(*arguments)),
        lambda: np.asarray(step(*arguments)[0]),
        step.lower(*arguments).as_text().count("stablehlo.convolution"),
    )


def _flax(case: Case) -> nnx.Conv:
    c = case.channels
    module = nnx.Conv(c, c, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    module.kernel[...] = jnp.asarray(case.kernel)
    return module


def _qwix(case: Case, provider: str, rule: str, **types: str) -> Step:
    import qwix

    rules = [getattr(qwix, rule)(module_path=".*", **types)]
    provider = getattr(qwix, provider)(rules)
    module = qwix.quantize_model(_flax(case), provider, jnp.asarray(case.images))
    return _jax_step(case, module)


def _torch_step(case: Case, module) -> Step:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images, cotangent = (
        torch.tensor(x.transpose(0, 3, 1, 2)).contiguous() for x in (case.images, case.cotangent)
    )
    with torch.no_grad():
        module.weight.copy_(torch.tensor(case.kernel.transpose(3, 2, 0, 1)))
    images.requires_grad_()

    def run():
        images.grad = None
        module.zero_grad()
        module(images).backward(cotangent)

    return Step(run, lambda: module(images).detach().numpy().transpose(0, 2, 3, 1))


def _torch(case: Case) -> Step:
    import torch

    c = case.channels
    return _torch_step(case, torch.nn.Conv2d(c, c, 3, padding=1, bias=False))


def _brevitas(case: Case) -> Step:
    """Codes -2 ... 1 and 0 ... 3 of one learned scale each, which start as ours do."""
    from brevitas import nn, quant
    from brevitas.inject.enum import ScalingImplType

    ranges = case.layer("lsq:w2a2").ranges
    weight, images = (float(ranges[name].step[...][0]) for name in ("w", "input"))

    # Its parameter is the scale times 2^(bits-1), for an unsigned one times 2^bits - 1.
    class Weight(quant.Int8WeightPerTensorFloat):
        bit_width, narrow_range = 2, False
        scaling_impl_type, scaling_init = ScalingImplType.PARAMETER, 2 * weight

    class Input(quant.Uint8ActPerTensorFloat):
        bit_width = 2
        scaling_impl_type, scaling_init = ScalingImplType.PARAMETER, 3 * images

    c = case.channels
    options = dict(bias=False, weight_quant=Weight, input_quant=Input)
    return _torch_step(case, nn.QuantConv2d(c, c, 3, padding=1, **options))


@dataclasses.dataclass(frozen=True)
class Row:
    """Attributes: the row of the float layer of its framework, what it needs, how it is made, and
    the row that has the same output, if one has."""

    float_row: str
    needs: tuple[str, ...]
    make: Callable[[Case], Step]
    same: str | None = None


RIVALS = {
    "nnx.Conv": Row("nnx.Conv", (), lambda case: _jax_step(case, _flax(case)), "float"),
    "qwix w2a4": Row(
        "nnx.Conv",
        ("qwix",),
        functools.partial(
            _qwix,
            provider="OdmlQatProvider",
            rule="QuantizationRule",
            weight_qtype="int2",
            act_qtype="int4",
        ),
    ),
    "qwix w8a8": Row(
        "nnx.Conv",
        ("qwix",),
        functools.partial(
            _qwix, provider="QtProvider", rule="QtRule", weight_qtype="int8", act_qtype="int8"
        ),
    ),
    "torch": Row("torch", ("torch",), _torch, "float"),
    "brevitas w2a2": Row("torch", ("torch", "brevitas"), _brevitas, "lsq:w2a2"),
}
ROWS = ["float", "lsq:w2a2", "w=lsq:2", "a=lsq:2", *RIVALS]


def row_of(name: str) -> Row:
    """A rival, or ours of a precision."""
    ours = Row("float", (), lambda case: _jax_step(case, case.layer(name)))
    return RIVALS.get(name, ours)


def available(names: Iterable[str]) -> list[str]:
    """Those whose packages are here, and before them the float rows that they are compared with."""
    kept = []
    for name in names:
        row = row_of(name)
        if lacking := [package for package in row.needs if not available_package(package)]:
            print(f"{name}: left out, as {', '.join(lacking)} cannot be imported", file=sys.stderr)
            continue
        kept += [row.float_row, name]
    return list(dict.fromkeys(kept))


def available_package(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def in_turn(runs: dict[str, Callable], rounds: int, uncounted: int) -> dict[str, np.ndarray]:
    """Milliseconds of each run in each round, `(rounds,)`; `uncounted` ones go before each.

    A round before these is not counted.
    """
    times = {name: np.zeros(1 + rounds) for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            for _ in range(uncounted):
                run()
            started = time.perf_counter()
            run()
            times[name][number] = 1e3 * (time.perf_counter() - started)
    return {name: found[1:] for name, found in times.items()}


def figures(own: np.ndarray, floats: np.ndarray) -> dict:
    return dict(
        ms=float(np.median(own)),
        least_ms=float(np.min(own)),
        ratio=float(np.median(own / floats)),
    )


def layer_table(names: Sequence[str], case: Case, rounds: int) -> Iterator[dict]:
    names = available(names)
    steps = {name: row_of(name).make(case) for name in names}
    # What ran before a step left other caches, and threads that still spin.
    times = in_turn({name: step.run for name, step in steps.items()}, rounds, uncounted=1)
    outputs = {name: step.output() for name, step in steps.items()}
    for name in names:
        row, error = row_of(name), None
        if row.same in outputs:
            reference = outputs[row.same]
            error = float(np.max(np.abs(outputs[name] - reference)) / np.max(np.abs(reference)))
        yield dict(
            row=name,
            **figures(times[name], times[row.float_row]),
            of=row.float_row,
            convolutions=steps[name].convolutions,
            error=error,
            all_ms=times[name].tolist(),
        )


def random_images(count: int, shape: tuple[int, int, int] = (32, 32, 3)) -> data.Dataset:
    """Noise, of CIFAR-10's shape."""
    rng, channels = np.random.default_rng(0), shape[-1]
    resident = {
        "image": rng.integers(0, 256, (count, *shape), np.uint8),
        "label": rng.integers(0, 10, count, np.int32),
    }
    info = data.Info("random", 10, shape, (0.5,) * channels, (0.25,) * channels)
    train = data.Source("random train", range(count), shape, 10, False, 0, resident)
    return data.Dataset(info, train, None, None)


class Net:
    """A net in training, on random images: a call is one step."""

    def __init__(self, config, shape: tuple[int, int, int] = (32, 32, 3)):
        self._run = Run(config, random_images(4 * config.train.batch_size, shape))
        self._state, self._batches = self._run.state(0), self._run.batches(0)
        model = nnx.merge(self._run.run.graph, self._state.params, self._state.stats)
        self.cost = analysis.model_cost(model, self._run.run.dataset.info.image_shape)

    def __call__(self) -> None:
        run = self._run
        self._state, metrics = run.step(self._state, next(self._batches), run.resident)
        jax.block_until_ready((self._state, metrics))


def _config(precision: str, batch: int, depth: int):
    config = quantized.get_config(precision)
    config.model.depth, config.train.batch_size = depth, batch
    return config


def net_table(names: Sequence[str], batch: int, depth: int, rounds: int) -> Iterator[dict]:
    """Each net in pairs with the float one."""
    every = dict.fromkeys(["float", *names])
    nets = {name: Net(_config(name, batch, depth)) for name in every}
    for net in nets.values():
        net()
    for name in names:
        times = in_turn({key: nets[key] for key in ("float", name)}, rounds, uncounted=0)
        cost = nets[name].cost
        yield dict(
            precision=name,
            **figures(times[name], times["float"]),
            params=cost["params"],
            packed_bytes=cost["packed_bytes"],
            bops=cost["bops"],
            all_ms=times[name].tolist(),
            float_ms=times["float"].tolist(),
        )


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "cpus": str(len(os.sched_getaffinity(0)))}
    for package in ("jax", "jaxlib", "flax", "qwix", "torch", "brevitas"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def save(args: argparse.Namespace, rows: list[dict]) -> None:
    """Writes `--json`, if it was asked for."""
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(versions=versions(), arguments=vars(args), rows=rows), file, indent=2)


def _shown(name: str, value) -> str:
    text = f"{value:,.4g}" if isinstance(value, float) else "-" if value is None else f"{value}"
    return f"{text:<20}" if name in ("row", "precision") else f"{text:>14}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", action="store_true", help="of the net, not of one layer")
    parser.add_argument("--batch", type=int, help="64, with --net 128")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    args = parser.parse_args()
    if args.net:
        rows = net_table(args.rows or NETS, args.batch or 128, args.depth, args.rounds)
    else:
        case = Case(args.batch or 64, args.channels, args.size)
        rows = layer_table(args.rows or ROWS, case, args.rounds)
    found = []
    for row in rows:
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        if not found:
            print("  ".join(_shown("row" if i == 0 else "", x) for i, x in enumerate(shown)))
        print("  ".join(_shown(*item) for item in shown.items()), flush=True)
        found.append(row)
    save(args, found)


if __name__ == "__main__":
    main()
