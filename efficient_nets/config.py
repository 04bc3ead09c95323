"""The fields of an experiment: their defaults, their checks, and what identifies a run.

A config file builds on `defaults()`:

    from efficient_nets import config as configs

    def get_config():
        config = configs.defaults()
        config.model = configs.model("resnet", depth=32)
        config.data.name = "cifar10"
        return config
"""

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import data, models, names, optim, paths, sharding, tasks
from efficient_nets.errors import UserError
from efficient_nets.layers import rules
from efficient_nets.ops.quantizers import CALIBRATIONS
from efficient_nets.search import rewards, strategies
from efficient_nets.tasks import classification, detection, generation

PRETRAINED = "pretrain"  # teacher.checkpoint: the net in float of config.pretrain
# A run may be resumed with other values here: they do not change what is computed.
FREE_SECTIONS = ("log", "sharding", "deploy")
NOT_NUMERIC = (
    "data.dir",
    "data.storage",
    "data.workers",
    "data.memory_limit_gib",
    "checkpoint.keep",
    "evaluate.batch_size",
    "search.built_layers",
    "search.built_features",
    "search.built_epochs",
    "search.ranked",
    "search.ranked_epochs",
)


# What numbers must be, how that is tested, and the fields that it is asked of. What depends on the
# devices or the data is checked where these are known.
BOUNDS = {
    "above 0": (
        lambda x: x > 0,
        (
            *("train.epochs", "train.batch_size", "evaluate.batch_size", "evaluate.every_epochs"),
            *("checkpoint.every_epochs", "log.every_steps", "optimizer.learning_rate"),
            *("optimizer.epsilon", "pretrain.learning_rate", "teacher.temperature"),
            *("winas.epochs", "winas.learning_rate", "search.ranked_epochs"),
        ),
    ),
    "at least 1": (
        lambda x: x >= 1,
        (
            *("checkpoint.keep", "optimizer.accumulate", "generation.grid"),
            *("generation.critic_updates", "generation.generator_batches"),
            *("winas.latency_batch_size", "winas.latency_repeats"),
            *("search.updates", "search.proposals", "search.batch_size", "search.shown"),
            *("search.finalists", "search.norm_batches", "search.latency_batch_size"),
            "search.latency_repeats",
        ),
    ),
    "at least 2": (lambda x: x >= 2, ("search.ranked", "generation.samples")),
    "at least 0": (
        lambda x: x >= 0,
        (
            *("search.interval", "search.warmup_epochs", "search.target", "search.cost_weight"),
            *("search.built_layers", "search.built_features", "search.built_epochs"),
            *("seed", "train.steps_per_dispatch", "optimizer.clip_norm", "optimizer.weight_decay"),
            *("calibration.batch_size", "calibration.norm_batches", "deploy.bias_correction"),
            *("pretrain.epochs", "winas.warmup_epochs", "winas.cost_weight"),
            *("schedule.warmup_epochs", "schedule.end_value", "log.histograms_every_epochs"),
            *("detection.negatives", "detection.box_weight", "detection.drawn"),
            "detection.drawn_score",
        ),
    ),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, ("teacher.weight",)),
    "at least 0 and below 1": (
        lambda x: 0 <= x < 1,
        (
            *("train.ema", "train.label_smoothing", "optimizer.momentum"),
            *("optimizer.b1", "optimizer.b2"),
        ),
    ),
}


def model(name: str, *, preset: str = "", **options) -> ConfigDict:
    """The `config.model` section: the architecture's name and all its options.

    Args:
      name: A key of `models.MODELS`, or with a preset behind a colon, as 'resnet:bireal'.
      preset: A key of `models.PRESETS[name]`: options of a published variant, which those given
        here override. The section holds the options, and not the preset's name.
      **options: See `models.options(name)`.

    Raises:
      UserError: on an architecture, preset or option that does not exist.
    """
    name, _, behind = name.partition(":")
    if behind and preset:
        raise UserError(f"preset={preset!r}: {name}:{behind} names one already")
    preset = preset or behind
    defaults = models.options(name)
    names.check_fields(f"model {name!r}", options, defaults)
    return ConfigDict({"name": name, **defaults, **models.preset(name, preset), **options})


