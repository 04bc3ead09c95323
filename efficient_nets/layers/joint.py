"""Layers that share the cores of one factorized kernel: `join`, and what `convert` needs of it.

K_1 ... K_n are the slices of one factorized tensor (T-Net, Kossaifi et al., arXiv 1904.02698; see
`ops.factorization.joint`). Its cores are parameters of one object that all layers hold, so that
NNX, and with it optimizers, averages and checkpoints, has them once, under the path of the first
layer; the gradients of all layers add up in them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import kernel as kernels
from efficient_nets.layers.linear import Conv, Dense, Layer
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.ops import factorization

Held = dict[str, nnx.Variable | kernels.Kernel | kernels.Joint]  # a layer's kernels by branch
JOIN_STARTS = {
    "own": "fresh kernels, each of the mean square of its layer's dense one",
    "kept": "the kernels that the layers have, decomposed together",
}


def join(
    layers: Sequence[Layer],
    kernel: factorization.Factorization | str = "tucker:0.1",
    *,
    start: str = "own",
    name: str = "joint",
    rngs: nnx.Rngs,
) -> None:
    """Makes layers share the cores of one factorized kernel `(n, *kernel_size, in, features)`.

    In place. A neuron of several branches has one such kernel a branch. Biases, norms and
    quantizers stay each layer's own. A model that holds the layers is saved and trained as any.

    Args:
      layers: At least two Dense or Conv, alike in kernel shape, groups, neuron and norm.
      kernel: Of `ops.factorization.spec`; a share is one of the parameters of all n kernels.
      start: 'own' makes fresh kernels, 'kept' decomposes those that the layers have.
      name: Goes into the layers' specs: rules of `convert` leave layers alone that say the same.
      rngs: Of fresh values.

    Raises:
      UserError: if there are fewer than two layers, they differ, the cores would have no fewer
        parameters than the kernels (and `always` is not given), or a layer shares with others.
    """
    names.pick("start", start, JOIN_STARTS)
    if not name or factorization.parse(kernel) == factorization.DENSE:
        raise UserError(
            f"kernel='{kernel}', name={name!r}: layers share cores; give a kernel such as "
            "'tucker:0.1', and a name"
        )
    group = Group(name)
    for index, layer in enumerate(layers):
        if not isinstance(layer, Dense | Conv) or layer.removed:
            raise UserError(f"layers[{index}] is a {type(layer).__name__}: allowed Dense, Conv")
        spec = dataclasses.replace(layer.spec, kernel=kernel, joint=name, start=start)
        group.add(f"layers[{index}]", layer, spec)
    group.check()
    check_whole(group.layers.items())
    group.form()  # which raises while the layers are as they were
    for path, layer in group.layers.items():
        layer.respecify(group.specs[path], rngs, joins=True)
    group.tie(rngs)


class Group:
    """Layers by path that are to share cores, and the specs by which they do."""

    def __init__(self, name: str):
        self.name = name
        self.layers: dict[str, Layer] = {}
        self.specs: dict[str, LayerSpec] = {}
        self._held: list[Held] = []  # before they had these specs

    def add(self, path: str, layer: Layer, spec: LayerSpec) -> None:
        """A layer that does not have the spec yet."""
        if any(layer is other for other in self.layers.values()):
            raise UserError(f"joint={self.name!r}: {path} is there twice")
        self.layers[path], self.specs[path] = layer, spec
        self._held.append(_held(layer))

    def check(self) -> None:
        """Raises a UserError unless there are two layers or more, and they are alike."""
        if len(self.layers) < 2:
            (path, layer), *_ = self.layers.items()
            shape = layer.geometry.kernel_shape
            raise UserError(
                f"joint={self.name!r}: {path} is the only layer with kernels {shape}; at least 2 "
                "of one shape share cores, leave others out by match"
            )
        first, *others = self.layers
        expected = self._likeness(first)
        for path in others:
            for field, value in self._likeness(path).items():
                if value != expected[field]:
                    raise UserError(
                        f"joint={self.name!r}: {path} has {field}={_shown(value)}, allowed "
                        f"{_shown(expected[field])}, which {first} has: layers that share cores "
                        "are alike"
                    )

    def _likeness(self, path: str) -> dict:
        """What layers have in common that share cores."""
        geometry, spec = self.layers[path].geometry, self.specs[path]
        return {
            "kernel_shape": geometry.kernel_shape,
            "groups": geometry.groups,
            "param_dtype": jnp.dtype(geometry.param_dtype),
            "neuron": spec.neuron,
            "norm": spec.norm,
            "kernel": spec.kernel,
            "start": spec.start,
        }

    def tie(self, rngs: nnx.Rngs) -> None:
        """Replaces the kernels by shared cores, made by the start that the layers' specs say.

        Layers whose kernels their new specs left as they are stay as they are; and so do cores that
        the others share among themselves, if they start with 'kept' and the same network.
        """
        held = dict(zip(self.layers, self._held, strict=True))
        made = {path: own for path, own in held.items() if not _same(_held(self.layers[path]), own)}
        if not made:
            return
        before, order = _shared(made)
        self.layers = {path: self.layers[path] for path in order}
        self.check()
        every = list(self.layers.values())
        geometry, keeps = every[0].geometry, every[0].spec.start == "kept"
        dense, form = self._dense(), self.form()
        network = form.network(geometry.kernel_shape, len(every))
        for name, stacked in dense.items():
            if not keeps:
                cores = kernels.fresh_joint(network, stacked, rngs)
            elif name in before and before[name].network == network:
                cores = before[name].cores
            else:
                cores = factorization.decompose(form.form, network, stacked)
            shared = kernels.Kernel(network, form.run, cores)
            for index, layer in enumerate(every):
                getattr(layer, name).kernel = kernels.Joint(shared, index)
        for layer in every:
            layer.spec = dataclasses.replace(layer.spec, kernel=form)
            layer.remake_ranges(rngs)

    def form(self) -> factorization.Factorization:
        """What the layers' kernels together are, ranks known.

        Raises:
          UserError: if cores have no fewer parameters than the kernels.
        """
        (path, layer), *_ = self.layers.items()
        spec, number = self.specs[path], len(self.layers)
        dense = self._dense() if spec.start == "kept" else {}
        form = kernels.resolved(layer.geometry, spec, dense, number)
        if form == factorization.DENSE:
            raise UserError(
                f"kernel='{spec.kernel}' with joint={self.name!r}: the cores would have as many "
                f"parameters as the {number} kernels; give a lower rank, or 'always'"
            )
        return form

    def _dense(self) -> dict[str, Array]:
        """The kernels that there are, `(layers, *kernel_size, in, features)`, by branch."""
        every = list(self.layers.values())
        return {
            name: jnp.stack([getattr(layer, name).dense() for layer in every])
            for name in every[0].spec.branches
        }


def check_whole(layers: Iterable[tuple[str, Layer]]) -> None:
    """Raises a UserError where some of the layers that share cores are not among these."""
    users: dict[int, tuple[kernels.Kernel, list[str]]] = {}
    for path, layer in layers:
        for branch in layer.branches:
            if isinstance(branch.kernel, kernels.Joint):
                shared = branch.kernel.shared
                users.setdefault(id(shared), (shared, []))[1].append(path)
    for shared, found in users.values():
        number = shared.network.kernel_shape[0]
        if len(found) != number:
            raise UserError(
                f"{', '.join(found)}: {number} layers share these cores, so that they are "
                "converted, joined and removed together or not at all"
            )


def _held(layer: Layer) -> Held:
    return {name: getattr(layer, name).kernel for name in layer.spec.branches}


def _same(one: Held, other: Held) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def _shared(held: Mapping[str, Held]) -> tuple[dict[str, kernels.Kernel], list[str]]:
    """What layers that hold these share by branch, and their paths in the order of its slices.

    Nothing, and the paths as they are, if these are not all that share it.
    """
    nothing = {}, list(held)
    orders, found = [], {}
    for name in next(iter(held.values())):
        own = {path: of.get(name) for path, of in held.items()}
        if not all(isinstance(kernel, kernels.Joint) for kernel in own.values()):
            return nothing
        (first, *_) = own.values()
        order = sorted(own, key=lambda path: own[path].index)
        if any(kernel.shared is not first.shared for kernel in own.values()):
            return nothing
        if [own[path].index for path in order] != list(range(first.shared.network.kernel_shape[0])):
            return nothing
        found[name] = first.shared
        orders.append(order)
    return (found, orders[0]) if orders.count(orders[0]) == len(orders) else nothing


def _shown(value) -> str:
    return str(value) if isinstance(value, tuple) else repr(str(value))
