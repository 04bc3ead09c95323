"""LeNet as in Tensor_Layer: two 5x5 convolutions (32, 64 channels), a hidden layer of 128."""

from flax import nnx
from jax import Array

from efficient_nets.layers import Dense, kaiming_normal, layer_norm_act
from efficient_nets.models import parts


class LeNet(nnx.Module):
    """Convolution, activation, 2x2 max pooling, twice; a hidden dense layer; the head. No norms.

    The kernels are LeNet-5's 5x5, padded by 2 so that images from 4 pixels on work. The hidden
    layer reads the flattened map, so a model takes images of the size it was made for only.

    Args:
      image_shape: `(H, W, C)`.
      num_classes: Number of logits.
      width: Multiplies all channel numbers.
      activation: What stands in for ReLU, a key of `parts.ACTIVATIONS`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        width: float = 1.0,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        parts.check_size(image_shape, halvings=2)
        self.activation = parts.activation(activation)
        height, image_width, channels = image_shape
        first, second, hidden = (parts.scaled(features, width) for features in (32, 64, 128))
        flat = (height // 4) * (image_width // 4) * second
        self.conv1 = parts.conv(channels, first, 5, use_bias=True, rngs=rngs)
        self.conv2 = parts.conv(first, second, 5, use_bias=True, rngs=rngs)
        self.hidden = Dense(flat, hidden, kernel_init=kaiming_normal, rngs=rngs)
        self.head = parts.head(hidden, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images `(N, H, W, C)` to logits `(N, num_classes)`."""
        x = images
        for conv in (self.conv1, self.conv2):
            x = parts.max_pool2(layer_norm_act(x, conv, activation=self.activation))
        x = x.reshape(x.shape[0], -1)
        return self.head(layer_norm_act(x, self.hidden, activation=self.activation))