def defaults() -> ConfigDict:
    """Every field of an experiment with its default value.

    Epochs in schedules may be fractions. `0` and `""` mean "none" where a field can be off.
    """
    config = ConfigDict()
    config.seed = 0
    config.task = "classification"  # what the net is trained for, a key of tasks.TASKS
    config.model = model("resnet", depth=20)
    config.layers = ()  # rules for layers.convert, first match wins
    config.dtype = "float32"  # compute type of the products: float32 or bfloat16
    config.data = ConfigDict(data.defaults())
    config.optimizer = ConfigDict(
        dict(
            name="sgd",  # sgd, adam (L2 in the gradient), adamw (decoupled decay), lamb
            learning_rate=0.1,
            momentum=0.9,
            nesterov=False,
            b1=0.9,
            b2=0.999,
            epsilon=1e-8,
            weight_decay=0.0,
            clip_norm=0.0,  # of the global gradient norm
            accumulate=1,  # steps whose gradients are averaged into one update
            # match, learning_rate (a factor), weight_decay, bound (of the parameters' size; 0 is
            # none); the first rule that has a field wins.
            # Of the quantizers' ranges PACT's alpha alone decays, as its paper says; PReLU's slopes
            # do not, as its paper says (arXiv 1502.01852), nor do Group-Net's gates and Winograd's
            # learned transforms.
            rules=(
                dict(
                    match=r"(^|/)(bias|scale|slope|gate|transforms/\w+|ranges/.*/(?!alpha)\w+)$",
                    weight_decay=0.0,
                ),
            ),
        )
    )
    config.schedule = ConfigDict(
        dict(
            name="cosine",  # constant, cosine, multistep, poly, restarts
            warmup_epochs=0.0,  # linear from 0
            end_value=0.0,  # cosine, poly, restarts: the last learning rate
            milestones=(),  # multistep: epochs at which the rate is multiplied by `factor`
            factor=0.1,
            power=1.0,  # poly
            period=10.0,  # restarts: epochs of the first cycle
            stretch=2.0,  # restarts: each cycle is that much longer than the one before
        )
    )
    config.train = ConfigDict(
        dict(
            epochs=1.0,
            batch_size=128,  # over all devices
            loss="cross_entropy",  # cross_entropy, squared_hinge (as binary nets were trained)
            label_smoothing=0.0,
            ema=0.0,  # decay of the moving average of the net that is evaluated; 0: none
            steps_per_dispatch=0,  # 0: 16 on an accelerator with data on the device, else 1
        )
    )
    config.evaluate = ConfigDict(
        dict(
            batch_size=500,  # over all devices; rounded up to what they divide
            every_epochs=1.0,
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            every_epochs=1.0,
            keep=3,  # the newest ones; the best one is kept too
            init_from="",  # a workdir whose weights to start from, where path and shape match
            convert_from="",  # a workdir whose trained net `layers` are applied to
        )
    )
    config.calibration = ConfigDict(  # where quantizers and norms start, before step 0
        dict(
            # Training images that the net in float is shown; 0: none, and what checkpoint.init_from
            # or convert_from brings stays.
            batch_size=256,
            how="own",  # own: as each paper starts; minmax, percentile, mse, entropy
            # Training batches over which batch norms get the moments of the net that init_from or
            # convert_from starts with, as it is now; 0: their statistics stay.
            norm_batches=0,
        )
    )
    config.pretrain = ConfigDict(  # a run of the same net first, dense, direct and in float
        dict(
            epochs=0.0,  # 0: none; else this run starts from its weights
            learning_rate=0.1,
            keep_precision=False,  # it is rounded as layers say, but for what is inside transforms
        )
    )
    config.teacher = ConfigDict(  # a trained net whose outputs are learnt beside the labels
        dict(
            checkpoint="",  # its workdir; pretrain: the net in float of `pretrain`; "": no teacher
            weight=0.5,  # of its part of the loss; the labels have the rest
            temperature=4.0,
        )
    )
    config.builder = ConfigDict(  # search.auto_builder: removes layers until a budget is met
        dict(
            budget="",  # what is cut: params, macs, or seconds of a forward batch; "": no builder
            keep=0.6,  # share of the first net's that may stay
            accuracy_floor=0.0,  # on the validation split; a round below it is not taken
            candidates=r"conv",  # regular expression of the layers that may go
            layers_per_round=1,
            mask_fraction=0.5,  # share of a layer's weights that a mask sets to zero
            mask_seeds=3,  # masks a layer, whose effects are averaged
            finetune_epochs=1.0,  # after each removal
            finetune_rate=0.5,  # factor of optimizer.learning_rate there
        )
    )
    config.mixed = ConfigDict(  # --mode=sensitivity: a precision for each layer that layers round
        dict(
            choices=(),  # short forms, as "lsq:w4a4"; (): that of layers, and nothing is chosen
            budget="packed_bytes",  # what is cut: packed_bytes or bops
            keep=0.0,  # share of the float net's that may stay; 0: layers are measured alone
            # Regular expression of those that are switched; others have what layers say, always.
            layers=".",
        )
    )
    config.winas = ConfigDict(  # --mode=search: an algorithm and a precision for each layer
        dict(
            candidates=(),  # dicts of algorithm and precision: see search.candidates.grid
            layers=r"conv",  # regular expression of the convolutions of several taps, searched
            cost="macs",  # of candidates: macs, bops, or latency
            latency="",  # for cost latency: a file of --mode=latency
            cost_weight=0.1,  # of the expected cost beside the loss; direct in float costs 1
            epochs=10.0,  # of the search, in place of train.epochs
            warmup_epochs=1.0,  # first ones, in which weights alone are trained
            learning_rate=0.006,  # of the architecture's Adam
            latency_batch_size=1,  # --mode=latency: images of a call
            latency_repeats=20,  # calls whose median is taken
        )
    )
    config.search = ConfigDict(  # search.cell_search: an architecture for a net of cells
        dict(
            strategy="",  # enas, darts, gumbel, evolution, nsga2, random; "": no search
            # Steps of the weights between two phases of the strategy; 0: an epoch's, and one for
            # darts and gumbel, whose phase is a step too.
            interval=0,
            updates=30,  # of the strategy, a phase
            proposals=10,  # architectures an update
            batch_size=128,  # validation images that those of an update are measured on
            warmup_epochs=0.0,  # first ones, in which weights alone are trained
            # accuracy, cost_aware: what strategies are told, and by which one of the finalists is
            # chosen; nsga2 is told accuracy and cost, darts and gumbel the gradient of a loss.
            reward="accuracy",
            cost="bops",  # macs, bops, packed_bytes, params, latency
            target=0.0,  # cost to aim at; 0: the mean of all architectures
            exponents=rewards.SOFT,  # of cost / target below and above it, for cost_aware
            cost_weight=0.0,  # darts, gumbel: of cost / target beside the loss
            shown=10,  # architectures printed behind each evaluation
            finalists=10,  # measured on the whole validation split in the end
            norm_batches=20,  # training batches that batch norms are made anew of for it
            latency="",  # for cost latency: a file of --mode=latency
            latency_batch_size=1,  # --mode=latency: images of a call
            latency_repeats=20,  # calls whose median is taken
            # What the built config has in place of model.layers, model.features and train.epochs;
            # 0: the same.
            built_layers=0,
            built_features=0,
            built_epochs=0.0,
            ranked=8,  # --mode=rank: architectures that are trained on their own
            ranked_epochs=10.0,
            **strategies.options(),
        )
    )
    config.generation = ConfigDict(generation.defaults())
    config.deploy = ConfigDict(  # what --mode=deploy does with a rounded net
        dict(
            fold=True,  # batch norms become parts of the layers in front of them
            # Training images over which biases make up for what rounding after training does to
            # the means of outputs; 0: none.
            bias_correction=0,
        )
    )
    config.detection = ConfigDict(detection.defaults())
    config.sharding = ConfigDict(
        dict(
            fsdp=1,  # devices over which matching parameters are cut; the rest are data parallel
            rules=tuple(map(dict, sharding.DEFAULT_RULES)),  # match, shard: 'fsdp' or 'replicate'
        )
    )
    config.log = ConfigDict(
        dict(
            every_steps=50,
            tensorboard=True,
            products=False,  # of each layer, the largest magnitude of its neuron's products
            histograms_every_epochs=0.0,  # of what layers hold and give; 0: none
        )
    )
    return config


