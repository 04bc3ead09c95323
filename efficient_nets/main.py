"""`python -m efficient_nets.main --config=configs/qresnet.py --workdir=DIR --mode=train`."""

import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from efficient_nets import config as configs
from efficient_nets import data, evaluation, experiment, reporting, workdirs
from efficient_nets.checkpoint import CheckpointError
from efficient_nets.errors import TrainingDiverged, UserError
from efficient_nets.train import train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py or FILE.py:ARGUMENT; --config.a.b=VALUE changes a field."
)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; runs/<config's name> if not given."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "summary"], "What to do.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "eval: the workdir to restore from.")
STEP = flags.DEFINE_string("step", "newest", "eval: newest, best, or a step.")
DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "One of several processes of a run.")


def _run(config, workdir: pathlib.Path) -> None:
    if MODE.value == "summary":
        configs.check(config)
        info = data.describe(config.data)
        workdirs.write_summary(workdir, experiment.abstract_model(config, info), info)
    elif MODE.value == "eval":
        configs.check(config)
        run = experiment.build(config, data.load(config.data))
        folder = pathlib.Path(CHECKPOINT.value or workdir)
        state = workdirs.restore_for_evaluation(run, folder, STEP.value)
        step = int(state.step)
        scores = evaluation.evaluate_all(evaluation.evaluators(run), state)
        print(reporting.evaluation_line(step / run.epoch_steps, step, scores))
        workdirs.write_eval(workdir, {"step": step, "checkpoint": str(folder)} | scores)
    else:
        train(config, workdir)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    name = pathlib.Path(FLAGS["config"].config_filename).stem
    try:
        _run(CONFIG.value, pathlib.Path(WORKDIR.value or f"runs/{name}"))
    except (UserError, CheckpointError, TrainingDiverged, OSError) as error:
        logging.debug("", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


FLAGS = flags.FLAGS


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, UserError, FileNotFoundError) as error:
        sys.exit(f"error: {str(error).strip(chr(34))}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)
