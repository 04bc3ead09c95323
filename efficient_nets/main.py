"""`python -m efficient_nets.main --config=configs/qresnet.py --workdir=DIR --mode=train`.

`--config.arc=X` is short for `--config.model.arc=X`, the architecture of a net of cells.
"""

import pathlib
import re
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from efficient_nets import config as configs
from efficient_nets import data, errors, experiment, names, sharding, tasks, workdirs
from efficient_nets.deployment import make_deployable
from efficient_nets.errors import TrainingDiverged, UserError
from efficient_nets.evaluation import evaluate
from efficient_nets.inspection import inspect
from efficient_nets.prediction import predict
from efficient_nets.search import (
    auto_builder,
    cell_search,
    decompose,
    latency,
    mixed_precision,
    prune,
    ranking,
    winas,
)
from efficient_nets.train import train

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "FILE.py or FILE.py:ARGUMENT; --config.a.b=VALUE changes a field.",
    lock_config=False,
    accept_new_attributes=True,  # configs.check refuses them, and names the nearest one
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run, else runs/NAME[-ARGUMENT].")
MODES = ["train", "eval", "summary", "analyze", "sensitivity", "search", "latency", "deploy"]
MODES += ["decompose", "prune", "rank", "predict"]
OF_SEARCH = ("train", "search", "rank", "latency", "summary")  # what config.search is for
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "eval, analyze, deploy, predict, prune, rank: the workdir to restore from."
)
STEP = flags.DEFINE_string(
    "step", "newest", "eval, analyze, deploy, predict, prune: newest, best, a step."
)
INPUT = flags.DEFINE_string("input", "", "predict: an image, or a folder of images.")
REFERENCE = flags.DEFINE_string("reference", "", "analyze: an analysed workdir to compare with.")
THRESHOLD = flags.DEFINE_float(
    "threshold", 0.01, "prune: indices of bonds go up to this share of the largest contribution."
)
DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "One of several processes of a run.")


def _run(config, workdir: pathlib.Path) -> None:
    of_a_checkpoint = "eval analyze deploy predict prune"
    for flag, modes in (
        (CHECKPOINT, f"{of_a_checkpoint} rank"),
        (STEP, of_a_checkpoint),
        (REFERENCE, "analyze"),
        (INPUT, "predict"),
        (THRESHOLD, "prune"),
    ):
        if flag.present and MODE.value not in modes.split():
            modes = modes.replace(" ", " or --mode=")
            raise UserError(f"--{flag.name}={flag.value}: only --mode={modes} may have it")
    folder = names.local_folder("--checkpoint", CHECKPOINT.value or str(workdir))
    configs.check(config)
    if config.task not in (having := tasks.heeding("modes", MODE.value)):
        raise UserError(
            f"--mode={MODE.value}: only task={' or '.join(having)} has it, and this one is "
            f"{config.task!r}"
        )
    if MODE.value == "train" and config.mixed != configs.defaults().mixed:
        raise UserError("mixed: only --mode=sensitivity heeds it; train the config that it writes")
    if MODE.value == "train" and config.generation.features.startswith("file:"):
        raise UserError(
            f"generation.features={config.generation.features!r}: it is of samples of a trained "
            "net, for --mode=eval alone"
        )
    if config.search.strategy and MODE.value not in OF_SEARCH:
        raise UserError(
            f"search.strategy={config.search.strategy!r}: --mode is one of {', '.join(OF_SEARCH)}; "
            "built_config.py in a search's workdir is the config of the net that it found"
        )
    if (
        MODE.value == "train" or config.search.strategy
    ) and config.winas != configs.defaults().winas:
        raise UserError(
            "winas: only --mode=search and --mode=latency heed it; train the config that a search "
            "writes"
        )
    if MODE.value == "summary":
        info = data.describe(config.data, config.task)
        workdirs.write_summary(workdir, config, experiment.abstract_model(config, info), info)
    elif MODE.value == "eval":
        evaluate(config, workdir, folder, STEP.value)
    elif MODE.value == "predict":
        predict(config, workdir, folder, STEP.value, INPUT.value)
    elif MODE.value == "analyze":
        inspect(config, workdir, folder, STEP.value, REFERENCE.value)
    elif MODE.value == "sensitivity":
        mixed_precision.build(config, workdir)
    elif MODE.value in ("search", "train") and config.search.strategy:
        cell_search.build(config, workdir)
    elif MODE.value == "search":
        winas.build(config, workdir)
    elif MODE.value == "rank":
        ranking.rank(config, workdir, folder)
    elif MODE.value == "decompose":
        decompose.build(config, workdir)
    elif MODE.value == "prune":
        prune.build(config, workdir, folder, STEP.value, THRESHOLD.value)
    elif MODE.value == "latency" and config.search.strategy:
        cell_search.measure(config, workdir)
    elif MODE.value == "latency":
        latency.measure(config, workdir)
    elif MODE.value == "deploy":
        make_deployable(config, workdir, folder, STEP.value)
    elif config.builder.budget:
        auto_builder.build(config, workdir, train)
    else:
        train(config, workdir)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unknown argument {argv[1]!r}")
    file = FLAGS["config"].config_filename
    if not pathlib.Path(file.partition(":")[0]).is_file():
        _fail(f"--config={file}: there is no such file")
    try:
        if DISTRIBUTED.value:
            sharding.join_processes()
        workdir = names.local_folder("--workdir", WORKDIR.value or workdirs.default(file))
        _run(CONFIG.value, workdir)
    except (UserError, TrainingDiverged, OSError) as error:
        logging.debug("", exc_info=True)
        _fail(error)


def parse(argv: list[str]) -> list[str]:
    argv = [re.sub(r"^(--?config)\.arc(?==|$)", r"\1.model.arc", text) for text in argv]
    sys.argv = argv  # where the config flag looks for its overrides
    try:
        return FLAGS(argv)
    except (AttributeError, KeyError) as error:
        _fail(f"--config has no such field: {error.args[0]}")
    except (flags.Error, OSError) as error:
        _fail(errors.mistake(error))


def _fail(message: object) -> NoReturn:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