def check(config: ConfigDict) -> None:
    """Raises a UserError on a field that is unknown, missing, of a wrong type or out of range."""
    reference = defaults()
    name = config.get("model", {}).get("name", "")
    names.pick("model.name", name, models.MODELS)
    reference.model = model(name)
    _check_section("config", config.to_dict(), reference.to_dict())
    fields = _flatten(config.to_dict())
    for allowed, (holds, bounded) in BOUNDS.items():
        for field in bounded:
            if not (holds(fields[field]) and math.isfinite(fields[field])):
                raise UserError(f"{field}={fields[field]}: must be {allowed} and finite")
    _check_task(config, reference, fields)
    _check_start(config, reference, fields)
    if not config.builder.budget and config.builder != reference.builder:
        raise UserError("builder.budget='': without one the other fields of builder do nothing")
    if config.search.strategy:
        names.pick("search.strategy", config.search.strategy, strategies.STRATEGIES)
    elif config.search != reference.search:
        raise UserError("search.strategy='': without one the other fields of search do nothing")
    names.pick("train.loss", config.train.loss, classification.LOSSES)
    names.pick("calibration.how", config.calibration.how, CALIBRATIONS)
    names.pick("dtype", config.dtype, {"float32": None, "bfloat16": None})
    paths.check_rules("layers", config.layers, rules.FIELDS)
    paths.check_rules("optimizer.rules", config.optimizer.rules, optim.RULE_FIELDS)
    paths.check_rules("sharding.rules", config.sharding.rules, sharding.RULE_FIELDS)


