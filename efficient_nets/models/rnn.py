"""Recurrent nets that read an image as a sequence, and tell its class from the last state."""

import math

from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import recurrent
from efficient_nets.models import parts

# What a step reads, of an image (H, W, C): so many of the axes in front are the sequence.
SEQUENCES = {
    "rows": 1,  # T = H steps of W C values
    "pixels": 2,  # T = H W steps of C values, row by row
}


class RNN(nnx.Module):
    """LSTMs or GRUs, each reading the outputs of the one before, and a head on the last output.

    `cells/0/input` and `cells/0/hidden` are its layers' paths. With one LSTM of 128 features it has
    81,674 parameters on 28x28 images by rows and 10 classes.

    Args:
      image_shape: `(H, W, C)`; by rows the net takes images of this width only.
      num_classes: Number of logits.
      cell: A key of `layers.recurrent.CELLS`.
      sequence: A key of `SEQUENCES`.
      hidden: Features of the state.
      depth: Cells one behind the other.
      forget_bias: Of LSTMs, see `layers.LSTM`.
      width: Multiplies `hidden`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        cell: str = "lstm",
        sequence: str = "rows",
        hidden: int = 128,
        depth: int = 1,
        forget_bias: float = 1.0,
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        make = names.pick("model.cell", cell, recurrent.CELLS)
        self.axes = names.pick("model.sequence", sequence, SEQUENCES)
        for field, value in (("hidden", hidden), ("depth", depth)):
            if value < 1:
                raise UserError(f"model.{field}={value}: must be at least 1")
        options = {"forget_bias": forget_bias} if cell == "lstm" else {}
        if not options and forget_bias != 1.0:
            raise UserError(f"model.forget_bias={forget_bias}: cell={cell!r} has no forget gate")
        features = parts.scaled(hidden, width)
        sizes = [math.prod(image_shape[self.axes :])] + [features] * (depth - 1)
        self.cells = nnx.List([make(size, features, **options, rngs=rngs) for size in sizes])
        self.head = parts.head(features, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        batch, shape = images.shape[0], images.shape[1:]
        x = images.reshape(batch, math.prod(shape[: self.axes]), math.prod(shape[self.axes :]))
        for cell in self.cells:
            x, _ = cell(x)
        return self.head(x[:, -1])
