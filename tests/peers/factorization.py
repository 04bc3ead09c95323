"""The step of a factorized layer beside the dense one, ours and tensorly-torch's.

    python -m tests.peers.factorization [--share=0.1] [--rounds=9] [--json=FILE] [CASE/FORM ...]
    python -m tests.peers.factorization --net [--share=0.1] [--json=FILE] [MODEL/FORM ...]
    pip install torch tensorly tensorly-torch  # for the rows of these; left out where missing

A step is the forward pass and the gradients of input and parameters, without bias, float32. Cases:
`conv`, 3x3, 64 to 128 channels, 32 images of 16x16, and `dense`, 1024 to 1024, 128 rows. Forms are
those that both have, with the same cores and so the same parameters: CP, Tucker of every mode and
a tensor train over the axes of a convolution; CP, Tucker and a tensor train of pairs (BlockTT) over
the modes 8x8x16 of inputs and features of a dense layer. Ranks are what tensorly-torch makes of the
share of the dense kernel's parameters; where a bond is larger than what the cores on one side of it
can span, ours has the smaller one, which can be the same kernels.

All of a case and form run in one process, in turn, each after a step that is not counted. `ms` is
the median over rounds, `ratio` the median of the time over the same framework's dense layer's in
the same round. `held_mib` is the memory of our step's program as the compiler planned it, with its
arguments and results: the layer, x, all gradients, and what is kept in between.

With --net, the whole training step of `configs/factorized.py` on random images: LeNet, 128 of
MNIST's shape, and VGG-16 of an eighth of the channels, 128 of CIFAR-10's, in pairs with the dense
net.
"""

import argparse
import os
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import factorized
from efficient_nets.layers import Conv, Dense, LayerSpec
from efficient_nets.ops.factorization import forms
from tests.peers.precision import Net, available_package, figures, in_turn, save

MODES = (8, 8, 16)
CASES = {"conv": ("cp", "tucker", "tt"), "dense": ("cp", "tucker", "tt")}
RUNS = ("auto", "factorized", "reconstructed")
THEIRS = ("factorized", "reconstructed")
NETS = {"lenet": ("mnist", (28, 28, 1)), "vgg": ("cifar10", (32, 32, 3))}


def images(case: str) -> np.ndarray:
    shape = (32, 16, 16, 64) if case == "conv" else (128, 1024)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def ours(case: str, kernel: str):
    """A layer whose call is one step, what it holds at once, and its parameters."""
    spec, rngs = LayerSpec(kernel=kernel), nnx.Rngs(0)
    if case == "conv":
        layer = Conv(64, 128, (3, 3), use_bias=False, spec=spec, rngs=rngs)
    else:
        layer = Dense(1024, 1024, use_bias=False, spec=spec, rngs=rngs)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    x = jnp.asarray(images(case))

    def step(params, x):
        y, back = jax.vjp(lambda params, x: nnx.merge(graph, params, rest, copy=True)(x), params, x)
        return back(jnp.ones_like(y))

    compiled = jax.jit(step).lower(params, x).compile()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    planned = sum(
        (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    )
    return lambda: jax.block_until_ready(compiled(params, x)), planned, count


def theirs(case: str, form: str, share: float, implementation: str):
    """tensorly-torch's layer whose call is one step, its ranks as ours are given, parameters."""
    import tltorch
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    x = torch.tensor(images(case))
    if case == "conv":
        x = x.permute(0, 3, 1, 2).contiguous()
        options = dict(kernel_size=3, order=2, padding=1, bias=False)
        if implementation == "dense":
            layer = torch.nn.Conv2d(64, 128, 3, padding=1, bias=False)
        else:
            layer = tltorch.FactorizedConv(
                *(64, 128), **options, factorization=form, rank=share, implementation=implementation
            )
    elif implementation == "dense":
        layer = torch.nn.Linear(1024, 1024, bias=False)
    else:
        layer = tltorch.FactorizedLinear(
            in_tensorized_features=MODES,
            out_tensorized_features=MODES,
            bias=False,
            factorization="blocktt" if form == "tt" else form,
            rank=share,
            implementation=implementation,
        )
    x.requires_grad_()

    def step():
        x.grad = None
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.ones_like(y))

    kernel = "" if implementation == "dense" else _kernel(case, form, layer.weight)
    return step, kernel, sum(p.numel() for p in layer.parameters())


