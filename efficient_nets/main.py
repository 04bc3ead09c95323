"""`python -m efficient_nets.main --config=configs/qresnet.py --workdir=DIR --mode=train`."""

import pathlib
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from efficient_nets import config as configs
from efficient_nets import data, errors, evaluation, experiment, reporting, sharding, workdirs
from efficient_nets.errors import TrainingDiverged, UserError
from efficient_nets.search import auto_builder
from efficient_nets.train import train

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "FILE.py or FILE.py:ARGUMENT; --config.a.b=VALUE changes a field.",
    lock_config=False,
    accept_new_attributes=True,  # configs.check refuses them, and names the nearest one
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run, else runs/<config's name>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "summary"], "What to do.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "eval: the workdir to restore from.")
STEP = flags.DEFINE_string("step", "newest", "eval: newest, best, or a step.")
DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "One of several processes of a run.")


def _run(config, workdir: pathlib.Path) -> None:
    configs.check(config)
    if MODE.value == "summary":
        info = data.describe(config.data)
        workdirs.write_summary(workdir, experiment.abstract_model(config, info), info)
    elif MODE.value == "eval":
        run = experiment.build(config, data.load(config.data))
        folder = pathlib.Path(CHECKPOINT.value or workdir)
        state = workdirs.restore_for_evaluation(run, folder, STEP.value)
        step = int(state.step)
        scores = evaluation.evaluate_all(evaluation.evaluators(run), state)
        print(reporting.evaluation_line(step / run.epoch_steps, step, scores))
        workdirs.write_eval(workdir, {"step": step, "checkpoint": str(folder)} | scores)
    elif config.builder.budget:
        auto_builder.build(config, workdir, train)
    else:
        train(config, workdir)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unknown argument {argv[1]!r}")
    path = pathlib.Path(FLAGS["config"].config_filename.partition(":")[0])
    if not path.is_file():
        _fail(f"--config={path}: there is no such file")
    try:
        if DISTRIBUTED.value:
            sharding.join_processes()
        _run(CONFIG.value, pathlib.Path(WORKDIR.value or f"runs/{path.stem}"))
    except (UserError, TrainingDiverged, OSError) as error:
        logging.debug("", exc_info=True)
        _fail(error)


def parse(argv: list[str]) -> list[str]:
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
