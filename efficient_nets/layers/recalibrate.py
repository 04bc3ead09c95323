"""Running statistics of batch norms made anew, as a net that was changed after training needs."""

from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

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
    model.eval()
    norms = dict(_moving(model))
    if not norms:
        raise UserError("the net has no batch norm whose statistics could be made anew")
    for norm in norms.values():
        norm.use_running_average, norm.momentum = False, 0.0
        for array in (norm.mean, norm.var):  # 0 times what is not finite would stay
            array[...] = jnp.zeros_like(array[...])
    model(*inputs)
    return {path: Moments(norm.mean[...], norm.var[...]) for path, norm in norms.items()}


def merged(found: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """The moments of all batches together, which are of one size.

        mean = average of m,  var = average of (v + m^2) - mean^2 = average of v + (m - mean)^2

    for the batches' means m and variances v; the second form does not cancel.
    """

    def one(*batches: Moments) -> Moments:
        mean = sum(batch.mean for batch in batches) / len(batches)
        spread = sum(batch.var + jnp.square(batch.mean - mean) for batch in batches)
        return Moments(mean, spread / len(batches))

    return jax.tree.map(one, *found, is_leaf=lambda x: isinstance(x, Moments))


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
