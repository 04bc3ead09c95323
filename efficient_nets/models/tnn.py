"""Nets whose dense layers multiply tensors under a transform: fully connected, and behind convs.

An image is one lateral slice of a tensor, rows x 1 x tubes, in the layout of `ops.tproduct`.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers import Dense, TDense, layer_norm_act
from efficient_nets.layers.tproduct import kaiming_normal
from efficient_nets.models import parts
from efficient_nets.ops import tproduct

READOUTS = {
    "dense": "a dense layer of all tubes, as a t-layer is of which the slices are summed",
    "tubal_softmax": "a t-layer with a row a class; logits are `tproduct.log_probabilities`",
}


def _readout(
    name: str, rows: int, by: tproduct.Transform, num_classes: int, rngs: nnx.Rngs
) -> TDense | Dense:
    """The head by the option `model.readout`.

    Summed over all slices, a t-layer's output can be any linear map of x, as that of a dense layer
    with as many weights: slice s of its kernel multiplies slice s of x. In the mean of the slices'
    softmaxes, which the tubal one is reduced to, each slice has to tell the classes by itself.
    """
    names.pick("model.readout", name, READOUTS)
    if name == "dense":
        return parts.head(by.size * rows, num_classes, rngs=rngs)
    _check_real(by, "model.readout='dense'")
    return TDense(rows, num_classes, by, rngs=rngs)


def _logits(head: TDense | Dense, x: Array) -> Array:
    """x `(tubes, N, rows)` to `(N, num_classes)`."""
    if isinstance(head, TDense):
        return tproduct.log_probabilities(head(x), head.transform)
    return head(jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1))


def _hidden(rows: list[int], by: tproduct.Transform, rngs: nnx.Rngs) -> nnx.List:
    """t-layers from each number of rows to the next."""
    pairs = zip(rows[:-1], rows[1:], strict=True)
    return nnx.List([TDense(*pair, by, kernel_init=kaiming_normal, rngs=rngs) for pair in pairs])


def _transform(name: str, tubes: int) -> tproduct.Transform:
    names.pick("model.transform", name, tproduct.TRANSFORMS)
    return tproduct.transform(name, tubes)


def _check_real(by: tproduct.Transform, instead: str) -> None:
    try:
        tproduct.check_real(by)
    except UserError as error:
        raise UserError(f"model.{error}; or give {instead}") from error


def _check_counts(**counts: int) -> None:
    for field, value in counts.items():
        if value < 1:
            raise UserError(f"model.{field}={value}: must be at least 1")


class TNN(nnx.Module):
    """A fully connected tensor net: t-layers with activations, and the read-out.

    A tube is a line of W pixels, and there are H C of these. Each t-layer is H C x H C x W: four of
    them and the read-out have 98,794 parameters on 28x28 images and 10 classes, where dense layers
    of as many values have 2,469,610. Such nets are those of Newman, Horesh, Avron, Kilmer (arXiv
    1811.06569) and Tensor_Layer's.

    With slice_wise the activations act on slices: each is a net of its own, all of them are one
    batched product a layer, and the image alone is transformed.

    Under readout='tubal_softmax' the logits are log probabilities, so the loss's softmax leaves
    them as they are. It trains less well, and takes a transform with real slices.

    Args:
      image_shape: `(H, W, C)`; the net takes images of this size only.
      num_classes: Number of logits.
      depth: t-layers in front of the read-out.
      transform: A key of `ops.tproduct.TRANSFORMS`.
      readout: A key of `READOUTS`.
      slice_wise: Trains the frontal slices as nets that meet in the read-out; takes real ones.
      activation: A key of `parts.ACTIVATIONS`.
      width: Multiplies the rows of hidden layers, H C.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        depth: int = 4,
        transform: str = "dct",
        readout: str = "dense",
        slice_wise: bool = False,
        activation: str = "relu",
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        _check_counts(depth=depth)
        self.activation = parts.activation(activation)
        height, tubes, channels = image_shape
        rows = parts.scaled(height * channels, width)
        by, self.before = _transform(transform, tubes), None
        if slice_wise:
            _check_real(by, "model.slice_wise=False")
            by, self.before = _transform("identity", tubes), by
        self.hidden = _hidden([height * channels] + [rows] * depth, by, rngs)
        self.head = _readout(readout, rows, by, num_classes, rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        batch, height, tubes, channels = images.shape
        x = images.transpose(2, 0, 1, 3).reshape(tubes, batch, height * channels)
        if self.before is not None:
            x = tproduct.to_slices(x, self.before)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return _logits(self.head, x)


class ConvTNN(nnx.Module):
    """LeNet's convolutions, and t-layers in place of its dense ones.

    Each channel's map of H/4 x W/4 positions is a frontal slice's column: tubes run through the 64
    channels, rows are the positions. 174,986 parameters on 28x28 images of one channel and 10
    classes, where LeNet has 454,922. 64 is a power of 2, so every wavelet has all its levels.
    Tensor_Layer's has convolutions between two t-layers and no poolings: it is another net.

    Args:
      image_shape: `(H, W, C)`; the net takes images of this size only.
      num_classes: Number of logits.
      depth: t-layers in front of the read-out.
      hidden: Rows of each of them.
      transform, readout, activation: As in `TNN`.
      width: Multiplies all channel numbers, so the tubes too, and `hidden`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        depth: int = 1,
        hidden: int = 32,
        transform: str = "dct",
        readout: str = "dense",
        activation: str = "relu",
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        parts.check_size(image_shape, halvings=2)
        _check_counts(depth=depth, hidden=hidden)
        self.activation = parts.activation(activation)
        height, image_width, channels = image_shape
        first, tubes, rows = (parts.scaled(number, width) for number in (32, 64, hidden))
        by = _transform(transform, tubes)
        self.conv1 = parts.conv(channels, first, 5, use_bias=True, rngs=rngs)
        self.conv2 = parts.conv(first, tubes, 5, use_bias=True, rngs=rngs)
        positions = (height // 4) * (image_width // 4)
        self.hidden = _hidden([positions] + [rows] * depth, by, rngs)
        self.head = _readout(readout, rows, by, num_classes, rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = images
        for conv in (self.conv1, self.conv2):
            x = parts.max_pool2(layer_norm_act(x, conv, activation=self.activation))
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), -1, 0)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return _logits(self.head, x)
