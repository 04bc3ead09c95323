"""Operands of a cell's nodes: a chosen one, one that can be any, and a mixture of all."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from efficient_nets.errors import UserError
from efficient_nets.layers import LayerSpec, mixed, stacked, switched, taken
from efficient_nets.models import operations, parts
from efficient_nets.models.space import INPUT, OP, PRECISION, Choices, Space
from efficient_nets.ops import factorization
from efficient_nets.ops.precision import Precision


class Style:
    """What all cells of a net have in common, checked.

    Attributes:
      space: The space.
      ops: Its operations, parsed.
      numbers: Position of each (op, precision) in the ways of a `Shared`.
      activation: A function.
      mix: Spec of the pointwise convolutions that are no operands.
      operand: The class of operands that are not chosen.
    """

    def __init__(self, space: Space, activation: str, mix_precision: str, mixes: bool = False):
        self.space, self.operand = space, Mixture if mixes else Shared
        self.ops = tuple(map(operations.parse, space.ops))
        self.activation = parts.activation(activation)
        numbers, count = [], 0
        for op in self.ops:
            step = int(op.has_layers)  # 0: one way serves all precisions
            numbers.append(tuple(count + step * p for p in range(len(space.precisions))))
            count = numbers[-1][-1] + 1
        self.numbers = tuple(numbers)
        for op in self.ops:
            for precision in space.precisions:
                try:
                    op.spec(precision)
                except UserError as error:
                    raise UserError(f"model.precisions: {precision!r}: {error}") from error
        given = mix_precision or operations.of_dense(space.precisions[0])
        self.mix = spec_of("mix_precision", given)

    def check_shared(self) -> None:
        """Raises a UserError on what a shared net cannot have."""
        for op in self.ops:
            kernel = op.spec("float").kernel
            if kernel != factorization.DENSE and kernel.lasso:
                raise UserError(
                    f"model.ops: kernel='{kernel}' in a shared net, of which the loss has no part "
                    "for ranks: leave out the lasso"
                )

    def ways(self, op: operations.Operation, features: int, rngs: nnx.Rngs) -> list[nnx.Module]:
        return op.ways(features, self.space.precisions, self.activation, rngs)


class Choice(nnx.Module):
    """An operand that is chosen: one operation on one of the cell's states.

    Attributes:
      at: Static, which state.
      op: The operation.
    """

    def __init__(self, at: int, op: nnx.Module):
        self.at, self.op = int(at), op

    def __call__(self, states: Sequence[Array], tokens) -> Array:
        return self.op(states[self.at])


class Shared(nnx.Module):
    """An operand that is any operation on any state, as its tokens `(3,)` say.

    Attributes:
      numbers: Static, of each (op, precision) the position in `ways`.
      ways: Modules; each variable has a leading axis, by the state that is read. Kernels, and norms
        with their running averages, are the same for all precisions.
    """

    def __init__(self, inputs: int, features: int, style: Style, rngs: nnx.Rngs):
        self.numbers = style.numbers
        self.ways = stacked(functools.partial(_ways, features, style), inputs, rngs.params())

    def __call__(self, states: Sequence[Array], tokens) -> Array:
        at, number = tokens[INPUT], self._number(tokens)
        x = lax.dynamic_index_in_dim(jnp.stack(states), at, 0, keepdims=False)
        return switched(self.ways, number, x, lambda way, x: way(x), at=at)

    def _number(self, tokens):
        return jnp.asarray(self.numbers, jnp.int32)[tokens[OP], tokens[PRECISION]]

    def chosen(self, tokens: np.ndarray) -> Choice:
        """The operand that these tokens make of it, weights as here."""
        at, op, precision = map(int, tokens)
        return Choice(at, taken(self.ways[self.numbers[op][precision]], at))


class Mixture(Shared):
    """An operand that is all operations on all states, each by its probability.

        sum_i inputs[i] sum_k ops[k] sum_p precisions[p] op_kp(states[i])

    It has what a `Shared` has. Norms and ranges move at every input, and a norm that precisions
    share moves with each of them.
    """

    def __call__(self, states: Sequence[Array], choices: Choices) -> Array:
        """The sum, of states `(N, H, W, C)`; a way that serves all precisions has theirs together.

        Of `choices` those of this operand: `(B + 2,)`, `(ops,)` and `(precisions,)`.
        """
        pairs = choices.ops[:, None] * choices.precisions[None]
        ways = jnp.zeros((len(self.ways),), pairs.dtype).at[np.array(self.numbers)].add(pairs)
        weights = choices.inputs[: len(states), None] * ways[None]
        return mixed(self.ways, weights, jnp.stack(states), lambda way, x: way(x))


def _ways(features: int, style: Style, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([way for op in style.ops for way in style.ways(op, features, rngs)])


def spec_of(field: str, precision: str | Precision) -> LayerSpec:
    """The spec of this precision, a model's field.

    Raises:
      UserError: on a text that is none, naming the field.
    """
    try:
        return LayerSpec(precision=precision)
    except UserError as error:
        raise UserError(f"model.{field}: {error}") from error
