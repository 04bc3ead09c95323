"""Running statistics of batch norms made anew, as a net that was changed after training needs."""

from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.layers.norm import BatchNorm, FrozenBatchNorm
from efficient_nets.ops.batch_norm import Moments


def batch_moments(model: nnx.Module, *inputs) -> dict[str, Moments]:
    """What each batch norm sees of one batch, those of branches too: moments by the norm's path.

    Norms normalise by the batch, as in training; all else is as in evaluation, so that quantizers
    do not move. The model stays as it is; a pure function of its arrays and the inputs. Of a norm
    that is called twice the last call counts.

    Args:
      model: The net.
      *inputs: What it is called with.

    Raises:
      UserError: without a batch norm that could take anything.
    """
    model = nnx.clone(model)
    norms = dict(by_batch(model))
    if not norms:
        raise UserError("the net has no batch norm whose statistics could be made anew")
    for norm in norms.values():
        norm.momentum = 0.0
        for array in (norm.mean, norm.var):  # 0 times what is not finite would stay
            array[...] = jnp.zeros_like(array[...])
    model(*inputs)
    return {path: Moments(norm.mean[...], norm.var[...]) for path, norm in norms.items()}


def by_batch(model: nnx.Module) -> list[tuple[str, BatchNorm]]:
    """Sets the mode of evaluation, but that batch norms take the moments of the batch.

    Returns:
      These norms by path. Their running averages move; a `FrozenBatchNorm` is none of them.
    """
    model.eval()
    norms = list(_moving(model))
    for _, norm in norms:
        norm.use_running_average = False
    return norms


def merged(found: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """The moments of all batches together, which are of one size: `joined`, one after another."""
    first, *others = found
    for number, batch in enumerate(others, 2):
        first = joined(first, batch, number)
    return dict(first)


def joined(
    before: Mapping[str, Moments], batch: Mapping[str, Moments], number: Array | int
) -> dict[str, Moments]:
    """The moments of k batches, of those of the first k - 1 and the last.

        mean_k = mean + (m - mean) / k
        var_k = var + (v + (m - mean) (m - mean_k) - var) / k

    for a batch's mean m and variance v (Welford, 1962), which does not cancel as the difference of
    mean squares and squared means does.

    Args:
      before: Of the first ones; for the first batch anything finite.
      batch: Of the last one, as large as each of the others.
      number: k.
    """

    def one(old: Moments, new: Moments) -> Moments:
        share = jnp.asarray(1 / number, old.mean.dtype)
        delta = new.mean - old.mean
        mean = old.mean + share * delta
        return Moments(mean, old.var + share * (new.var + delta * (new.mean - mean) - old.var))

    return jax.tree.map(one, dict(before), dict(batch), is_leaf=lambda x: isinstance(x, Moments))


def recalibrate_norms(model: nnx.Module, batches: Iterable) -> nnx.Module:
    """A copy whose batch norms have the exact moments over these batches as running statistics.

    Running averages are of the net as it was while it learned: they lag behind, and are of other
    values once the net has been rounded or changed otherwise. A `FrozenBatchNorm` stays.

    Args:
      model: The net; it is left as it is.
      batches: Inputs of the model, all of one size.

    Raises:
      UserError: without a batch, or without a batch norm that could take anything.
    """
    graph, state = nnx.split(model)
    moments = jax.jit(lambda state, batch: batch_moments(nnx.merge(graph, state), batch))
    found = [moments(state, batch) for batch in batches]
    if not found:
        raise UserError("batches is empty: statistics take at least one")
    return with_moments(model, merged(found))


def with_moments(model: nnx.Module, found: Mapping[str, Moments]) -> nnx.Module:
    """A copy whose batch norms have these moments, by path, as running statistics."""
    model = nnx.clone(model)
    for path, norm in _moving(model):
        norm.mean[...], norm.var[...] = (
            new.astype(old[...].dtype)
            for old, new in zip((norm.mean, norm.var), found[path], strict=True)
        )
    return model


def _moving(model: nnx.Module) -> Iterator[tuple[str, BatchNorm]]:
    for path, node in nnx.iter_graph(model):
        if isinstance(node, BatchNorm) and not isinstance(node, FrozenBatchNorm):
            yield "/".join(map(str, path)), node
