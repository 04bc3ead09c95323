"""The whole loop on digits, killed and gone on with; how it chooses and stops; what it refuses."""

import json
import re
import runpy

import jax
import pytest

from efficient_nets import config as configs
from efficient_nets import train as training
from efficient_nets.errors import TrainingDiverged
from efficient_nets.search import auto_builder, builder_report, reduction
from tests.search.conftest import tiny_config

# ml_collections reads a config file in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

TIMES = ("seconds", "train_seconds")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped, and its report."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, auto_builder.build(tiny_config(), workdir, training.train)


def without_times(report):
    rounds = [{k: v for k, v in r.items() if k not in TIMES} for r in report["rounds"]]
    return report | {"rounds": rounds}


def read(path):
    return json.loads(path.read_text())


# The whole loop


def test_it_removes_layers_by_ri_until_the_budget_is_met(whole):
    workdir, report = whole
    rounds = report["rounds"]
    assert report["stopped"] == "budget" and report["answer"] == 2 == len(rounds) - 1
    assert {layer for r in rounds for layer in r["removed"]} == {"conv1", "conv2"}
    best = max(rounds[0]["scores"], key=lambda score: score["ri"])
    assert rounds[1]["removed"] == [best["layer"]]
    assert [len(r.get("scores", ())) for r in rounds] == [2, 1, 0]
    for number, record in enumerate(rounds):
        summary = read(workdir / f"round_{number}" / "summary.json")
        assert (record["params"], record["macs"]) == (summary["params"], summary["macs"])
        assert 0 < record["seconds"] < 1 and 0 <= record["test/accuracy"] <= 1
    macs = [record["macs"] for record in rounds]
    assert macs[2] <= report["budget"]["limit"] == 0.3 * macs[0] < macs[1] < macs[0]
    assert report["budget"]["least"] == macs[2]


def test_a_round_goes_on_from_the_weights_of_the_one_before(whole):
    workdir, _ = whole
    first, second = (read(workdir / f"round_{number}" / "config.json") for number in (0, 1))
    assert first["checkpoint"]["init_from"] == "" and first["train"]["epochs"] == 4
    assert second["checkpoint"]["init_from"] == str(workdir / "round_0")
    assert second["train"]["epochs"] == 1
    assert second["optimizer"]["learning_rate"] == 0.05 * 0.5
    assert first["builder"] == second["builder"] == configs.defaults().builder.to_dict()
    assert [bool(rule.get("remove")) for rule in second["layers"]] == [True, False]
    third = read(workdir / "round_2" / "config.json")
    assert [bool(rule.get("remove")) for rule in third["layers"]] == [True, True]
    assert third["optimizer"]["rules"] == []  # no branch a or b is left for it to match


def test_it_leaves_a_report_to_read(whole):
    workdir, report = whole
    assert read(workdir / "report.json") == json.loads(json.dumps(report))
    text = (workdir / "report.txt").read_text()
    assert re.search(r"^ *2\*.* 100\.00%|^ *2\* +conv", text, re.MULTILINE)
    assert "without 2 layers" in text and "budget 30.00%" in text
    assert (workdir / "plots" / "auto_builder.png").stat().st_size > 10_000


def test_the_built_config_is_a_config_that_main_trains(whole, command, tmp_path):
    workdir, report = whole
    path = workdir / "built_config.py"
    built = runpy.run_path(str(path))["get_config"]()
    expected = reduction.reduced(tiny_config(), report["removed"])
    assert configs.to_json(built) == configs.to_json(expected)
    status, out, err = command(f"--config={path}", f"--workdir={tmp_path}")
    assert status == 0, err
    assert read(tmp_path / "result.json")["params"] == report["rounds"][2]["params"]
    assert "remove" not in out and "conv2" in out


def test_the_weights_of_the_built_net_are_there_to_evaluate(whole, command, tmp_path):
    workdir, report = whole
    (line,) = re.findall(
        "main (.*--mode=eval.*) --workdir", (workdir / "built_config.py").read_text()
    )
    status, _, err = command(*line.split(), f"--workdir={tmp_path}")
    assert status == 0, err
    assert read(tmp_path / "eval.json")["test/accuracy"] == report["rounds"][2]["test/accuracy"]


class Killed(Exception):
    pass


