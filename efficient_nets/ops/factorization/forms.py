"""The forms of factorized kernels: which cores there are, and which indices each has.

A form joins leaves, each one or several modes of the kernel, by bonds. A layout says which modes
share a leaf. With leaves g_1 ... g_m:

| form | cores | parameters |
|---|---|---|
| cp | g_j r | r sum g |
| tucker | g_j r_j, core r_1 ... r_m | sum g r + prod r |
| tt | g_1 r_1, r_1 g_2 r_2, ..., r_(m-1) g_m | sum r g r |
| tr | r_m g_1 r_1, r_1 g_2 r_2, ... | sum r g r |
| ht | g_j r_j, r_parent r_left r_right of each node of a binary tree | sum g r + sum r r r |
| bt | n g_j r_j, core n r_1 ... r_m: n blocks of Tucker | n (sum g r + prod r) |

Sources: CP of convolutions, Lebedev et al., arXiv 1412.6553; Tucker-2, Kim et al., arXiv
1511.06530; TT, Novikov et al., arXiv 1509.06569, of convolutions Garipov et al., arXiv 1611.03214;
TR, Wang et al., arXiv 1802.09052; block terms, Ye et al., arXiv 1712.05134; HT, Hackbusch and Kuehn
2009, of layers Yin et al. 2021.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops.factorization.network import LAYERS, Network

Leaf = tuple[str, ...]  # modes
Wiring = list[tuple[str, tuple[str, ...]]]  # cores

LAYOUTS = {
    "split": "each mode of inputs and of features is a leaf, the window one between them",
    "axes": "the same, each axis of the window a leaf",
    "paired": "the window is a leaf, and behind it each mode of inputs with one of features",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A member of the table.

    Attributes:
      wire: The leaves to cores, in an order in which `decompose` can split one off after another:
        what is left in the end is the last.
      layout: A key of `LAYOUTS`: where nothing is said.
      order: Modes of inputs, and of features, where nothing is said.
      window_in_core: The window is no leaf but modes of the core, as in Tucker-2.
      proportional: A share of parameters makes bonds that are shares of their leaves, not equal
        ones.
    """

    wire: Callable[[Sequence[Leaf]], Wiring]
    layout: str
    order: int
    window_in_core: bool = False
    proportional: bool = False


def _cp(leaves: Sequence[Leaf]) -> Wiring:
    return [(f"factor_{'_'.join(leaf)}", (*leaf, "r")) for leaf in leaves]


def _tucker(leaves: Sequence[Leaf]) -> Wiring:
    bonds = [f"r_{leaf[0]}" for leaf in leaves]
    pairs = zip(leaves, bonds, strict=True)
    factors = [(f"factor_{'_'.join(leaf)}", (*leaf, bond)) for leaf, bond in pairs]
    return [*factors, ("core", tuple(bonds))]


def _block_term(leaves: Sequence[Leaf]) -> Wiring:
    return [(name, ("n", *indices)) for name, indices in _tucker(leaves)]


def _train(leaves: Sequence[Leaf]) -> Wiring:
    last = len(leaves) - 1
    return [
        (
            f"core{i}",
            (*((f"r{i}",) if i else ()), *leaf, *((f"r{i + 1}",) if i < last else ())),
        )
        for i, leaf in enumerate(leaves)
    ]


def _ring(leaves: Sequence[Leaf]) -> Wiring:
    return [
        (f"core{i}", (f"r{i}", *leaf, f"r{(i + 1) % len(leaves)}")) for i, leaf in enumerate(leaves)
    ]


def _hierarchical(leaves: Sequence[Leaf]) -> Wiring:
    """A balanced binary tree. A node is named by the leaves that it spans, as is the bond above."""
    wiring = []

    def node(first: int, last: int) -> tuple[str, ...]:
        """The bonds that its parent has of it."""
        bond = f"r{first}_{last}"
        root = (first, last) == (0, len(leaves))
        above = () if root else (bond,)
        if last - first == 1:
            wiring.append((f"leaf{first}", (*leaves[first], *above)))
        else:
            middle = (first + last + 1) // 2
            children = node(first, middle) + node(middle, last)
            wiring.append(("root" if root else f"node{first}_{last}", (*above, *children)))
        return above

    node(0, len(leaves))
    return wiring


FORMS = {
    "cp": Form(_cp, "axes", 1),
    "tucker": Form(_tucker, "split", 1, window_in_core=True, proportional=True),
    "tt": Form(_train, "paired", 3),
    "tr": Form(_ring, "split", 2),
    "ht": Form(_hierarchical, "paired", 3),
    "bt": Form(_block_term, "paired", 2, proportional=True),
}


def network(
    form: str,
    layout: str,
    kernel_shape: Sequence[int],
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    blocks: int = 1,
    layers: int = 0,
) -> Network:
    """The network of a kernel, with bonds of 1 but for the blocks.

    Args:
      form: A key of `FORMS`.
      layout: A key of `LAYOUTS`.
      kernel_shape: `(*kernel_size, in, features)`.
      in_modes, out_modes: Sizes whose products are no less than in and features.
      blocks: Of 'bt'.
      layers: How many kernels of this shape are factorized as one, `(layers, *kernel_shape)`, their
        number being the first leaf in every layout; 0 is one kernel by itself.
    """
    names.pick("form", form, FORMS)
    window = tuple(kernel_shape[:-2])
    inputs = tuple(f"i{j}" for j in range(len(in_modes)))
    outputs = tuple(f"o{j}" for j in range(len(out_modes)))
    in_core = FORMS[form].window_in_core and layout != "axes"
    if not window:
        spatial, leaves_of_window = {}, []
    elif layout == "axes" or in_core:
        spatial = {f"k{j}": size for j, size in enumerate(window)}
        leaves_of_window = [] if in_core else [(name,) for name in spatial]
    else:
        spatial = {"k": math.prod(window)}
        leaves_of_window = [("k",)]
    if layout == "paired":
        leaves = [*leaves_of_window, *zip(inputs, outputs, strict=True)]
    else:
        leaves = [*((i,) for i in inputs), *leaves_of_window, *((o,) for o in outputs)]
    if layers:
        leaves = [(LAYERS,), *leaves]
    if len(leaves) < 2:
        raise UserError(
            "kernel.order=1 with layout='paired': one core is the kernel itself; give 2"
        )
    wiring = FORMS[form].wire(leaves)
    if in_core and spatial:
        wiring = [(n, (*spatial, *indices) if n == "core" else indices) for n, indices in wiring]
    if layers:
        spatial = {LAYERS: layers} | spatial
        kernel_shape = (layers, *kernel_shape)
    sizes = spatial | dict(zip(inputs, in_modes, strict=True))
    sizes |= dict(zip(outputs, out_modes, strict=True))
    every = dict.fromkeys(index for _, indices in wiring for index in indices)
    sizes |= {index: blocks if index == "n" else 1 for index in every if index not in sizes}
    return Network(
        tuple(wiring), tuple(sizes.items()), tuple(spatial), inputs, outputs, tuple(kernel_shape)
    )
