"""Learning from a trained net's outputs beside the labels: `config.teacher`.

    loss = (1 - weight) * task loss + weight * T^2 * mean KL(softmax(t / T) || softmax(s / T))

with the logits t of the teacher and s of the net that is trained, for the same augmented images
(Hinton et al. 2015, arXiv 1503.02531). The teacher is in evaluation mode and gets no gradient. It
is the newest net of its workdir, so a run that is stopped and goes on needs that unchanged.
"""

import pathlib
from typing import Any

import flax
from absl import logging
from flax import nnx
from jax import Array, lax

from efficient_nets import config as configs
from efficient_nets import workdirs
from efficient_nets.experiment import Experiment


@flax.struct.dataclass
class Teacher:
    """A net whose arrays a step takes as an argument, so that they are no constants of it.

    Attributes:
      graph: Static.
      net: Its `params` and `stats`.
    """

    graph: nnx.GraphDef = flax.struct.field(pytree_node=False)
    net: dict[str, Any]

    def logits(self, images: Array) -> Array:
        """Images as the trained net gets them, `(N, H, W, C)`; `(N, classes)`."""
        model = nnx.merge(self.graph, self.net["params"], self.net["stats"])
        model.eval()
        return lax.stop_gradient(model(images))


def teacher(run: Experiment, pretrained: pathlib.Path) -> Teacher | None:
    """The net of `config.teacher.checkpoint`, of any architecture; None where there is none.

    Args:
      run: The experiment that learns from it; both must be for the same images and classes.
      pretrained: The workdir that 'pretrain' means.

    Raises:
      UserError: if the folder holds no run, or one for other classes or shapes of images.
    """
    given = run.config.teacher.checkpoint
    if not given:
        return None
    field, folder = "teacher.checkpoint", pathlib.Path(given)
    if given == configs.PRETRAINED:
        folder = pretrained
    config = workdirs.read_config(field, folder)
    here, there = run.config.data.name, config.data.name
    if here != there:
        logging.warning("%s=%s was trained on %r, this run is on %r.", field, folder, there, here)
    return Teacher(*workdirs.trained_net(field, folder, config, run))