def _kernel(case: str, form: str, weight) -> str:
    """Our short form of the same cores: their kernels are (features, in, window)."""
    rank = weight.rank
    modes = "x".join(map(str, MODES))
    of_dense = f",layout=split,order={len(MODES)},in={modes},out={modes},always"
    if form == "cp":
        text = f"cp:{rank}"
    elif form == "tucker":
        sizes = tuple(rank)
        if case == "conv":  # ours in the order of inputs, window, features
            features, inputs, *window = sizes
            sizes = (inputs, *window, features)
        else:  # features first there
            sizes = (*sizes[len(MODES) :], *sizes[: len(MODES)])
        text = "tucker:" + "x".join(map(str, sizes))
    else:
        text = "tt:" + "x".join(map(str, tuple(rank)[1:-1]))
        of_dense = f",in={modes},out={modes},always"
    if case == "dense":
        return text + of_dense
    return text + {"cp": ",always", "tucker": ",layout=axes,always"}.get(
        form, ",layout=axes,order=1,always"
    )


def table(case: str, form: str, share: float, rounds: int) -> list[dict]:
    steps, notes, kernel = {}, {}, f"{form}:{share}"
    if all(map(available_package, ("torch", "tltorch"))):
        for name in ("dense", *THEIRS):
            step, found, count = theirs(case, form, share, name)
            steps[f"torch {name}"], notes[f"torch {name}"] = step, (count, None)
            kernel = found or kernel
    step, planned, count = ours(case, "dense")
    steps["dense"], notes["dense"] = step, (count, planned)
    for run in RUNS:
        step, planned, count = ours(case, f"{kernel.removesuffix(',always')},run={run},always")
        steps[run], notes[run] = step, (count, planned)
    times = in_turn(steps, rounds, uncounted=1)
    rows = []
    for name, own in times.items():
        base = times["torch dense" if name.startswith("torch") else "dense"]
        count, planned = notes[name]
        rows.append(
            dict(
                case=f"{case}/{form}",
                row=name,
                kernel="" if "dense" in name else kernel,
                params=count,
                ms=float(np.median(own)),
                least_ms=float(np.min(own)),
                ratio=float(np.median(own / base)),
                held_mib=None if planned is None else planned / 2**20,
                all_ms=own.tolist(),
            )
        )
    return rows


def net(name: str, kernel: str) -> Net:
    dataset, shape = NETS[name]
    config = factorized.get_config(f"{kernel},model={name},dataset={dataset}")
    if name == "vgg":
        config.model.width = 0.125
    return Net(config, shape)


def net_table(names: Sequence[str], share: float, rounds: int) -> Iterator[dict]:
    """Each net in pairs with the dense one of its model."""
    models = dict.fromkeys(name.split("/")[0] for name in names)
    dense = {model: net(model, "dense") for model in models}
    for name in names:
        model, form = name.split("/")
        own = net(model, f"{form}:{share}")
        times = in_turn({"dense": dense[model], name: own}, rounds, uncounted=1)
        of = {"dense_ms": float(np.median(times["dense"])), **own.cost}
        shown = {key: of[key] for key in ("dense_ms", "params", "macs")}
        yield dict(row=name, **figures(times[name], times["dense"]), **shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json")
    parser.add_argument("rows", nargs="*", metavar="CASE/FORM")
    parser.add_argument("--net", action="store_true", help="of a net, not of one layer")
    args = parser.parse_args()
    found = []
    if args.net:
        every = [f"{model}/{form}" for model in NETS for form in forms.FORMS]
        for row in net_table(args.rows or every, args.share, args.rounds):
            print(
                f"{row['row']:<14}{row['params']:>9,}{row['macs']:>12,}{row['dense_ms']:>9.1f} ms"
                f"{row['ms']:>9.1f} ms{row['ratio']:>8.2f}",
                flush=True,
            )
            found.append(row)
        save(args, found)
        return
    for name in args.rows or [f"{case}/{form}" for case, has in CASES.items() for form in has]:
        for row in table(*name.split("/"), args.share, args.rounds):
            held = "-" if row["held_mib"] is None else f"{row['held_mib']:.1f}"
            print(
                f"{row['case']:<14}{row['row']:<22}{row['params']:>9,}{row['ms']:>9.2f} ms"
                f"{row['least_ms']:>9.2f}{row['ratio']:>8.2f}{held:>8}  {row['kernel']}",
                flush=True,
            )
            found.append(row)
    save(args, found)


if __name__ == "__main__":
    main()
