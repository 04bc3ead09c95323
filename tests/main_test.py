"""The command line: what it writes and prints, and one clear line for each mistake.

Most commands run in this process, on its eight devices; `shell` starts a process of its own.
"""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from flax.nnx import Rngs, Sequential

from efficient_nets import analysis, layers, workdirs
from efficient_nets import config as configs
from efficient_nets import main as program
from efficient_nets.checkpoint import Checkpoints

# ml_collections reads a config file in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--config=tests/tiny_config.py"


def shell(*arguments, limit="unlimited", devices=1):
    """The real command, with a limit in KiB on the files that it writes."""
    command = f'ulimit -f {limit}; exec "$0" -m efficient_nets.main "$@"'
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        ["bash", "-c", command, sys.executable, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": xla},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fails(command, tmp_path):
    """Runs a command that must fail, and gives its message."""

    def run(*arguments):
        status, _, err = command(f"--workdir={tmp_path / 'run'}", *arguments)
        messages = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(messages) == 1 and "Traceback" not in err, err
        return messages[0]

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the real command, on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    result = shell(TINY, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def read(path):
    return json.loads(path.read_text())


# What it writes and prints


def test_training_prints_the_table_an_evaluation_an_epoch_and_where_everything_is(whole):
    workdir, out = whole
    result = read(workdir / "result.json")
    assert "stage1/0/conv1" in out and "12,246 parameters" in out
    assert [line[:7] for line in out.splitlines() if line.startswith("epoch ")] == [
        "epoch 1",
        "epoch 2",
    ]
    assert f"test/accuracy {100 * result['test/accuracy']:.2f}%" in out
    for line in out.partition("\nresult ")[2].splitlines():
        path = pathlib.Path(line.split()[-1])
        assert path.exists() or path.name == "tensorboard", line
    assert {path.name for path in (workdir / "plots").iterdir()} >= {"accuracy.png", "loss.png"}


def test_summary_needs_no_data(command, tmp_path):
    assert os.environ["TFDS_DATA_DIR"] == os.devnull
    status, out, _ = command(
        "--config=configs/resnet.py", "--mode=summary", f"--workdir={tmp_path}"
    )
    assert status == 0
    summary = read(tmp_path / "summary.json")
    assert (summary["params"], summary["macs"]) == (466906, 69124736)
    assert len(summary["layers"]) == 34 and "466,906 parameters" in out
    assert (tmp_path / "summary.txt").read_text().strip() in out
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "summary.txt"}


def test_summary_leaves_the_folder_of_another_config_alone(command, tmp_path):
    arguments = "--config=configs/resnet.py", "--mode=summary", f"--workdir={tmp_path}"
    config = configs.defaults()
    for seed, out in ((1, f"not written to {tmp_path}"), (0, "")):
        config.update(runpy.run_path(str(ROOT / "configs/resnet.py"))["get_config"](), seed=seed)
        (tmp_path / "config.json").write_text(configs.to_json(config))
        status, printed, _ = command(*arguments)
        assert status == 0 and "466,906 parameters" in printed and out in printed
        assert (tmp_path / "summary.json").exists() == (not out)


def test_without_a_workdir_each_argument_of_a_config_has_its_own(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argument in ("", ":cifar100"):
        assert command(f"--config={ROOT}/configs/resnet.py{argument}", "--mode=summary")[0] == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"resnet", "resnet-cifar100"}
    assert workdirs.default("a/b.py:folder:/x y") == "runs/b-folder__x_y"


def test_an_architecture_has_a_short_flag(command, monkeypatch):
    seen = []
    monkeypatch.setattr(program, "_run", lambda config, workdir: seen.append(config.model.arc))
    forms = ("--config.arc=1 2",), ("--config.arc", "1 2"), ("-config.arc=1 2",), ("--config.arc=",)
    forms += (("--config.model.arc=3 4", "--config.arc=1 2"),)  # the last one counts
    for form in forms:
        status, _, err = command("--config=configs/enas_arc.py", *form)
        assert status == 0, err
    assert seen == ["1 2", "1 2", "1 2", "", "1 2"]


@pytest.mark.parametrize("step", ["newest", "best", "5"])
def test_evaluation_on_eight_devices_scores_as_training_did_on_one(whole, command, step, tmp_path):
    status, out, err = command(
        TINY, "--mode=eval", f"--step={step}", f"--checkpoint={whole[0]}", f"--workdir={tmp_path}"
    )
    assert status == 0, err
    scores = read(tmp_path / "eval.json")
    lines = map(json.loads, (whole[0] / "metrics.jsonl").read_text().splitlines())
    expected = {line["step"]: line for line in lines if "test/accuracy" in line}
    best = max(expected, key=lambda step: (expected[step]["test/accuracy"], step))
    assert scores["step"] == {"newest": 10, "best": best, "5": 5}[step]
    assert scores["test/accuracy"] == expected[scores["step"]]["test/accuracy"]
    assert f"step {scores['step']}" in out and str(tmp_path / "eval.json") in out


def test_evaluation_in_the_run_s_own_folder_leaves_the_run_as_it_was(whole):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*") if path.is_file()}
    result = shell(TINY, "--mode=eval", f"--workdir={whole[0]}")
    assert result.returncode == 0, result.stderr
    scores, trained = read(whole[0] / "eval.json"), read(whole[0] / "result.json")
    assert scores["test/accuracy"] == trained["test/accuracy"]
    assert scores["test/loss"] == trained["test/loss"]  # the same device count: the same bits
    after = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} == {whole[0] / "eval.json"}