def test_killed_anywhere_and_started_again_it_ends_with_the_same_report(
    whole, tmp_path, monkeypatch
):
    moments = ["before round_1", "after round_1", "before scores", "after scores"]
    score = auto_builder.importance.score
    scored = []

    def train(config, workdir):
        name = workdir.name
        if f"before {name}" in moments:
            moments.remove(f"before {name}")
            raise Killed
        result = training.train(config, workdir)
        if f"after {name}" in moments:
            moments.remove(f"after {name}")
            raise Killed
        return result

    def killed_score(*args, **kwargs):
        if moments == ["before scores", "after scores"]:
            moments.pop(0)
            raise Killed
        scored.append(1)
        found = score(*args, **kwargs)
        if moments == ["after scores"]:
            moments.pop(0)
            raise Killed
        return found

    monkeypatch.setattr(auto_builder.importance, "score", killed_score)
    for _ in range(4):
        with pytest.raises(Killed):
            auto_builder.build(tiny_config(), tmp_path, train)
    report = auto_builder.build(tiny_config(), tmp_path, train)
    assert not moments and len(scored) == 3  # of round 0 once, of round 1 twice
    assert without_times(report) == without_times(whole[1])
    assert report["rounds"][2]["params_digest"] == whole[1]["rounds"][2]["params_digest"]
    # Once finished, nothing is done again.
    assert auto_builder.build(tiny_config(), tmp_path, None) == report


def test_a_workdir_of_another_builder_or_run_is_left_alone(whole, config, tmp_path):
    workdir, _ = whole
    before = (workdir / "builder.json").read_text()
    config.builder.mask_seeds = 3
    with pytest.raises(ValueError, match=r"another config \(builder.mask_seeds: there 2, here 3\)"):
        auto_builder.build(config, workdir, None)
    with pytest.raises(ValueError, match="another config"):
        training.train(reduction.reduced(config, ()), workdir)
    assert (workdir / "builder.json").read_text() == before


# How it chooses and stops: nothing is trained from here on


@pytest.fixture
def fake(config, tmp_path, monkeypatch):
    """Builds with a `train` that gives these accuracies, and these RIs by layer."""

    def build(accuracies, ri=(), seconds=(), **builder):
        config.builder.update(builder)
        times = iter(seconds)
        monkeypatch.setattr(auto_builder, "_seconds", lambda *_: next(times))
        monkeypatch.setattr(auto_builder._Round, "forward_seconds", lambda self: next(times, 0.1))
        monkeypatch.setattr(
            auto_builder._Round,
            "scores",
            lambda self, left: [dict(layer=layer, ri=dict(ri)[layer]) for layer in left],
        )

        def train(config, workdir):
            cost = reduction.cost(config)
            accuracy = accuracies[int(workdir.name.removeprefix("round_"))]
            if accuracy is None:
                raise TrainingDiverged("the loss is not finite")
            costs = dict(params=cost["params"], macs=cost["macs"], seconds=1.0)
            return costs | {"validation/accuracy": accuracy, "params_digest": ""}

        return auto_builder.build(config, tmp_path, train)

    return build


RI = {"conv1": 2.0, "conv2": 1.0}


def test_the_highest_ri_goes_first(fake):
    report = fake([0.9, 0.8, 0.7], RI)
    assert [record["removed"] for record in report["rounds"]] == [[], ["conv1"], ["conv2"]]
    assert "-" in builder_report.table(report)  # there was no test split


def test_below_the_floor_the_round_before_is_the_answer(fake, tmp_path):
    report = fake([0.9, 0.8, 0.7], RI, accuracy_floor=0.75)
    assert (report["stopped"], report["answer"], report["removed"]) == ("floor", 1, ["conv1"])
    built = runpy.run_path(str(tmp_path / "built_config.py"))["get_config"]()
    assert [rule["match"] for rule in built.layers] == ["^conv1$", "conv"]
    assert "fell below the accuracy floor" in (tmp_path / "report.txt").read_text()


def test_a_round_that_diverges_ends_the_loop(fake, tmp_path):
    report = fake([0.9, 0.8, None], RI)
    assert (report["stopped"], report["answer"], report["removed"]) == ("diverged", 1, ["conv1"])
    assert "training the next net diverged" in (tmp_path / "report.txt").read_text()
    assert (tmp_path / "plots" / "auto_builder.png").exists()


def test_a_first_net_that_diverges_is_an_error(fake):
    with pytest.raises(TrainingDiverged):
        fake([None], RI)


def test_a_first_net_below_the_floor_is_an_error(fake):
    with pytest.raises(ValueError, match="accuracy_floor=0.95: the first net, .* of 0.9000"):
        fake([0.9], RI, accuracy_floor=0.95)


@pytest.mark.parametrize(("keep", "removed"), [(0.3, ["conv2", "conv1"]), (0.5, ["conv2"])])
def test_several_layers_a_round_but_no_more_than_the_budget_needs(fake, keep, removed):
    report = fake([0.9, 0.8], {"conv2": 2.0, "conv1": 1.0}, layers_per_round=2, keep=keep)
    assert [record["removed"] for record in report["rounds"]] == [[], removed]


def test_a_net_within_the_budget_is_the_answer_at_once(fake):
    report = fake([0.9], keep=1.0)
    assert report["answer"] == 0 and report["removed"] == []


