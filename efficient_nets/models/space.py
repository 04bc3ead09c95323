"""The micro space: a net of two cells, normal and reduction, that architectures fill in.

A cell has two inputs and B nodes. Each node adds two operands, and each operand is one of what
stands before it, under one of the ops, at one of the precisions (ENAS, arXiv 1802.03268, section
2.4; the precision is ours). An architecture is data: int32 tokens `(2, B, 2, 3)`, by cell, node,
operand and (input, op, precision), so that one compiled step serves all of them.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efficient_nets.errors import UserError

CELLS = ("normal", "reduction")
INPUT, OP, PRECISION = range(3)  # of the tokens of an operand
OPS = ("sep3", "sep5", "avg3", "max3", "identity")


class Choices(NamedTuple):
    """A number for each value of each token: logits, probabilities or one-hots.

    Attributes:
      inputs: `(2, B, 2, B + 2)`, by cell, node and operand. What is not there for a node, itself
        and all behind it, has the logit -inf and the probability 0.
      ops: `(2, B, 2, ops)`.
      precisions: `(2, B, 2, precisions)`; logits of a shared one `(precisions,)`.
    """

    inputs: Array
    ops: Array
    precisions: Array

    @property
    def unused(self) -> Array:
        """How probable each node is a loose end: `(2, B)`, exact, as tokens are independent.

        prod (1 - inputs[n]), over the operands of all nodes
        """
        return jnp.prod(1 - self.inputs[..., 2:], axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class Space:
    """What architectures are made of.

    Attributes:
      nodes: B, of a cell.
      ops: Their names; a token is a position in them.
      precisions: Their short forms; likewise.
      shared_precision: Whether all operands of an architecture have one precision.
    """

    nodes: int = 5
    ops: tuple[str, ...] = OPS
    precisions: tuple[str, ...] = ("float",)
    shared_precision: bool = False

    def __post_init__(self):
        if self.nodes < 1:
            raise UserError(f"space.nodes={self.nodes}: must be at least 1")
        for name in ("ops", "precisions"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"space.{name}={given}: give one or more, each once")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(2, B, 2, 3)`, of an architecture."""
        return (len(CELLS), self.nodes, 2, 3)

    @functools.cached_property
    def choices(self) -> np.ndarray:
        """How many values each token has: node i has i + 2 inputs. Of `shape`."""
        found = np.empty(self.shape, np.int32)
        found[..., INPUT] = 2 + np.arange(self.nodes)[:, None]
        found[..., OP] = len(self.ops)
        found[..., PRECISION] = len(self.precisions)
        return found

    @property
    def size(self) -> int:
        """How many architectures there are, those alike under another order included."""
        tokens = self.choices.astype(object)
        free = tokens[..., PRECISION].prod() if not self.shared_precision else len(self.precisions)
        return int(tokens[..., :PRECISION].prod() * free)

    def random(self, key: Array) -> Array:
        """An architecture, each as probable as any other: int32 of `shape`."""
        found = jax.random.randint(key, self.shape, 0, jnp.asarray(self.choices), jnp.int32)
        return self.canonical(found)

    @property
    def uniform(self) -> Choices:
        """The probabilities of `random`: float32."""
        tokens = self.choices
        sizes = (self.nodes + 2, len(self.ops), len(self.precisions))
        return Choices(
            *(
                jnp.asarray((np.arange(size) < number) / number, jnp.float32)
                for size, number in zip(sizes, np.moveaxis(tokens, -1, 0)[..., None], strict=True)
            )
        )

    def canonical(self, architecture: Array) -> Array:
        """The same, with the first operand's precision at all where precision is shared."""
        if not self.shared_precision:
            return architecture
        shared = architecture[..., :1, :1, :1, PRECISION]
        return architecture.at[..., PRECISION].set(shared)

    def unused(self, architecture: Array) -> Array:
        """Which nodes no node reads, the loose ends that a cell gives out: bool `(2, B)`."""
        inputs = architecture[..., INPUT].reshape(*architecture.shape[:-3], -1)
        return ~jax.nn.one_hot(inputs, 2 + self.nodes, dtype=bool)[..., 2:].any(-2)

    def check(self, architecture) -> np.ndarray:
        """The architecture as an array of `shape`.

        Raises:
          UserError: on another shape, or a token out of range, naming it and what is allowed.
        """
        tokens = np.asarray(architecture)
        if tokens.shape != self.shape:
            raise UserError(f"arc has the shape {tokens.shape}: it must be {self.shape}")
        wrong = np.argwhere((tokens < 0) | (tokens >= self.choices))
        if len(wrong):
            cell, node, operand, field = wrong[0]
            name = ("input", "op", "precision")[field]
            raise UserError(
                f"arc: {name} {tokens[tuple(wrong[0])]} of operand {operand + 1} of node {node} of "
                f"the {CELLS[cell]} cell: it must be 0 to {self.choices[tuple(wrong[0])] - 1}"
            )
        if self.shared_precision and len(set(tokens[..., PRECISION].flat)) > 1:
            raise UserError("arc has several precisions: of a space that shares one it has one")
        return tokens.astype(np.int32)

    def parse(self, text: str) -> np.ndarray:
        """The architecture of a string of whole numbers, spaces, commas and brackets between them.

        4 B numbers of the normal cell, 4 B of the reduction cell, a node being (input, op, input,
        op), as the source prints them; then, where the space has several precisions, the 4 B of
        all operands, cell by cell. Without them all have the first precision.

        Raises:
          UserError: on anything else, naming the length that B nodes need.
        """
        if strange := re.sub(r"[\d\s,\[\]()]", "", text):
            raise UserError(f"arc={text!r}: {strange[0]!r} is in it; give whole numbers")
        words = [word.lstrip("0") or "0" for word in re.findall(r"\d+", text)]
        if long := [word for word in words if len(word) > 9]:  # int32 would cut it off
            raise UserError(f"arc: {long[0][:20]} is in it, which no input, op or precision has")
        numbers = list(map(int, words))
        base, full = 8 * self.nodes, 12 * self.nodes
        if len(numbers) not in ((base, full) if len(self.precisions) > 1 else (base,)):
            also = f", or {full} with precisions" if len(self.precisions) > 1 else ""
            raise UserError(
                f"arc has {len(numbers)} numbers: {self.nodes} nodes in each of two cells need "
                f"{base}{also}"
            )
        tokens = np.zeros(self.shape, np.int32)
        tokens[..., :PRECISION] = np.reshape(numbers[:base], (*self.shape[:-1], 2))
        if len(numbers) == full:
            tokens[..., PRECISION] = np.reshape(numbers[base:], self.shape[:-1])
        return self.check(tokens)

    def lists(self, architecture) -> list[str]:
        """A bracketed list for each cell, and one of the precisions where there are several."""
        tokens = self.check(architecture)
        parts = [*tokens[..., :PRECISION].reshape(len(CELLS), -1)]
        if len(self.precisions) > 1:
            parts.append(tokens[..., PRECISION].reshape(-1))
        return [f"[{' '.join(map(str, part))}]" for part in parts]

    def text(self, architecture) -> str:
        """What `parse` reads: one line of numbers."""
        return " ".join(part[1:-1] for part in self.lists(architecture))
