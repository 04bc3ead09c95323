"""Image classification: a loss over soft labels, accuracy."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import flax
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from jax import Array
from ml_collections import ConfigDict

from efficient_nets import data


def squared_hinge(logits: Array, labels: Array) -> Array:
    """`mean_k max(0, 1 - t_k z_k)^2` of each sample, t = 1 for its label's class and -1 for others.

    The loss that binary nets were trained with (Courbariaux et al. 2015, arXiv 1511.00363, section
    3; 2016, arXiv 1602.02830). Of soft labels y it is the expectation over labels drawn from them,
    `mean_k y_k max(0, 1 - z_k)^2 + (1 - y_k) max(0, 1 + z_k)^2`.

    Args:
      logits: z, `(N, classes)`.
      labels: y, `(N, classes)`.

    Returns:
      `(N,)`.
    """
    own, other = (jnp.square(jnp.maximum(0, 1 + sign * logits)) for sign in (-1, 1))
    return jnp.mean(labels * own + (1 - labels) * other, axis=-1)


# Of each sample, `(N,)`, by logits and soft labels `(N, classes)`; linear in the labels.
LOSSES = {"cross_entropy": optax.softmax_cross_entropy, "squared_hinge": squared_hinge}


@flax.struct.dataclass
class Scores(metrics.Collection):
    """Sums over an evaluated split; padding rows weigh 0, so every sample counts once."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Average.from_output("correct")


@dataclasses.dataclass(frozen=True)
class Classification:
    """The task.

    Attributes:
      label_smoothing: Share of the label's weight that is spread over all classes in training.
      sample_loss: A value of `LOSSES`.
    """

    name: ClassVar[str] = "classification"
    best_metric: ClassVar[str] = "accuracy"
    best_mode: ClassVar[str] = "max"
    updates: ClassVar[Mapping[str, int]] = {}
    fields: ClassVar[tuple[str, ...]] = (
        *("builder", "deploy", "mixed", "search", "teacher", "winas"),
        *("train.loss", "train.label_smoothing", "data.cutout", "data.mixup"),
        "log.histograms_every_epochs",
    )
    modes: ClassVar[tuple[str, ...]] = (
        *("analyze", "decompose", "deploy", "latency", "prune", "rank", "search", "sensitivity"),
    )

    label_smoothing: float = 0.0
    sample_loss: Callable[[Array, Array], Array] = optax.softmax_cross_entropy

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Classification":
        return cls(config.train.label_smoothing, LOSSES[config.train.loss])

    def inputs(
        self, key: Array, batch: dict[str, Array], *, config_data: ConfigDict, info: data.Info
    ) -> tuple[Array, Array]:
        """Augmented images, and soft labels `(N, classes)`; see `Task.inputs`."""
        spec = data.Augmentation.from_config(config_data)
        return data.augment(key, batch["image"], batch["label"], spec=spec, info=info)

    def loss(self, logits: Array, labels: Array) -> tuple[Array, dict[str, Array]]:
        """Mean loss, and metrics, of one training batch.

        Args:
          logits: `(N, classes)`, any float type; the loss is taken in float32.
          labels: `(N, classes)`, rows that sum to 1 (one-hot, or mixed by mixup).
        """
        logits = logits.astype(jnp.float32)
        smooth = optax.smooth_labels(labels, self.label_smoothing)
        loss = jnp.mean(self.sample_loss(logits, smooth))
        hits = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        return loss, {"loss": loss, "accuracy": jnp.mean(hits.astype(jnp.float32))}

    def distillation_loss(self, logits: Array, teacher: Array, temperature: float) -> Array:
        """`T^2 * mean KL(softmax(teacher / T) || softmax(logits / T))`, a scalar in float32.

        The gradients of softened outputs shrink with 1 / T^2, which the factor undoes (Hinton et
        al. 2015, arXiv 1503.02531, section 2).

        Args:
          logits, teacher: `(N, classes)`.
          temperature: T, above 0.
        """
        of_net, of_teacher = (
            jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, teacher)
        )
        divergence = jnp.sum(jnp.exp(of_teacher) * (of_teacher - of_net), axis=-1)
        return temperature**2 * jnp.mean(divergence)

    def label_loss(self, logits: Array, labels: Array) -> Array:
        """`loss` for integer labels `(N,)`."""
        return self.loss(logits, jax.nn.one_hot(labels, logits.shape[-1]))[0]

    def scores(self, logits: Array, labels: Array, weights: Array) -> Scores:
        """Scores of one evaluation batch: integer labels `(N,)`, weights `(N,)` of 0 or 1.

        The loss is that of training, without smoothing.
        """
        logits = logits.astype(jnp.float32)
        return Scores.single_from_model_output(
            loss=self.sample_loss(logits, jax.nn.one_hot(labels, logits.shape[-1])),
            correct=(jnp.argmax(logits, -1) == labels).astype(jnp.float32),
            mask=weights > 0,
        )

    def empty_scores(self) -> Scores:
        return Scores.empty()


def summarise(scores: Scores) -> dict[str, float]:
    """Means in double precision: 346 of 360 is 0.9611111111111111."""
    means = {"loss": scores.loss, "accuracy": scores.accuracy}
    sums = jax.device_get({name: (mean.total, mean.count) for name, mean in means.items()})
    return {name: float(total) / float(count) for name, (total, count) in sums.items()}
