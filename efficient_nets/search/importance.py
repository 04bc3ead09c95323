"""Which layer a net misses least for what it costs: QuadraLib's RI, from masked weights.

    RI = P_M P_W / max(delta_A, 1 / N)        (arXiv 2204.01701, auto-builder)

P_M and P_W are the layer's shares of the net's parameters and multiply-accumulates. delta_A is the
drop in accuracy on the N held-out images when a random share of the layer's weights is set to zero
and the others stay as they are: the mean over several masks. A high RI marks a layer to remove.

A mask can raise the accuracy, and a drop of 0 would divide by zero. Below one image of the split
drops are noise, so that is the floor: such layers rank by their cost alone, above all others of
the same cost.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from efficient_nets import paths, reporting, sharding
from efficient_nets.analysis import LayerCost
from efficient_nets.evaluation import Evaluator
from efficient_nets.experiment import TrainState


def importance(params_share: float, macs_share: float, drop: float, samples: int) -> float:
    """RI of a layer, see above; `samples` is N."""
    return params_share * macs_share / max(drop, 1 / samples)


def score(
    evaluator: Evaluator,
    state: TrainState,
    cost: dict[str, Any],
    candidates: Sequence[str],
    *,
    samples: int,
    fraction: float,
    masks: int,
    seed: int,
) -> list[dict[str, Any]]:
    """RI of every candidate.

    Masked weights are data of the one compiled evaluation: nothing is compiled anew for a layer or
    a mask. The state is left as it is.

    Args:
      evaluator: Of the held-out split.
      state: The trained net.
      cost: Of the net, see `analysis.model_cost`.
      candidates: Paths of layers.
      samples: Images of the split.
      fraction: Probability that a mask sets a weight to zero. With 1 all masks are alike, so one
        is drawn.
      masks: Number of masks a layer.
      seed: Of the masks; those of a layer do not depend on the other candidates.

    Returns:
      For each candidate `layer`, `params_share`, `macs_share`, `drops` (one a mask), `drop` (their
      mean) and `ri`.
    """
    state = state._replace(**state.net, ema={})  # the averaged net, where there is one
    layers: dict[str, LayerCost] = {layer.name: layer for layer in cost["layers"]}
    whole = _accuracy(evaluator, state)
    masks = 1 if fraction == 1 else masks
    found = []
    with reporting.progress(len(candidates) * masks, desc="scoring layers", unit="mask") as bar:
        for layer in candidates:
            drops = []
            for number in range(masks):
                params = masked(state.params, layer, fraction, (seed, number))
                drops.append(whole - _accuracy(evaluator, state._replace(params=params)))
                bar.update()
            drop = sum(drops) / len(drops)
            shares = (layers[layer].params / cost["params"], layers[layer].macs / cost["macs"])
            found.append(
                dict(
                    layer=layer,
                    params_share=shares[0],
                    macs_share=shares[1],
                    drops=drops,
                    drop=drop,
                    ri=importance(*shares, drop, samples),
                )
            )
    return found


def masked(weights: Any, layer: str, fraction: float, seed: tuple[int, ...]) -> Any:
    """A copy of the weights in which a random share of the kernels of one layer is zero.

    Of a factorized kernel a share of each core, which loses more of the kernel.

    Drawn on the host, where it takes no compiling; every process draws the same.

    Args:
      weights: Parameters, nested dicts named by module path.
      layer: Path of a Dense or Conv; all branches of its neuron are masked.
      fraction: Probability of each weight to become zero.
      seed: With the names it determines the mask.
    """

    def mask(leaf: str, x: jax.Array) -> jax.Array:
        if not re.match(rf"{re.escape(layer)}/(.*/)?kernel(/|$)", leaf):
            return x
        rng = np.random.default_rng([*seed, zlib.crc32(leaf.encode())])
        kernel = np.where(rng.random(x.shape) < fraction, 0, sharding.fetch(x)).astype(x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: kernel[index])

    return paths.map_named(mask, weights)


def _accuracy(evaluator: Evaluator, state: TrainState) -> float:
    return evaluator(state)[f"{evaluator.split}/accuracy"]
