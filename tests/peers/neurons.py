"""Every neuron on one small net: cost, step time and accuracy, or memory.

    python -m tests.peers.neurons [--seeds=3] [--data=mnist] [--json=FILE] [NEURON ...]
    pip install libtpu && python -m tests.peers.neurons --memory [--batch=256] [NEURON ...]

Without --memory, the net of `configs/neurons.py`: parameters, MACs, mean and deviation of the test
accuracy over seeds, and the step time of the hybrid backward, of autodiff and of the linear net, in
turn within one process and so comparable with each other (median of 21).

With it, the first stage of QVGG-7 (two 3x3 convolutions to 64 channels, a norm on each branch) and
a head on 32x32x3 images: temporaries and work of the gradient of the loss by the hybrid backward
and by autodiff at float32, compiled ahead of time for one TPU v5e core, and the seconds that the
compiler took. It counts the body of a loop once, so the work of full forms (t1, t1&2, cqnn) is not
known. Not the LeNet: the compiler is slow where a convolution's kernel gradient has few channels on
both sides and a large batch. The LeNet's linear form, autodiff, took it 5 minutes, most of them its
first convolution, for 1 MiB of temporaries. With 3x3 kernels on 32x32 at batch 256, a convolution
from 3 to 4 channels was not done after two minutes, from 16 to 16 took 6 s, from 3 to 64 took 4 s.
"""

import argparse
import dataclasses
import functools
import json
import time

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies

from configs import neurons as config_file
from efficient_nets import analysis, data, evaluation, experiment, models
from efficient_nets import train as training
from efficient_nets.layers import convert
from efficient_nets.models import parts
from efficient_nets.ops import neurons

NAMES = [*neurons.NEURONS, "t1:1", "t1:4", "cqnn:4"]


def config_of(neuron: str, dataset: str, backward: str = "hybrid"):
    config = config_file.get_config(neuron)
    config.layers = (dict(config.layers[0], backward=backward),)
    config.data.name = dataset
    if dataset == "digits":
        config.data.train = "train"
    return config


class Run:
    """A net with its compiled step, which seeds share."""

    def __init__(self, config, dataset):
        self.run = experiment.build(config, dataset)
        self.step = jax.jit(functools.partial(training.train_step, self.run), donate_argnums=0)
        self.resident = evaluation.put_resident(self.run, "train")
        self.evaluators = evaluation.evaluators(self.run)

    def state(self, seed: int):
        config = self.run.config.copy_and_resolve_references()
        config.seed = seed
        return dataclasses.replace(self.run, config=config).initial_state()

    def batches(self, seed: int):
        config = self.run.config
        return data.train_batches(self.run.dataset.train, config.train.batch_size, seed=seed)


def accuracy(run: Run, seed: int) -> float:
    """Test accuracy of a whole training; the seed is of weights and batches."""
    state = run.state(seed)
    for _, batch in zip(range(run.run.total_steps), run.batches(seed), strict=False):
        state, _ = run.step(state, batch, run.resident)
    return evaluation.evaluate_all(run.evaluators, state)["test/accuracy"]


def step_times(runs: list[Run], repeats: int = 21) -> list[float]:
    """Median seconds of a step of each run, taken in turn."""
    states = [run.state(0) for run in runs]
    batch = next(runs[0].batches(0))
    times = np.zeros((repeats + 2, len(runs)))
    for row in times:
        for i, run in enumerate(runs):
            start = time.perf_counter()
            states[i], metrics = run.step(states[i], batch, run.resident)
            jax.block_until_ready((states[i], metrics))
            row[i] = time.perf_counter() - start
    return np.median(times[2:], 0).tolist()


def table(names, dataset_name: str, seeds: int):
    dataset = data.load(config_of("linear", dataset_name).data)
    for name in names:
        config = config_of(name, dataset_name)
        cost = analysis.model_cost(
            experiment.abstract_model(config, dataset.info), dataset.info.image_shape
        )
        kinds = [
            config,
            config_of(name, dataset_name, "autodiff"),
            config_of("linear", dataset_name),
        ]
        runs = [Run(kind, dataset) for kind in kinds]
        hybrid, autodiff, linear = step_times(runs)
        scores = [accuracy(runs[0], seed) for seed in range(seeds)]
        yield dict(
            neuron=name,
            params=cost["params"],
            macs=cost["macs"],
            hybrid_ms=1e3 * hybrid,
            autodiff_ms=1e3 * autodiff,
            linear_ms=1e3 * linear,
            accuracy=float(np.mean(scores)),
            deviation=float(np.std(scores)),
        )


def first_stage(neuron: str, backward: str):
    """The first stage of VGG's layout Q7 with the neuron, a global mean, the head."""
    model = models.create(
        "vgg", image_shape=(32, 32, 3), num_classes=10, layout="Q7", rngs=nnx.Rngs(0)
    )
    for number in range(2, model.stages + 1):
        delattr(model, f"stage{number}")
    model.stages = 1
    model.head = parts.head(64, 10, rngs=nnx.Rngs(0))
    rule = dict(match="stage", neuron=neuron, norm="branch", backward=backward)
    return convert(model, [rule], jax.random.key(0))


def memory(names, batch: int):
    # It sets, when it is imported, what libtpu needs where there is no TPU.
    from tests.peers import hybrid_memory

    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1")
    for name in names:
        row = dict(neuron=name)
        for backward in ("hybrid", "autodiff"):
            started = time.monotonic()
            model = first_stage(name, backward)
            compiled = hybrid_memory.compiled_gradient(model, batch, topology.devices[0])
            row[f"{backward}_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
            row[f"{backward}_gflop"] = compiled.cost_analysis()["flops"] / 1e9
            row[f"{backward}_s"] = time.monotonic() - started
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="mnist", choices=["mnist", "fashion_mnist", "digits"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--json")
    parser.add_argument("neurons", nargs="*", default=NAMES)
    args = parser.parse_args()
    rows = (
        memory(args.neurons, args.batch)
        if args.memory
        else table(args.neurons, args.data, args.seeds)
    )
    found = []
    for row in rows:
        if not found:
            print("  ".join(f"{name:>12}" for name in row))
        cells = (f"{x:12,.4g}" if isinstance(x, float) else f"{x:>12}" for x in row.values())
        print("  ".join(cells), flush=True)
        found.append(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