# What a search does without: fields that are for the net which it finds.
NOT_IN_A_SEARCH = (
    "train.ema",
    "teacher.checkpoint",
    "pretrain.epochs",
    "builder.budget",
    "log.products",
    "log.histograms_every_epochs",
)


def check_off(config: ConfigDict, fields: Iterable[str], why: str) -> None:
    """Raises a UserError, with the reason, if one of these fields is on, as 'train.ema'."""
    given = _flatten(config.to_dict())
    for field in fields:
        if given[field]:
            raise UserError(f"{field}={given[field]!r}: {why}")


def _check_task(config: ConfigDict, reference: ConfigDict, fields: dict) -> None:
    """That the net is for the task, and that no field is set which is for another task alone."""
    task = config.task
    names.pick("task", task, tasks.TASKS)
    if (own := models.task(config.model.name)) != task:
        raise UserError(f"model.name={config.model.name!r}: it is for task={own!r}, not {task!r}")
    defaults = _flatten(reference.to_dict())
    for field, value in fields.items():
        heeding = tasks.heeding("fields", field)
        if task not in heeding and value != defaults[field]:
            raise UserError(
                f"{field}={value!r}: only task={' or '.join(heeding)} heeds it, and this one is "
                f"{task!r}"
            )


def _check_start(config: ConfigDict, reference: ConfigDict, fields: dict) -> None:
    """What a run starts from and learns from."""
    names.local_folder("checkpoint.init_from", config.checkpoint.init_from)
    names.local_folder("checkpoint.convert_from", config.checkpoint.convert_from)
    if config.teacher.checkpoint != PRETRAINED:
        names.local_folder("teacher.checkpoint", config.teacher.checkpoint)
    starts = ("checkpoint.init_from", "checkpoint.convert_from", "pretrain.epochs")
    if len(given := [field for field in starts if fields[field]]) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them, a net has one start")
    if config.teacher.checkpoint == PRETRAINED and not config.pretrain.epochs:
        raise UserError("teacher.checkpoint='pretrain': it takes pretrain.epochs above 0")
    if not config.teacher.checkpoint and config.teacher != reference.teacher:
        raise UserError("teacher.checkpoint='': without one the other fields of teacher do nothing")
    if not config.pretrain.epochs and config.pretrain != reference.pretrain:
        raise UserError("pretrain.epochs=0: then the other fields of pretrain do nothing")
    if config.pretrain.epochs and not config.calibration.batch_size:
        raise UserError(
            "calibration.batch_size=0: the net in float of pretrain has no ranges to start from"
        )
    if config.pretrain.epochs and config.builder.budget:
        raise UserError("pretrain.epochs and builder.budget: the auto-builder has runs of its own")
    if config.calibration.norm_batches and not given:
        raise UserError(
            f"calibration.norm_batches={config.calibration.norm_batches}: the norms of a fresh net "
            f"have no statistics to keep; it takes one of {', '.join(starts)}"
        )