def test_a_finished_run_is_not_trained_again(whole, command):
    digest = read(whole[0] / "result.json")["params_digest"]
    status, out, err = command(TINY, f"--workdir={whole[0]}")
    assert status == 0, err
    assert read(whole[0] / "result.json")["params_digest"] == digest


@pytest.mark.slow
def test_analysis_writes_numbers_pictures_and_events_beside_another_run_s(whole, command, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    step = ("--mode=analyze", f"--checkpoint={whole[0]}", "--step=best")
    step += ("--config.train.batch_size=30",)  # which eight devices cannot divide
    status, out, err = command(TINY, *step, f"--workdir={one}")
    assert status == 0, err
    found = read(one / "analysis.json")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert found["images"] == 32 and len(layers) == 10  # evaluate.batch_size
    shares = layers["stage3/0/conv1"]["shares"]
    assert shares.keys() == {"product", "linear"} and abs(sum(shares.values()) - 1) < 1e-6
    for path in out.partition("\nplots ")[2].splitlines()[0].split(", "):
        assert pathlib.Path(path.strip()).stat().st_size > 1000
    assert list((one / "tensorboard" / "analysis").glob("events*")) and "2 of 72" in out
    assert {path.name for path in one.iterdir()} == {
        *("analysis.json", "analysis_maps.npz", "plots", "tensorboard")
    }
    status, out, err = command(TINY, *step, f"--workdir={two}", f"--reference={one}")
    assert status == 0, err
    pictures = set(re.findall(r"\w+\.png", out))
    assert pictures >= {"beside_reference.png", "maps_beside_reference.png"}
    assert read(two / "analysis.json") == found


# Mistakes


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.train.epoch=1", "config.train has no field 'epoch'.* mean 'epochs'"),
        ("--config.trian.epochs=1", "no such field: 'trian'.* \"train\""),
        ("--config.train.epochs.x=1", "no such field:.* train.epochs.x"),
        ("--config.model.depht=20", "config.model has no field 'depht'.* mean 'depth'"),
        ("--config.arc=0 2 0 0", "config.model has no field 'arc'"),
        ("--config.train.batch_size=many", "--config.train.batch_size=many: invalid literal"),
        ("--config.train.batch_size=1.5", "--config.train.batch_size=1.5: invalid literal"),
        ("--config.train=3", "--config.train=3: .* not a dict"),
        ("--config.layers=3", r"layers\[0\]=3: a dict with 'match' is needed"),
        ("--config.layers[0].match=stage9", r"layers\[0\].match='stage9': it matches none of"),
        ("--config.layers[0].match=(", r"layers\[0\].match='\(' is no regular expression"),
        ("--config.layers[0].neuron=our", "neuron='our'.* mean 'ours'"),
        ("--config.dtype=float16", "dtype='float16' is not known: allowed bfloat16, float32"),
        ("--config.train.batch_size=30", "30: 8 devices cannot divide it; .* 24, 32"),
        ("--config.train.batch_size=800", "800: the train split has only 160 samples"),
        ("--config.sharding.fsdp=3", "sharding.fsdp=3: must divide the number of devices, 8"),
        ("--config.data.test=tset", "data.test='tset' does not select from the splits"),
        ("--config.data.name=digit", "data.name='digit' is not a data set.* mean 'digits'"),
        ("--config.optimizer.rules[0].match=scales", "'scales' matches no parameter"),
        ("--config=tests/tiny.py", "--config=tests/tiny.py: there is no such file"),
        ("--config=tests/tiny_config.py:big", r"get_config\(\) takes 0 positional arguments"),
        ("--config=configs/resnet.py:cifar11", "'cifar11' is not known:.* mean 'cifar10'"),
        ("--config=configs/resnet.py", "not prepared .* efficient_nets.data.prepare cifar10"),
        (
            "--mode=test",
            "--mode=test: value should be one of "
            "<train|eval|summary|analyze|sensitivity|search|latency|deploy>",
        ),
        ("--workdri=x", "Unknown command line flag 'workdri'. Did you mean: workdir"),
        ("train", "unknown argument 'train'"),
        ("--mode=eval", "holds no checkpoint"),
        (
            "--step=best",
            "--step=best: only --mode=eval or .* or --mode=prune may have it",
        ),
        (
            "--checkpoint=x",
            "--checkpoint=x: only --mode=eval or .* or --mode=rank may have it",
        ),
        ("--workdir=gs://b/run", "--workdir='gs://b/run': only folders of this machine, or mount"),
        ("--config.sharding.rules[0].match=kernle", "sharding.rules: 'kernle' matches no param"),
        ("--config.optimizer.accumulate=11", "accumulate=11: the run has only 10 steps"),
        ("--mode=analyze", "holds no checkpoint"),
        ("--mode=deploy", "config.layers rounds nothing"),
        ("--mode=sensitivity", "checkpoint.convert_from='': give the workdir of the trained net"),
        ("--config.mixed.keep=0.5", "mixed: only --mode=sensitivity heeds it"),
    ],
)
def test_a_mistake_gives_one_line_that_says_what_is_wrong(fails, flag, message):
    assert re.search(message, fails(TINY, flag))


