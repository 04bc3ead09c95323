"""README.md tells the truth: its Python runs, its commands too, its links and figures are right.

Commands run at tiny size where they can run here, and else as far as launching goes. Each must be
of a kind that `HANDLERS` knows, so that a new one is not left untested.
"""

import os
import pathlib
import re
import shlex
import subprocess
import tomllib
import unittest.mock

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from efficient_nets import data, experiment
from efficient_nets.data import prepare, tfds_sets
from efficient_nets.ops import neurons, quantizers
from tests.data.conftest import write_tfds  # noqa: F401
from tests.detection_run_test import squares  # noqa: F401

# ml_collections reads a config file in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [
    line
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


class Reader:
    """Who types the commands, one after the other, in a folder of their own."""

    def __init__(self, folder, command, monkeypatch, boxes):
        self.folder, self.command, self.monkeypatch = folder, command, monkeypatch
        self.boxes = boxes  # the data_dir of the detection set 'squares'

    def main(self, words):
        """The command itself, on 16 digits and a 16th of the channels, with its folders moved."""
        moved = "workdir|checkpoint|reference|config.checkpoint.convert_from|config(?==runs)"
        moved += "|input|config.generation.features"
        moved = f"^(--(?:{moved})=)"
        words = [re.sub(moved, rf"\1{self.folder}/", word) for word in words]
        if not any(word.startswith("--workdir") for word in words):
            words.append(f"--workdir={self.folder}/default")
        if "--mode=summary" not in words:
            words += ["--config.data.name=digits", "--config.model.width=0.0625"]
            words += ["--config.data.train=train[:16]", "--config.data.test=test[:8]"]
            words += ["--config.train.batch_size=8", "--config.evaluate.batch_size=8"]
            words += ["--config.train.epochs=1", "--config.schedule.warmup_epochs=0.0"]
            words += self.tiny_net(words)
        if any(word.startswith("--input=") for word in words):
            (self.folder / "photos").mkdir()
            Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(self.folder / "photos" / "a.png")
        status, _, err = self.command(*words)
        assert status == 0, err

    def tiny_net(self, words):
        if any(re.search("factorized|lenet", word) for word in words):
            return []  # they are small
        if any("sngan" in word for word in words):
            return ["--config.model.discriminator_blocks=2"]
        if any("ssd" in word for word in words):
            return [
                *("--config.data.name=squares", f"--config.data.dir={self.boxes}"),
                *("--config.data.validation=", "--config.data.image_size=48"),
                "--config.layers=()",
            ]
        if any("built_config" in word for word in words):
            return []  # as small as what was searched
        if any("enas" in word for word in words):
            return [
                *("--config.model.nodes=1", "--config.model.layers=1"),
                *("--config.model.reductions=2", "--config.model.ops=('max3','identity')"),
                "--config.search.updates=1",
                *("--config.search.proposals=2", "--config.search.norm_batches=1"),
                *("--config.search.shown=2", "--config.search.finalists=2"),
                *("--config.search.batch_size=64", "--config.search.ranked=2"),
                *("--config.search.ranked_epochs=1", "--config.search.built_layers=0"),
                *("--config.search.built_features=0", "--config.search.built_epochs=0"),
            ]
        if not any("auto_builder" in word for word in words):
            return ["--config.model.depth=0", "--config.model.blocks=(1,1,1)"]
        return [  # one layer may go, and one round is enough
            *("--config.model.layout=Q7", "--config.layers=()"),
            *("--config.builder.candidates=stage2/1", "--config.builder.keep=0.95"),
            "--config.data.validation=train[16:24]",
        ]

    def launched(self, words, **env):
        """A launcher: it says what it would run, and the config that it is given exists."""
        env = os.environ | env | {"DRY_RUN": "1"}
        result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout, result.stderr
        if any(word.startswith("--config") for word in words):
            flags = [w for w in words if w.startswith("--config") or w.startswith("--mode")]
            self.main([*flags, "--mode=summary"])

    def script(self, words):
        self.launched(words)

    def slurm(self, words):
        script = next(i for i, word in enumerate(words) if not word.startswith("-"))
        self.launched(["bash", *words[script:]])

    def tpu_pod(self, words):
        script = next(i for i, word in enumerate(words) if "=" not in word)
        self.launched(words[script:], **dict(word.split("=", 1) for word in words[:script]))

    def prepare(self, words):
        def known(name, folder=""):
            assert tfds_sets.open_builder(name, str(folder)).info.features
            return "a folder"

        self.monkeypatch.setattr(prepare, "prepare", known)
        self.monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda _: True)
        prepare.main(words)

    def install(self, words):
        (extra,) = re.findall(r"^\.(?:\[(\w+)\])?$", words[-1]) or [None]
        assert words[0] == "-e" and extra is not None
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extra in ("", *project["optional-dependencies"])

    def tensorboard(self, words):
        flag, folder = words
        assert flag == "--logdir" and [*(self.folder / folder).rglob("events.out.tfevents*")]


