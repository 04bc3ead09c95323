"""Generation of images by a generator and a discriminator (Goodfellow et al., arXiv 1406.2661)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from efficient_nets import data
from efficient_nets.errors import UserError

LEVEL = 2 / 255  # of pixels, in images from -1 to 1


def defaults() -> dict:
    """The fields of `config.generation` with their default values."""
    return dict(
        critic_updates=5,  # of the discriminator, a step; train.batch_size is of them together
        generator_batches=2,  # of the discriminator's, in images of a generator's update
        # What FID and IS look at: the workdir of a classifier of the same data set; "file:PATH",
        # for --mode=eval, holds features that another program made; "": neither is measured.
        features="",
        samples=10_000,  # images that are judged
        grid=8,  # rows and columns of the pictures of samples
    )


@dataclasses.dataclass(frozen=True)
class Generation:
    """The task; see `adversarial.train_step` for the step.

    Attributes:
      critic_updates, generator_batches: As in `config.generation`.
    """

    name: ClassVar[str] = "generation"
    best_metric: ClassVar[str] = "fid"
    best_mode: ClassVar[str] = "min"
    fields: ClassVar[tuple[str, ...]] = ("generation",)
    modes: ClassVar[tuple[str, ...]] = ()

    critic_updates: int = 5
    generator_batches: int = 2

    @property
    def updates(self) -> dict[str, int]:
        """Of each part of the net, which has an optimizer of its own, a step."""
        return {"generator": 1, "discriminator": self.critic_updates}

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Generation":
        """The task of a checked config.

        Raises:
          UserError: if the batch cannot be cut, images are not from -1 to 1, or on what the step
            does not do.
        """
        section, size = config.generation, config.train.batch_size
        if size % section.critic_updates:
            raise UserError(
                f"train.batch_size={size}: generation.critic_updates={section.critic_updates} "
                "must divide it, each update having its own images"
            )
        for field in ("mean", "std"):
            if not (given := config.data[field]) or set(given) != {0.5}:
                raise UserError(
                    f"data.{field}={given}: images of a generator are from -1 to 1; give 0.5 for "
                    "each channel, as in (0.5,)"
                )
        for field, value, off in (
            ("optimizer.accumulate", config.optimizer.accumulate, 1),
            ("log.products", config.log.products, False),
        ):
            if value != off:
                raise UserError(f"{field}={value}: task='generation' does not heed it; give {off}")
        return cls(section.critic_updates, section.generator_batches)

    def inputs(
        self, key: Array, batch: dict[str, Array], *, config_data: ConfigDict, info: data.Info
    ) -> tuple[Array, None]:
        """Images in [-1, 1], with noise of half a level to each side; see `Task.inputs`.

        Without it a discriminator could tell real ones by their whole levels.
        """
        augment_key, noise_key = jax.random.split(key)
        spec = data.Augmentation.from_config(config_data)
        images, _ = data.augment(augment_key, batch["image"], batch["label"], spec=spec, info=info)
        half = LEVEL / 2
        noise = jax.random.uniform(noise_key, images.shape, images.dtype, -half, half)
        return images + noise, None

    def loss(self, scores: Array, real: Array) -> tuple[Array, dict[str, Array]]:
        """The discriminator's hinge loss, and the mean scores, of one update.

            mean max(0, 1 - D(x)) + mean max(0, 1 + D(G(z)))

        (Lim and Ye, arXiv 1705.02894; equation 16 of SNGAN, arXiv 1802.05957).

        Args:
          scores: `(N,)`, any float type; the loss is taken in float32.
          real: `(N,)`, 1 for real images and 0 for made ones.
        """
        scores, real = scores.astype(jnp.float32), real.astype(jnp.float32)
        made = 1 - real
        real, made = real / jnp.sum(real), made / jnp.sum(made)
        loss = real @ jnp.maximum(0, 1 - scores) + made @ jnp.maximum(0, 1 + scores)
        means = {"real_score": real @ scores, "made_score": made @ scores}
        return loss, {"discriminator_loss": loss} | means

    def generator_loss(self, scores: Array) -> Array:
        """`-mean D(G(z))` (equation 17 of SNGAN), in float32."""
        return -jnp.mean(scores.astype(jnp.float32))


def to_pixels(images: Array) -> Array:
    """Images in [-1, 1] as uint8."""
    return jnp.clip(jnp.round((images + 1) / LEVEL), 0, 255).astype(jnp.uint8)