def _check_section(path: str, given: dict, reference: dict) -> None:
    names.check_fields(path, given, reference)
    for key, default in reference.items():
        field = f"{path}.{key}"
        if key not in given:
            raise UserError(
                f"{field} is missing: build the config on efficient_nets.config.defaults()"
            )
        value = given[key]
        if isinstance(default, dict) and isinstance(value, dict):
            _check_section(field, value, default)
        elif not _same_kind(value, default):
            raise UserError(f"{field}={value!r} has the wrong type: a {_kind(default)} is needed")


def _kind(value: Any) -> str:
    return "tuple" if isinstance(value, tuple | list) else type(value).__name__


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return _kind(value) == _kind(default)


def to_json(config: ConfigDict) -> str:
    """The config as text: equal configs give equal text."""
    return json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """Undoes `to_json`.

    Fields that came after the text was written have their defaults: these stand for what was done
    without them.
    """
    given = _tuples(json.loads(text))
    reference = defaults()
    name = given.get("model", {}).get("name", "")
    reference.model = model(name) if name in models.MODELS else {}
    return ConfigDict(_completed(given, reference.to_dict()))


def _completed(given: dict, reference: dict) -> dict:
    found = reference | given
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(reference.get(key), dict):
            found[key] = _completed(value, reference[key])
    return found


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """JSON knows neither tuples nor an int that stands for a float."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, ConfigDict):
        return _plain(value.to_dict())
    return float(value) if isinstance(value, float) else value


def fingerprint(config: ConfigDict) -> str:
    """SHA-256 of all fields that change what is computed."""
    return hashlib.sha256(json.dumps(_identity(json.loads(to_json(config)))).encode()).hexdigest()


def _identity(plain: dict) -> dict:
    flat = _flatten(plain)
    return {
        key: value
        for key, value in sorted(flat.items())
        if key.split(".")[0] not in FREE_SECTIONS and key not in NOT_NUMERIC
    }


def _flatten(plain: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(config: ConfigDict, saved_json: str) -> list[str]:
    """Fields in which a saved run computes something else, as `field: there A, here B`."""
    here, there = (_identity(json.loads(to_json(x))) for x in (config, from_json(saved_json)))
    return [
        f"{key}: there {there.get(key)!r}, here {here.get(key)!r}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
