"""How accurate architectures of a shared net are: many on one batch, or one on whole splits."""

import contextlib
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from efficient_nets import data, layers, sharding
from efficient_nets.evaluation import evaluators
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.layers import recalibrate
from efficient_nets.ops.batch_norm import Moments


def accuracies(
    run: Experiment, state: TrainState, architectures: Array, batch: dict, resident: dict | None
) -> Array:
    """The accuracy of each on one batch: `(n,)`. Pure.

    Batch norms take the batch's moments, as running averages are of all architectures; all else is
    as in evaluation. Each device measures its share of the architectures, on the whole batch.

    Args:
      run: Of the shared net.
      state: Its weights.
      architectures: int32 `(n, 2, B, 2, 3)`.
      batch: Of a held-out split.
      resident: That split's images on the devices, or None.
    """
    batch = data.gather(resident, batch)
    images = data.normalise(batch["image"], run.dataset.info)

    def each(architectures, params, stats, images, labels):
        model = nnx.merge(run.graph, params, stats)
        recalibrate.by_batch(model)
        x = model.stemmed(images)  # a convolution, which a loop on a CPU is slow at
        graph, arrays = nnx.split(model)
        arrays = nnx.to_pure_dict(arrays)

        def one(tokens):
            model = nnx.merge(graph, arrays)
            model.architecture[...] = tokens
            logits = model.classified(x)
            # The greatest of what is no number is the first class.
            hits = (jnp.argmax(logits, axis=-1) == labels) & jnp.all(jnp.isfinite(logits), axis=-1)
            return jnp.mean(hits.astype(jnp.float32))

        return lax.map(one, architectures)

    return over_devices(
        run.mesh, each, architectures, state.params, state.stats, images, batch["label"]
    )


def over_devices(mesh: Mesh, each: Callable, architectures: Array, *rest) -> Array:
    """`each(architectures, *rest)`, every device having a share of the architectures.

    Args:
      mesh: The devices.
      each: Gives a number for each architecture, which does not depend on others.
      architectures: `(n, ...)`; filled up with some of them to what the devices divide.
      *rest: Trees that every device gets whole.
    """
    if mesh.size == 1:
        return each(architectures, *rest)
    number = len(architectures)
    filled = architectures[jnp.arange(sharding.round_up(number, mesh)) % number]
    shared = jax.shard_map(
        each,
        mesh=mesh,
        in_specs=(P(sharding.BATCH_AXES), *[P()] * len(rest)),
        out_specs=P(sharding.BATCH_AXES),
        check_vma=False,
    )
    return shared(filled, *rest)[:number]


class Judge:
    """Scores of one architecture after another on whole splits, batch norms made anew for each.

    Compiled once for all of them.

    Args:
      run: Of the shared net.
      norm_batches: How many training batches norms have the moments of.
      resident: `put_resident(run, "train")`.
    """

    def __init__(self, run: Experiment, norm_batches: int, resident: dict | None):
        self._run, self._number = run, norm_batches
        self._evaluators = {evaluator.split: evaluator for evaluator in evaluators(run)}
        self._resident = resident
        self._moments = jax.jit(self._joined)
        self._placed = jax.jit(self._with_moments)

    def __call__(
        self, state: TrainState, architecture: Array, splits: Sequence[str] = ("validation",)
    ) -> dict[str, float]:
        """`{'<split>/loss': x, '<split>/accuracy': y}`.

        Args:
          state: The shared net's; it stays as it is.
          architecture: int32 `(2, B, 2, 3)`.
          splits: Of them those that there are.
        """
        net, scores = self.net(state, architecture), {}
        for split in splits:
            if split in self._evaluators:
                scores |= self._evaluators[split](net)
        return scores

    def net(self, state: TrainState, architecture: Array) -> TrainState:
        """The state with that architecture, and norms for it: not to be trained on."""
        size, found = self._run.config.train.batch_size, self._nothing(state)
        rows, hidden = sharding.process_rows(size), jax.process_index() > 0
        source, seed = self._run.dataset.train, self._run.config.seed
        tokens = sharding.put_replicated(jax.device_get(architecture), self._run.mesh)
        with contextlib.closing(data.train_batches(source, size, seed=seed, rows=rows)) as batches:
            some = itertools.islice(batches, self._number)
            shown = tqdm(some, "norms", self._number, leave=False, delay=5, disable=hidden)
            for number, batch in enumerate(shown, 1):
                batch = sharding.put_batch(batch, self._run.mesh)
                count = sharding.put_replicated(jnp.float32(number), self._run.mesh)
                found = self._moments(state, tokens, batch, self._resident, found, count)
        return state._replace(stats=self._placed(state, tokens, found), ema={})

    def _model(self, state: TrainState, tokens: Array) -> nnx.Module:
        model = nnx.merge(self._run.graph, state.params, state.stats)
        model.architecture[...] = tokens
        return model

    def _joined(self, state: TrainState, tokens: Array, batch, resident, before, count: Array):
        images = data.gather(resident, batch)["image"]
        images = data.normalise(images, self._run.dataset.info)
        found = layers.batch_moments(self._model(state, tokens), images)
        return recalibrate.joined(before, found, count)

    def _nothing(self, state: TrainState):
        """Moments of no batch, in the form of `_joined`'s."""
        model = nnx.merge(self._run.graph, state.params, state.stats)
        found = {
            path: Moments(*(jnp.zeros_like(x[...]) for x in (norm.mean, norm.var)))
            for path, norm in recalibrate.by_batch(model)
        }
        return sharding.put_replicated(jax.device_get(found), self._run.mesh)

    def _with_moments(self, state: TrainState, tokens: Array, found):
        model = recalibrate.with_moments(self._model(state, tokens), found)
        return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
