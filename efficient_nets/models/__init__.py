"""Architectures in plain layers; `layers.convert` makes their quadratic and other forms.

    model = models.create("resnet", image_shape=(32, 32, 3), num_classes=10, rngs=rngs, depth=32)
    logits = model(images)

Every classifier maps float images `(N, H, W, C)` to logits `(N, num_classes)`; for other nets see
`TASKS`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from flax import nnx

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.models import resnet
from efficient_nets.models.cells import Cells
from efficient_nets.models.lenet import LeNet
from efficient_nets.models.mobilenet import MobileNet
from efficient_nets.models.mobilenet_v2 import MobileNetV2
from efficient_nets.models.nin import NiN
from efficient_nets.models.pinet import PiNet, PiResNet
from efficient_nets.models.quadranet import QuadraNet
from efficient_nets.models.resnet import ResNet
from efficient_nets.models.resnext import ResNeXt
from efficient_nets.models.rnn import RNN
from efficient_nets.models.sngan import SNGAN
from efficient_nets.models.squeezenet import SqueezeNet
from efficient_nets.models.ssd import SSD
from efficient_nets.models.tnn import TNN, ConvTNN
from efficient_nets.models.vgg import VGG

MODELS = {
    "lenet": LeNet,
    "vgg": VGG,
    "resnet": ResNet,
    "resnext": ResNeXt,
    "mobilenet": MobileNet,
    "mobilenet_v2": MobileNetV2,
    "nin": NiN,
    "squeezenet": SqueezeNet,
    "pinet": PiNet,
    "pinet_resnet": PiResNet,
    "quadranet": QuadraNet,
    "tnn": TNN,
    "conv_tnn": ConvTNN,
    "rnn": RNN,
    "cells": Cells,
    "sngan": SNGAN,
    "ssd": SSD,
}

# What architectures are for, as `config.task` calls it; those that are not here classify.
TASKS = {"sngan": "generation", "ssd": "detection"}

# Options of published variants, by architecture and their own name.
PRESETS = {"resnet": resnet.PRESETS}


def task(name: str) -> str:
    """What an architecture is for."""
    return TASKS.get(name, "classification")


def preset(name: str, preset: str) -> dict[str, Any]:
    """The options of a preset of an architecture, none for the empty name.

    Raises:
      UserError: if there is no such architecture or preset.
    """
    names.pick("model.name", name, MODELS)
    table = PRESETS.get(name, {})
    if preset and not table:
        raise UserError(f"preset={preset!r}: {name!r} has none; allowed ''")
    return dict(names.pick("preset", preset, table)) if preset else {}


def options(name: str) -> dict[str, Any]:
    """The options of an architecture with their defaults: int, float, bool, str or tuple.

    Raises:
      UserError: if there is no such architecture.
    """
    signature = inspect.signature(names.pick("model.name", name, MODELS).__init__)
    return {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}


def create(
    name: str, *, image_shape: Sequence[int], num_classes: int, rngs: nnx.Rngs, **given
) -> nnx.Module:
    """A model with fresh parameters.

    Args:
      name: A key of `MODELS`.
      image_shape: `(H, W, C)`; models that end in a global mean take other sizes later on.
      num_classes: Number of logits.
      rngs: Source of the initial values.
      **given: The architecture's options, see `options(name)`.

    Raises:
      UserError: on an unknown architecture or option, or a value that it cannot have.
    """
    names.check_fields("model", given, options(name))
    image_shape = tuple(image_shape)
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UserError(f"image_shape={image_shape}: give (height, width, channels)")
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: must be at least 1")
    return MODELS[name](image_shape=image_shape, num_classes=num_classes, rngs=rngs, **given)
