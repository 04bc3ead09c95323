"""`efficient_nets.run`: one call, its result and its curves."""

import json

import pytest

import efficient_nets
from efficient_nets import recipes
from efficient_nets.errors import UserError

SMALL = {"model.width": 0.25, "train.batch_size": 96, "log.every_steps": 2}


def test_it_trains_and_gives_curves(tmp_path):
    run = efficient_nets.run(
        "digits", "lenet", "tucker:0.3", iterations=1, workdir=tmp_path, changes=SMALL
    )
    assert run.workdir == tmp_path
    assert run.result == json.loads((tmp_path / "result.json").read_text())
    table = (tmp_path / "summary.txt").read_text()
    assert "tucker:0.3" in table.splitlines()[3] and "dense" in table.splitlines()[5]
    steps, values = run.curves["accuracy"]["validation"]
    assert steps[-1] == run.result["steps"] and values[-1] == run.result["validation/accuracy"]
    assert run.result["test/accuracy"] > 0.3
    assert run.curves["loss"].keys() == {"train", "validation"}


def test_errors():
    with pytest.raises(UserError, match="model='resnet' is not known: allowed lenet, vgg"):
        efficient_nets.run("digits", "resnet")
    with pytest.raises(UserError, match="kernel='tensor' is not known: allowed bt, cp"):
        efficient_nets.run("digits", "lenet", "tensor:1")
    with pytest.raises(UserError, match="dense=2, kept=False: kernel='dense' decomposes nothing"):
        recipes.factorized("dense", dense=2)
    with pytest.raises(UserError, match="dense_iterations=1: without a decomposition, give 0"):
        efficient_nets.run("digits", dense_iterations=1)
    for name in ("train.batch", "batch_size", "model.x.y"):
        with pytest.raises(UserError, match=f"changes: the config has no field '{name}'"):
            efficient_nets.run("digits", changes={name: 1})
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        efficient_nets.runs  # noqa: B018
