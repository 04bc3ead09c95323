"""A config written as a file is the config again."""

import pathlib
import runpy

import pytest

from efficient_nets import config as configs
from efficient_nets.search import config_file

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_comes_back_as_it_was(path, tmp_path):
    config = runpy.run_path(str(path))["get_config"]()
    written = tmp_path / "written.py"
    written.write_text(config_file.source(config, "What it is."))
    module = runpy.run_path(str(written))
    assert module["__doc__"] == "What it is."
    assert configs.to_json(module["get_config"]()) == configs.to_json(config)


def test_it_says_what_differs_from_the_defaults_and_nothing_else():
    config = configs.defaults()
    config.model = configs.model("vgg", layout="A")
    config.layers = (dict(match=r"^stage1/0/conv$", remove=True), dict(match=r"stage\d"))
    config.train.epochs = 2.5
    config.optimizer.rules = ()
    assert config_file.source(config, "A net.").splitlines() == [
        '"""A net."""',
        "",
        "from efficient_nets import config as configs",
        "",
        "",
        "def get_config():",
        "    config = configs.defaults()",
        "    config.model = configs.model('vgg', layout='A')",
        "    config.layers = (",
        "        dict(match='^stage1/0/conv$', remove=True),",
        "        dict(match='stage\\\\d'),",
        "    )",
        "    config.optimizer.rules = ()",
        "    config.train.epochs = 2.5",
        "    return config",
    ]