def test_a_budget_of_time_is_measured_and_may_not_be_met(fake):
    report = fake([0.9, 0.8, 0.7], RI, [1.0, 0.4, 1.0, 0.9, 0.8], budget="seconds", keep=0.5)
    assert report["budget"] == dict(
        kind="seconds", keep=0.5, first=1.0, limit=0.5, least=0.4, batch_size=64
    )
    assert (report["stopped"], report["answer"]) == ("candidates", 2)


def test_time_is_measured_on_a_fresh_net_too(config):
    found = auto_builder._measured(reduction.reduced(config, ()), "seconds")
    assert 0 < found < 1


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"builder.budget": "flops"}, "builder.budget='flops' is not known: allowed macs, params"),
        ({"builder.keep": 0.0}, "builder.keep=0.0: allowed above 0, up to 1"),
        ({"builder.keep": 1.5}, "builder.keep=1.5: allowed above 0, up to 1"),
        ({"builder.keep": 0.01}, r"keep=0.01 is below what is reachable: with all 2 candid.* MACs"),
        ({"builder.mask_fraction": 0.0}, "builder.mask_fraction=0.0: allowed above 0"),
        ({"builder.mask_seeds": 0}, "builder.mask_seeds=0: must be above 0"),
        ({"builder.layers_per_round": 0}, "builder.layers_per_round=0: must be above 0"),
        ({"builder.finetune_epochs": 0.0}, "builder.finetune_epochs=0.0: must be above 0"),
        ({"builder.accuracy_floor": 90.0}, "builder.accuracy_floor=90.0: allowed 0 to 1"),
        ({"builder.candidates": "cnv"}, "builder.candidates='cnv': it matches none.*conv1, conv2"),
        ({"builder.candidates": "("}, r"builder.candidates='\(' is no regular expression"),
        ({"builder.candidates": "head"}, "candidates='head': .* a dense layer from 16 to 10"),
        ({"data.validation": ""}, "data.validation='': the auto-builder scores layers on held-out"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_anything_is_trained(config, tmp_path, fields, message):
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        auto_builder.build(config, tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


def test_the_least_reachable_value_is_reachable(config, tmp_path):
    config.builder.keep = 0.01
    with pytest.raises(ValueError) as error:
        auto_builder.build(config, tmp_path, None)
    least = float(re.search(r"must be at least ([\d.]+)", str(error.value))[1])
    config.builder.keep = least
    found = auto_builder._budget(config, ["conv1", "conv2"])
    assert found["least"] <= found["limit"] < 1.01 * found["least"]


def test_a_layer_whose_removal_saves_nothing_is_no_candidate(config):
    """A linear 1x1 convolution to other channels is its own adapter."""
    config.model = configs.model("mobilenet", layout="q8", width=0.125)
    config.layers, config.optimizer.rules = (), ()
    config.builder.candidates = "wise"
    found = reduction.candidates(config)
    assert "blocks/3/depthwise" in found and "blocks/2/pointwise" in found
    assert "blocks/3/pointwise" not in found
    config.builder.candidates = "blocks/3/pointwise"
    with pytest.raises(ValueError, match="removing blocks/3/pointwise saves nothing"):
        reduction.candidates(config)


def test_main_runs_the_builder_where_a_budget_is_given(command, tmp_path):
    flags = ("--config=tests/tiny_config.py", "--config.builder.budget=macs")
    status, _, err = command(*flags, f"--workdir={tmp_path}")
    assert status == 2 and "data.validation=''" in err
    assert jax.devices()  # nothing was trained
    assert not (tmp_path / "config.json").exists()


def test_rounds_start_from_the_round_before_and_the_built_net_from_scratch(config):
    config.checkpoint.convert_from = "linear"
    first = reduction.of_round(config, [], "")
    second = reduction.of_round(config, ["conv2"], "round_0")
    assert (first.checkpoint.convert_from, first.checkpoint.init_from) == ("linear", "")
    assert (second.checkpoint.convert_from, second.checkpoint.init_from) == ("", "round_0")
    for made in (first, second, built := reduction.built(config, ["conv2"])):
        configs.check(made)
    assert (built.checkpoint.convert_from, built.checkpoint.init_from) == ("", "")


def test_a_time_budget_is_for_the_batch_that_it_was_measured_on(config, tmp_path):
    config.builder.budget = "seconds"
    budget = dict(kind="seconds", keep=0.3, first=1.0, limit=0.3, least=0.1, batch_size=7)
    progress = json.dumps(dict(budget=budget, rounds=[]))
    (tmp_path / "builder.json").write_text(progress)
    (tmp_path / "config.json").write_text(configs.to_json(config))
    with pytest.raises(ValueError, match="batch_size=64: the budget was measured on batches of 7"):
        auto_builder.build(config, tmp_path, training.train)
