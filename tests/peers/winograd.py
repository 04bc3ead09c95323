"""Winograd-aware layers beside direct ones: their error, their step, what they learn.

    python -m tests.peers.winograd --errors            # of F(m, 3) by points, float32 and int8
    python -m tests.peers.winograd --step [ROW ...]    # of the ResNet-18-like net, beside PyTorch
    python -m tests.peers.winograd --memory            # of the same steps, each in its own process
    python -m tests.peers.winograd --accuracy [ROW ...] [--steps=300] [--seeds=3] [--width=0.125]
    pip install torch  # for the rows of it; what is missing is left out

Rows of a net are `direct`, or a method of `recipes.winograd` with options, as `flex,tile=6`; bits=8
if nothing else is said, bits=0 is float. Those of PyTorch are the same net in its own layers:
`torch direct` in float, `torch batched` and `torch broadcast` with Winograd-aware layers as one
writes them from the formula, F(4, 3), int8, learned transforms, ranges by moving averages, as
arXiv 2002.10711 trains them. The batched one multiplies matrices tap by tap; the broadcast one
multiplies each input channel with each feature first and adds up then.

`--step` and `--memory` are of one training step of 16 images, at a quarter of the width: forward,
backward, update by Adam. Ours includes augmentation. `ms` is the median over rounds in which all
take their turn, `ratio` the median of the time over the float direct net's of the same framework in
the same round. `--memory` is of the processes' peak while they run steps, above what they take
before the first; for ours above what compiling took, and beside it what the compiler planned.

`--accuracy` trains on CIFAR-10 with Adam at 1e-3 and cosine decay, batch 64, and says the test
accuracy, mean and deviation over seeds, which share one compilation.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import winograd as experiment_config
from efficient_nets import analysis, calibration, data, evaluation, layers
from efficient_nets.layers import Conv, LayerSpec
from efficient_nets.ops import linear_maps, winograd
from efficient_nets.ops.winograd import points, transforms
from tests.peers.neurons import Run
from tests.peers.precision import available_package, in_turn, random_images, save

BATCH, WIDTH = 16, 0.25
STEPS = ["direct,bits=0", "direct", "flex", "static", "tap", "flex,bits=0"]
STEPS += ["torch direct", "torch batched", "torch broadcast"]
ACCURACY = [
    "direct",
    *(
        f"{method},tile={tile}"
        for tile in (4, 6)
        for method in ("static-rounded", "static", "flex", "tap")
    ),
]


def errors(tiles=(2, 4, 6, 8)):
    """Relative errors (root of mean square) of a 3x3 convolution of 64 channels, by points.

    Against float64. int8: inputs and kernels whole, the transformed ones and their sums rounded to
    8 bits, per layer and per tap, ranges being those of the values.
    """
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(4, 24, 24, 64)), rng.normal(size=(3, 3, 64, 64)) / 24
    direct = linear_maps.ConvMap((1, 1), "SAME", (1, 1), 1, (3, 3))
    with jax.enable_x64(True):
        exact = np.asarray(direct(jnp.asarray(x), [jnp.asarray(k)]))

    def error(y):
        return float(np.sqrt(np.mean(np.square(np.asarray(y) - exact)) / np.mean(np.square(exact))))

    x, k = jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32)
    for tile in tiles:
        for name in points.SETS:
            form = f"winograd:{tile},points={name}"
            made = transforms.cook_toom(tile, 3, points.points(name, tile + 1))
            static = winograd.WinogradMap(direct, winograd.parse(form))

            def computed(precision, static=static, form=form):
                if precision is None:
                    return winograd.apply(static, x, [k], static.constants(), lambda *_: None)
                spec = LayerSpec(algorithm=form, precision=precision)
                layer = Conv(64, 64, (3, 3), use_bias=False, spec=spec, rngs=nnx.Rngs(0))
                layer.w.kernel[...] = k
                layer = layers.calibrate(layer, x)
                layer.eval()
                return layer(x)

            sites = ("transformed_input", "transformed_kernel", "hadamard")
            tap = {site: dict(method="minmax", bits=8, per="tap") for site in sites}
            yield dict(
                row=f"F({tile}, 3) {name}",
                float32=error(computed(None)),
                int8=error(computed("minmax:i8")),
                tap=error(computed(tap)),
                rounded=error(computed("minmax:t8")),
                amplification=transforms.amplification(made),
                condition=transforms.condition(points.points(name, tile + 1)),
            )


def config_of(row: str, width: float, batch: int):
    config = experiment_config.get_config(f"{row},width={width}")
    config.train.batch_size = batch
    return config


class Ours:
    """The net of a row in training: a call is one step."""

    def __init__(self, row: str):
        self._run = Run(config_of(row, WIDTH, BATCH), random_images(4 * BATCH))
        self._state, self._batches = self._run.state(0), self._run.batches(0)
        arguments = (self._state, next(self._batches), self._run.resident)
        self._step = self._run.step.lower(*arguments).compile()
        found = self._step.memory_analysis()
        self.planned = found.temp_size_in_bytes

    def __call__(self) -> None:
        batch = next(self._batches)
        self._state, metrics = self._step(self._state, batch, self._run.resident)
        jax.block_until_ready((self._state, metrics))


class Torch:
    """The same net in PyTorch: a call is one step."""

    planned = None

    def __init__(self, row: str):
        import torch

        from tests.peers import winograd_torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self._net = winograd_torch.net(WIDTH, row.removeprefix("torch "))
        self._optimizer = torch.optim.Adam(self._net.parameters(), 1e-3, weight_decay=4e-5)
        self._images = torch.randn(BATCH, 3, 32, 32)
        self._labels = torch.randint(0, 10, (BATCH,))

    def __call__(self) -> None:
        import torch

        self._optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self._net(self._images), self._labels)
        loss.backward()
        self._optimizer.step()


def net_of(row: str):
    return Torch(row) if row.startswith("torch") else Ours(row)


def steps(rows, rounds: int):
    rows = [row for row in rows if not row.startswith("torch") or available_package("torch")]
    firsts = {row: "torch direct" if row.startswith("torch") else "direct,bits=0" for row in rows}
    rows = list(dict.fromkeys([*firsts.values(), *rows]))
    nets = {row: net_of(row) for row in rows}
    times = in_turn(nets, rounds, uncounted=0)
    for row in rows:
        first = times[firsts.get(row, row)]
        ratio = float(np.median(times[row] / first))
        yield dict(
            row=row, ms=float(np.median(times[row])), ratio=ratio, all_ms=times[row].tolist()
        )


def memory(rows):
    """Each row in a process of its own, whose peak nothing else raises."""
    for row in rows:
        if row.startswith("torch") and not available_package("torch"):
            continue
        command = [sys.executable, "-m", "tests.peers.winograd", "--memory-of", row]
        yield json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def _memory_of(row: str) -> dict:
    net = net_of(row)
    _reset_peak()
    before = _peak()
    for _ in range(3):
        net()
    mib = 2**20
    planned = None if net.planned is None else net.planned / mib
    return dict(row=row, peak_mib=(_peak() - before) / mib, planned_mib=planned)


def _reset_peak() -> None:
    """Linux forgets the highest resident size when told so."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak() -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _accuracy(run: Run, seed: int) -> float:
    """Test accuracy of a whole training, its ranges from training images first."""
    state = calibration.calibrated_start(run.run, run.state(seed), trained=False)
    for _, batch in zip(range(run.run.total_steps), run.batches(seed), strict=False):
        state, _ = run.step(state, batch, run.resident)
    return evaluation.evaluate_all(run.evaluators, state)["test/accuracy"]