def test_a_step_that_was_not_saved_lists_those_that_were(whole, fails):
    message = fails(TINY, "--mode=eval", f"--checkpoint={whole[0]}", "--step=7")
    assert "which=7" in message and "[10, 5]" in message


def test_evaluation_of_a_checkpoint_at_an_address_is_refused(fails):
    message = fails(TINY, "--mode=eval", "--checkpoint=gs://b/run")
    assert "--checkpoint='gs://b/run': only folders of this machine, or mounted" in message


def test_a_reference_that_was_not_analysed_is_named(whole, fails):
    message = fails(
        TINY, "--mode=analyze", f"--checkpoint={whole[0]}", f"--reference={whole[0]}/plots"
    )
    assert f"--reference={whole[0]}/plots holds no analysis.json" in message


def test_a_reference_without_a_layer_of_the_same_name_is_refused(whole, fails, tmp_path):
    net = Sequential(layers.Dense(3, 2, rngs=Rngs(0)))
    found = analysis.analyze(net, np.ones((2, 3), np.float32), np.arange(2))
    analysis.write_analysis(found, tmp_path / "other")
    message = fails(
        TINY, "--mode=analyze", f"--checkpoint={whole[0]}", f"--reference={tmp_path / 'other'}"
    )
    assert f"--reference={tmp_path / 'other'} shares no layer's name with the net of" in message
    assert f"{whole[0]}, as 'layers/0' is none of stem, " in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_net_is_refused(whole, fails):
    message = fails(
        TINY, "--mode=eval", f"--checkpoint={whole[0]}", "--config.layers[0].neuron=linear"
    )
    assert "holds another state" in message


def test_a_workdir_of_another_config_is_left_alone(whole, fails):
    before = (whole[0] / "config.json").read_text()
    message = fails(TINY, f"--workdir={whole[0]}", "--config.seed=1")
    assert "another config (seed: there 0, here 1)" in message
    assert (whole[0] / "config.json").read_text() == before


@pytest.mark.parametrize("mode", ["train", "summary"])
def test_a_workdir_that_cannot_be_made_is_named(fails, tmp_path, mode):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fails(TINY, f"--mode={mode}", f"--workdir={tmp_path}/file/x")


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_process_ends(tmp_path):
    result = shell(TINY, f"--workdir={tmp_path}", limit=32)
    assert result.returncode == 2, result.stderr
    message = rf"error: cannot save step 5 in {tmp_path}/checkpoints: .*File too large"
    assert re.search(message, result.stderr)
    assert not Checkpoints(tmp_path / "checkpoints").steps()  # nothing half-written counts


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(fails, command, tmp_path):
    """The learning rate jumps after the first epoch, so that step 6 ruins the weights."""
    jump = ["--config.schedule.name=multistep", "--config.schedule.milestones=(1.0,)"]
    jump += ["--config.schedule.factor=1e30", "--config.checkpoint.every_epochs=0.2"]
    jump += [f"--workdir={tmp_path / 'run'}"]
    message = fails(TINY, *jump)
    assert "at step 6; the last good checkpoint is step 5. Try a lower" in message
    assert "in a new --workdir" in message
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3, 4, 5]
    assert message == fails(TINY, *jump)  # from step 5 on, to the same end
    status, out, _ = command(TINY, *jump, "--mode=eval")
    assert status == 0 and "step 5 " in out
    saved = read(tmp_path / "run" / "config.json")["schedule"]
    assert saved["milestones"] == [1.0] and "name" in configs.defaults().schedule