# The start of a command, and what tries the words after it.
HANDLERS = {
    "python -m efficient_nets.main ": Reader.main,
    "python -m efficient_nets.data.prepare ": Reader.prepare,
    "pip install ": Reader.install,
    "tensorboard ": Reader.tensorboard,
    "sbatch ": Reader.slurm,
    "./launch/": lambda reader, words: reader.script(["./launch/" + words[0], *words[1:]]),
    "NAME=": lambda reader, words: reader.tpu_pod(["NAME=" + words[0], *words[1:]]),
}


@pytest.mark.slow
def test_every_command_runs(tmp_path, command, monkeypatch, squares):  # noqa: F811
    every = jax.local_devices()[:1]  # one, for which nets compile faster
    monkeypatch.setattr(jax, "devices", lambda: every)
    reader = Reader(tmp_path, command, monkeypatch, squares)
    assert len(COMMANDS) >= 8
    for line in COMMANDS:
        kinds = [start for start in HANDLERS if line.startswith(start)]
        assert len(kinds) == 1, f"README.md has a command that no test knows: {line}"
        HANDLERS[kinds[0]](reader, shlex.split(line.removeprefix(kinds[0]), comments=True))


def test_its_python_runs():
    mock = unittest.mock.patch.dict  # it adds to both tables
    with mock(neurons.NEURONS), mock(quantizers.METHODS):
        exec("\n".join(blocks("python")), {"__name__": "readme"})


def test_its_links_and_files_exist():
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    named = re.findall(r"`(?:python )?((?:tests|configs|launch)/[\w./]+)`", README)
    assert len(linked) > 3
    for path in {*linked, *named}:
        assert (ROOT / path).exists(), path


def test_its_table_names_every_config_with_its_parameters():
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)", README, re.MULTILINE))
    for path in (ROOT / "configs").glob("*.py"):
        namespace = {}
        exec(path.read_text(), namespace)
        # As its docstring says, which tests/configs_test.py holds against the net.
        said = re.search(r"([\d,]+) parameters", namespace["__doc__"])
        if said:
            parameters = said[1]
        else:
            config = namespace["get_config"]()
            model = experiment.abstract_model(config, data.describe(config.data, config.task))
            found = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
            parameters = f"{found:,}"
        assert f"| {parameters} |" in rows[path.stem], path.stem


def test_no_figure_is_left_to_be_filled_in():
    assert not re.findall(r"\b(QUICKSTART|LENET|MEMORY|RESULT|TODO)\b", README)


def test_the_promise_of_equal_bits_names_what_a_gpu_needs_for_it():
    (promise,) = re.findall(
        r"^- \*\*Reproducible\.\*\*.*?(?=^- )", README, re.DOTALL | re.MULTILINE
    )
    (variable,) = re.findall(r"`(\w+)=1`", promise)
    assert f"${{{variable}:-}}" in (ROOT / "launch" / "gpu.sh").read_text()