def accuracies(rows, steps: int, seeds: int, width: float):
    dataset = None
    for row in rows:
        config = config_of(row, width, 64)
        config.data.train, config.data.validation = "train", ""
        config.schedule.name, config.schedule.milestones = "cosine", ()
        dataset = dataset or data.load(config.data)
        config.train.epochs = steps / (len(dataset.train) // 64)
        config.schedule.warmup_epochs = 0.1 * config.train.epochs
        started = time.perf_counter()
        run = Run(config, dataset)
        found = []
        for seed in range(seeds):
            found.append(_accuracy(run, seed))
            print(f"  {row} seed {seed}: {found[-1]:.4f}", file=sys.stderr, flush=True)
        state = run.state(0)
        model = nnx.merge(run.run.graph, state.params, state.stats)
        cost = analysis.model_cost(model, dataset.info.image_shape)
        yield dict(
            row=row,
            accuracy=100 * float(np.mean(found)),
            deviation=100 * float(np.std(found)),
            macs=cost["macs"],
            bops=cost["bops"],
            packed_bytes=cost["packed_bytes"],
            seconds=time.perf_counter() - started,
            all=found,
        )


def _shown(value) -> str:
    if isinstance(value, str):
        return f"{value:<24}"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return f"{'-':>12}"
    return f"{value:>12,.4g}" if isinstance(value, float) else f"{value:>12,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("errors", "step", "memory", "accuracy"):
        what.add_argument(f"--{name}", action="store_true")
    what.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--json")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(_memory_of(args.memory_of)))
        return
    if args.errors:
        rows = errors()
    elif args.step:
        rows = steps(args.rows or STEPS, args.rounds)
    elif args.memory:
        rows = memory(args.rows or STEPS)
    else:
        rows = accuracies(args.rows or ACCURACY, args.steps, args.seeds, args.width)
    found = []
    for row in rows:
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        if not found:
            print("".join([f"{'row':<24}", *(f"{name:>12}" for name in list(shown)[1:])]))
        print("".join(map(_shown, shown.values())), flush=True)
        found.append(row)
    save(args, found)


if __name__ == "__main__":
    main()
