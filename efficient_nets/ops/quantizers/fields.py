"""From a mapping of fields to a `Quantizer`: what each may be, and the errors where it is not."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops import straight_through as through
from efficient_nets.ops.quantizers.spec import (
    CORE,
    INNER,
    NORMALISATIONS,
    ROLES,
    SITES,
    STEP_GRADIENTS,
    Method,
    Quantizer,
)


def quantizer(
    methods: Mapping[str, Mapping[str, Method]], site: str, fields: Mapping[str, Any]
) -> Quantizer:
    """The spec of a mapping of fields: `method`, `bits` or `levels`, and any others of `Quantizer`.

    Raises:
      UserError: naming the site, the field, the value and what is allowed: nothing is ignored.
    """
    here = f"precision.{site}"
    names.pick("precision's site", site, dict.fromkeys((*SITES, *ROLES)))
    fields = dict(fields)
    if "method" not in fields:
        raise UserError(f"{here} has no 'method': allowed {', '.join(sorted(methods))}")
    name = fields.pop("method")
    sites = names.pick(f"{here}.method", name, methods)
    method = sites.get(ROLES.get(site, site))
    if method is None:
        raise UserError(f"{here}.method={name!r}: it is only for {', '.join(sites)}")
    if site in ROLES:
        method = _inside(here, name, method)
    if site == CORE:  # what is a channel there is for no method to say
        method = dataclasses.replace(method, per="layer")
    common = {field.name for field in dataclasses.fields(Quantizer)} - {"site", "method", "options"}
    allowed = _fields(site, method, bool(fields.get("post_scale")))
    for field in fields:
        if field in common and field not in allowed:
            raise UserError(f"{here}.{field}: {name!r} does not heed it at this site")
    names.check_fields(here, fields, ["bits", *allowed, *method.options])
    levels = _levels(here, name, method, fields)
    if "loss_norm" in fields and not fields.get("loss"):
        raise UserError(f"{here}.loss_norm={fields['loss_norm']!r}: it takes a loss above 0")
    options = {key: _option(here, method, fields, key) for key in method.options}
    if wrong := method.check(options):
        raise UserError(f"{here}.{wrong}")
    own = dict(signed=method.signed, per=method.per, gradient=method.gradients[0])
    stages = _stages(here, fields.pop("stages", ()))
    made = Quantizer(
        site, name, levels, **own | fields, stages=stages, options=tuple(sorted(options.items()))
    )
    _check(here, made, method)
    return made


def _inside(here: str, name: str, method: Method) -> Method:
    """The method of a core, or between the transforms of a map: values have either sign."""
    if method.output_scale is not None or not (method.signed or method.both_signs):
        why = "is for values from 0 on" if method.output_scale is None else "scales a map's output"
        raise UserError(
            f"{here}.method={name!r}: it {why}, which is not for sites inside of a map or a kernel"
        )
    return dataclasses.replace(method, signed=True)


def _fields(site: str, method: Method, post_scale: bool) -> list[str]:
    """Fields of `Quantizer` that have an effect for this method at this site."""
    if site == "gradient":
        return ["levels"]
    allowed = ["levels", "signed", "gradient", "post_scale", *method.takes]
    allowed += ["float_epochs", "stop_epoch"]
    allowed += ["loss", "loss_norm"] if site in ("input", "kernel", CORE) else []
    normalised = {"kernel": ["normalise"], CORE: ["normalise"], "input": ["normalise", "pad"]}
    allowed += normalised.get(site, [])
    if method.grouped or post_scale:
        has_axes = site != CORE and ROLES.get(site, site) == "kernel"
        allowed += ["per", "axis"] if has_axes else ["per"]
    return allowed if method.start is None else [*allowed, "freeze_epoch"]


def _levels(here: str, name: str, method: Method, fields: dict) -> int:
    if "bits" in fields and "levels" in fields:
        raise UserError(f"{here}: give one of bits and levels")
    if "bits" in fields:
        bits = fields.pop("bits")
        most = (method.most - 1).bit_length()
        if not _whole(bits) or not 1 <= bits <= most:
            raise UserError(f"{here}.bits={bits!r}: allowed 1 to {most}")
        levels = 2**bits
    else:
        levels = fields.pop("levels", method.default)
    if not levels:
        raise UserError(f"{here}.method={name!r}: give bits or levels")
    if not _whole(levels) or not 2 <= levels <= method.most:
        raise UserError(f"{here}.levels={levels!r}: allowed 2 to {method.most}")
    if not method.levels(levels):
        able = [str(n) for n in range(2, method.most + 1) if method.levels(n)]
        shown = ", ".join(able[:8] + ["..."] if len(able) > 8 else able)
        raise UserError(f"{here}.levels={levels}: allowed for {name!r} there: {shown}")
    return levels


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)


def above_zero(*, up_to: float = math.inf) -> tuple[str, Callable[[Any], bool]]:
    """For `Method.allowed`: numbers above 0, and no more than that."""
    text = "a number above 0" + (f", up to {up_to:g}" if up_to < math.inf else "")
    return text, lambda value: _number(value) and 0 < value <= up_to and value < math.inf


def at_least_zero() -> tuple[str, Callable[[Any], bool]]:
    """For `Method.allowed`: finite numbers from 0 on."""
    return "a number of at least 0", lambda value: _number(value) and 0 <= value < math.inf


def one_of(*values: Any) -> tuple[str, Callable[[Any], bool]]:
    """For `Method.allowed`: these values."""
    # By type too, as True is 1.
    kinds = [(type(value), value) for value in values]
    return ", ".join(map(repr, values)), lambda value: (type(value), value) in kinds


def whole_numbers() -> tuple[str, Callable[[Any], bool]]:
    """For `Method.allowed`: a tuple of numbers above 0."""
    return (
        "whole numbers above 0, as in (4, 4)",
        lambda value: isinstance(value, tuple) and all(_whole(n) and n > 0 for n in value),
    )


def _option(here: str, method: Method, fields: dict, name: str) -> Any:
    value = fields.pop(name, method.options[name])
    value = tuple(value) if isinstance(value, list) else value  # a spec is hashable
    text, able = method.allowed[name]
    if not able(value):
        raise UserError(f"{here}.{name}={value!r}: allowed {text}")
    return value


def _stages(here: str, stages: Any) -> tuple:
    try:
        made = tuple((epoch, levels) for epoch, levels in stages)
    except (TypeError, ValueError):
        made = None
    if made is None or not all(_number(epoch) and _whole(levels) for epoch, levels in made):
        raise UserError(
            f"{here}.stages={stages!r}: give pairs (epoch, levels), as in ((0, 16), (2, 8))"
        )
    return made


def _check(here: str, made: Quantizer, method: Method) -> None:
    for field in ("signed", "power_of_two", "zero_point", "post_scale"):
        if not isinstance(getattr(made, field), bool):
            raise UserError(f"{here}.{field}={getattr(made, field)!r}: allowed True, False")
    if not isinstance(made.per, str):
        raise UserError(f"{here}.per={made.per!r}: give a text, such as 'channel' or 'groups:4'")
    able = dict.fromkeys(method.gradients)
    names.pick(f"{here}.gradient", made.gradient, able)
    if made.levels > 2 or not made.signed:
        able = {key: None for key in able if key in through.ROUNDING}
        names.pick(f"{here}.gradient (of {made.levels} levels)", made.gradient, able)
    names.pick(f"{here}.step_gradient", made.step_gradient, STEP_GRADIENTS)
    site = "kernel" if made.site == CORE else made.site
    able = NORMALISATIONS.get(site, {"none": "as it is"})
    names.pick(f"{here}.normalise", made.normalise, able)
    names.pick(f"{here}.axis", made.axis, {"out": None, "in": None})
    if made.axis == "in" and made.per == "layer":
        raise UserError(f"{here}.axis='in': with per='layer' there is nothing to choose")
    names.pick(f"{here}.pad", made.pad, {"after": None, "before": None})
    names.pick(f"{here}.loss_norm", made.loss_norm, {"l1": None, "l2": None})
    if made.signed != method.signed and not method.both_signs:
        raise UserError(f"{here}.signed={made.signed}: {made.method!r} has no such form")
    kind, _, count = made.per.partition(":")
    if kind in ("groups", "size"):
        if not count.isdecimal() or not int(count):
            raise UserError(f"{here}.per={made.per!r}: give a number, as in '{kind}:4'")
    else:
        able = ["layer", "channel", "groups:n", "size:n"]
        able += ["tap", "tap:channel"] if made.site in INNER else []
        names.pick(
            f"{here}.per", made.per, dict.fromkeys(able if made.site != "transforms" else ["layer"])
        )
    for field in ("loss", "float_epochs", "freeze_epoch", "stop_epoch"):
        value = getattr(made, field)
        if not _number(value) or not 0 <= value < math.inf:
            raise UserError(f"{here}.{field}={value!r}: give a number, at least 0")
    if made.zero_point and (made.signed or made.levels == 2):
        raise UserError(f"{here}.zero_point: it takes signed=False and more than 2 levels")
    _check_stages(here, made, method.most)
    if 0 < made.freeze_epoch < made.float_epochs:
        raise UserError(
            f"{here}.freeze_epoch={made.freeze_epoch}: give 0, or an epoch not below "
            f"{made.float_epochs}, of float_epochs"
        )
    _check_stop(here, made)


def _check_stages(here: str, made: Quantizer, most: int) -> None:
    if not made.stages:
        return
    epochs, levels = zip(*made.stages, strict=True)
    if list(epochs) != sorted(set(epochs)) or epochs[0] != 0:
        raise UserError(f"{here}.stages={made.stages}: epochs must rise, from 0")
    if levels[-1] != made.levels or min(levels) < 3 or max(levels) > most:
        raise UserError(
            f"{here}.stages={made.stages}: the last must have levels={made.levels}, and each of "
            f"them 3 to {most}"
        )


def _check_stop(here: str, made: Quantizer) -> None:
    """What would begin when nothing is rounded any more has no effect."""
    begins = {"float_epochs": made.float_epochs, "freeze_epoch": made.freeze_epoch}
    begins["stages"] = made.stages[-1][0] if made.stages else 0.0
    for field, epoch in begins.items():
        if made.stop_epoch and made.stop_epoch <= epoch:
            raise UserError(
                f"{here}.stop_epoch={made.stop_epoch}: give an epoch above {epoch}, of {field}, or "
                "0"
            )
