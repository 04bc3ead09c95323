"""What a net is trained for: its inputs, its loss, its metrics.

A task is a frozen, hashable dataclass of pure functions; what it does with files, devices and
splits is in `train.py`, `evaluation.py` and their neighbours, which pick by `Task.name`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from jax import Array
from ml_collections import ConfigDict

from efficient_nets import data
from efficient_nets.tasks.classification import Classification
from efficient_nets.tasks.detection import Detection
from efficient_nets.tasks.generation import Generation


class Task(Protocol):
    """What training and evaluation ask of each task.

    Attributes:
      name: Its key in `TASKS`.
      best_metric: Of an evaluated split, what picks the best checkpoint, as 'accuracy'.
      best_mode: 'max' or 'min' of it.
      fields: Sections and fields of a config that only some tasks heed, and this one does.
      modes: Values of --mode that only some tasks have, and this one does.
      updates: Where parts of the net have an optimizer each, how many updates a step, by the part's
        name; empty where the net has one.
    """

    name: ClassVar[str]
    best_metric: ClassVar[str]
    best_mode: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    modes: ClassVar[tuple[str, ...]]

    @property
    def updates(self) -> Mapping[str, int]: ...

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Task":
        """The task of a checked config."""

    def inputs(
        self, key: Array, batch: dict[str, Array], *, config_data: ConfigDict, info: data.Info
    ) -> tuple[Array, Any]:
        """Augmented images and targets of a training batch, inside the jitted step.

        Args:
          key: A random key, another for each batch.
          batch: Of `data.gather`.
          config_data: The section `config.data`.
          info: Of the data set.

        Returns:
          Images float32 `(N, H, W, C)`, and what `loss` takes as targets.
        """

    def loss(self, outputs: Any, targets: Any) -> tuple[Array, dict[str, Array]]:
        """Mean loss, and metrics, of the net's outputs for a training batch."""


TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "generation": Generation,
}


def create(config: ConfigDict) -> Task:
    """The task that `config.task` names, with its options."""
    return TASKS[config.task].from_config(config)


def heeding(kind: str, name: str) -> list[str]:
    """The tasks that something is for: those that list it, or all where none does.

    Args:
      kind: 'fields' or 'modes' of `Task`.
      name: Of a mode, or of a field, which is also listed where its section is.
    """
    names = {name, name.partition(".")[0]}
    return [key for key, task in TASKS.items() if names & set(getattr(task, kind))] or list(TASKS)
