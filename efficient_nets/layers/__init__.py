"""Flax NNX layers: one Dense and one Conv with four axes, and the rules that set them.

from efficient_nets.layers import Conv, LayerSpec

conv = Conv(16, 32, (3, 3), spec=LayerSpec(neuron="ours", norm="branch"), rngs=nnx.Rngs(0))
"""

from efficient_nets.layers.calibrate import calibrate
from efficient_nets.layers.collect import collecting
from efficient_nets.layers.embedding import Embedding
from efficient_nets.layers.joint import join
from efficient_nets.layers.linear import Conv, Dense, Layer, kaiming_normal, layer_norm_act
from efficient_nets.layers.norm import (
    BatchNorm,
    FrozenBatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
)
from efficient_nets.layers.observe import watched
from efficient_nets.layers.precision import Codes, Range, advance, hold
from efficient_nets.layers.prune import prune
from efficient_nets.layers.recalibrate import batch_moments, recalibrate_norms
from efficient_nets.layers.recurrent import CELLS, GRU, LSTM, Recurrent
from efficient_nets.layers.rules import convert, layers, ranges, set_compute_dtype, t_layers
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.layers.switch import mixed, stacked, switched, taken
from efficient_nets.layers.tproduct import TDense
from efficient_nets.layers.winograd import transform_kernels

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "BatchNorm",
    "Codes",
    "Conv",
    "Dense",
    "Embedding",
    "FrozenBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "LayerSpec",
    "Range",
    "Recurrent",
    "TDense",
    "advance",
    "batch_moments",
    "calibrate",
    "collecting",
    "convert",
    "hold",
    "join",
    "kaiming_normal",
    "layer_norm_act",
    "layers",
    "mixed",
    "prune",
    "ranges",
    "recalibrate_norms",
    "set_compute_dtype",
    "stacked",
    "switched",
    "t_layers",
    "taken",
    "transform_kernels",
    "watched",
]
