"""What the epoch decides of a quantizer: `float_epochs`, `stages`, `freeze_epoch`, `stop_epoch`.

A scheduled quantizer has the present phase among its observed arrays. `advance` puts it there at a
step's beginning; what rounds and observes reads it, and does not know the epoch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.ops.quantizers.spec import LOG_STEP, Arrays, Quantizer, code_range

SEEN = "seen_"  # in front of the name of a learned array: what it will start from


def phase(quantizer: Quantizer, epoch: Array | float) -> dict[str, Array]:
    """What the schedule says of an epoch: stage, active, frozen, and stopped where it can be."""
    epoch = jnp.asarray(epoch, jnp.float32)
    begins = jnp.asarray([begin for begin, _ in quantizer.stages[1:]], jnp.float32)

    def after(begin):  # 0: never
        return jnp.logical_and(begin > 0, epoch >= begin)

    stopped = after(quantizer.stop_epoch)
    found = {
        "stage": jnp.sum(begins <= epoch),
        "active": jnp.logical_and(epoch >= quantizer.float_epochs, ~stopped),
        "frozen": jnp.logical_or(after(quantizer.freeze_epoch), stopped),
    }
    if quantizer.stop_epoch:
        found["stopped"] = stopped
    return {name: value.astype(jnp.int32) for name, value in found.items()}


def advance(quantizer: Quantizer, arrays: Arrays, epoch: Array | float) -> Arrays:
    """The arrays at a step's beginning, as the schedule has them then.

    Where rounding begins, learned arrays are what was seen in the float epochs, for the levels of
    that stage. Where the levels change from there on, a learned step is multiplied by the ratio of
    the highest codes, so that it covers the same range.
    """
    if not quantizer.scheduled:
        return arrays
    learned, observed = arrays
    now = phase(quantizer, epoch)
    if quantizer.float_epochs:
        begins = now["active"] > observed["active"]
        learned = {
            name: jnp.where(begins, observed[f"{SEEN}{name}"], value)
            for name, value in learned.items()
        }
    if quantizer.stages and {"step", LOG_STEP} & set(learned):
        highs = [code_range(levels, quantizer.signed)[1] for _, levels in quantizer.stages]
        highs = jnp.asarray(highs, jax.dtypes.result_type(*learned.values()))
        before, after = (jnp.maximum(of["stage"], quantizer.first_stage) for of in (observed, now))
        ratio = highs[before] / highs[after]
        if LOG_STEP in learned:
            learned = learned | {LOG_STEP: learned[LOG_STEP] + jnp.log2(ratio)}
        else:
            learned = learned | {"step": learned["step"] * ratio}
    return Arrays(learned, observed | now)


def held(quantizer: Quantizer, before: Arrays, after: Arrays) -> Arrays:
    """The arrays after a step of an optimizer; as before it where the schedule has frozen them.

    Their gradient is 0 then, but momentum and weight decay would move them on.
    """
    if not quantizer.scheduled:
        return after
    frozen = before.observed["frozen"] > 0
    kept = {name: jnp.where(frozen, x, after.learned[name]) for name, x in before.learned.items()}
    return after._replace(learned=kept)


def is_over(quantizer: Quantizer, arrays: Arrays) -> bool:
    """Whether the schedule, if there is one, has come to its last levels, or to its stop."""
    if not quantizer.scheduled:
        return True
    if quantizer.stop_epoch:
        return bool(arrays.observed["stopped"])
    last = int(arrays.observed["stage"]) == max(len(quantizer.stages) - 1, 0)
    return last and bool(arrays.observed["active"])


def settled(quantizer: Quantizer, arrays: Arrays) -> tuple[Quantizer, Arrays] | None:
    """The same without its schedule, as that is in the end; None where it has stopped then."""
    if quantizer.stop_epoch:
        return None
    plain = dataclasses.replace(quantizer, float_epochs=0.0, freeze_epoch=0.0, stages=())
    phases = phase(quantizer, 0.0)
    observed = {
        name: x
        for name, x in arrays.observed.items()
        if name not in phases and not name.startswith(SEEN)
    }
    return plain, arrays._replace(observed=observed)
