import json

import ml_collections
import pytest

from efficient_nets import config as configs
from efficient_nets import models, tasks
from efficient_nets.errors import UserError


def test_defaults_pass_their_own_check():
    configs.check(configs.defaults())


def test_a_config_without_a_known_model_names_the_near_one():
    config = configs.defaults()
    config.model.name = "resnets"
    with pytest.raises(UserError, match=r"model.name='resnets'.*did you mean 'resnet'"):
        configs.check(config)


@pytest.mark.parametrize(
    "section, field, near",
    [("train", "epoch", "epochs"), ("data", "flips", "flip"), ("optimizer", "lr", "learning_rate")],
)
def test_an_unknown_field_names_section_and_what_is_allowed(section, field, near):
    config = configs.defaults()
    with config.unlocked():
        config[section][field] = 1
    with pytest.raises(UserError, match=rf"config.{section} has no field '{field}'.*{near}"):
        configs.check(config)


def test_a_missing_field_is_named():
    config = configs.defaults()
    del config.train.ema
    with pytest.raises(UserError, match="config.train.ema is missing"):
        configs.check(config)


@pytest.mark.parametrize(
    "section, field, value, needed",
    [
        ("train", "batch_size", 12.5, "a int is needed"),
        ("train", "epochs", "ten", "a float is needed"),
        ("data", "flip", 1, "a bool is needed"),
        ("schedule", "milestones", 30, "a tuple is needed"),
        ("train", "ema", 1.0, "must be at least 0 and below 1"),
        ("train", "batch_size", 0, "must be above 0"),
        ("checkpoint", "every_epochs", -1.0, "must be above 0"),
        ("train", "epochs", float("nan"), "must be above 0"),
        ("train", "epochs", float("inf"), "must be above 0"),
        ("optimizer", "learning_rate", 0.0, "must be above 0"),
        ("checkpoint", "keep", 0, "must be at least 1"),
        ("train", "steps_per_dispatch", -1, "must be at least 0"),
        ("optimizer", "clip_norm", -0.5, "must be at least 0"),
        ("optimizer", "weight_decay", -1e-4, "must be at least 0"),
        ("schedule", "warmup_epochs", -1.0, "must be at least 0"),
        ("checkpoint", "init_from", "gs://bucket/run", "only folders of this machine, or mounted"),
        ("log", "histograms_every_epochs", -1.0, "must be at least 0"),
    ],
)
def test_a_wrong_value_names_field_value_and_what_is_needed(section, field, value, needed):
    config = configs.defaults()
    config[section] = ml_collections.ConfigDict({**config[section].to_dict(), field: value})
    with pytest.raises(UserError, match=f"{section}.{field}={value!r}.*{needed}"):
        configs.check(config)


def test_a_task_refuses_what_only_another_one_heeds(monkeypatch):
    class Other:
        fields, modes = ("other", "data.cutout"), ()

    monkeypatch.setitem(tasks.TASKS, "other", Other)
    config = configs.defaults()
    config.task = "others"
    with pytest.raises(UserError, match="task='others' is not known: .*did you mean 'other'"):
        configs.check(config)
    config.task = "other"
    with pytest.raises(UserError, match="model.name='resnet': it is for task='classification'"):
        configs.check(config)
    monkeypatch.setitem(models.TASKS, "resnet", "other")
    config.data.cutout = 4
    configs.check(config)
    config.data.mixup = 0.2
    with pytest.raises(UserError, match="data.mixup=0.2: only task=classification heeds it"):
        configs.check(config)
    config.data.mixup, config.search.strategy = 0.0, "random"
    with pytest.raises(UserError, match="search.strategy='random': only task=classification"):
        configs.check(config)
    assert tasks.heeding("modes", "train") == [*tasks.TASKS]
    assert tasks.heeding("modes", "search") == ["classification"]


def test_a_builder_without_a_budget_is_no_builder():
    config = configs.defaults()
    config.builder.keep = 0.3
    with pytest.raises(UserError, match="builder.budget='': without one the other fields"):
        configs.check(config)


def test_the_seed_is_not_negative():
    config = configs.defaults()
    config.seed = -1
    with pytest.raises(UserError, match="seed=-1: must be at least 0"):
        configs.check(config)


def test_a_rule_with_an_unknown_field_is_found_before_anything_is_built():
    config = configs.defaults()
    config.layers = (dict(match="conv", neurone="ours"),)
    with pytest.raises(UserError, match=r"layers\[0\] has no field 'neurone'.*'neuron'"):
        configs.check(config)


def test_model_options_are_checked_and_completed():
    section = configs.model("resnet", blocks=(1, 1, 1))
    assert section.blocks == (1, 1, 1) and "width" in section
    with pytest.raises(UserError, match="has no field 'block'.*'blocks'"):
        configs.model("resnet", block=(1, 1, 1))


def test_fingerprint_follows_what_is_computed_and_nothing_else():
    config = configs.defaults()
    first = configs.fingerprint(config)
    config.log.every_steps += 1
    config.data.workers += 1
    config.checkpoint.keep += 1
    config.evaluate.batch_size += 1
    assert configs.fingerprint(config) == first
    config.seed += 1
    assert configs.fingerprint(config) != first


def test_differences_name_the_fields_of_two_runs():
    config = configs.defaults()
    saved = configs.to_json(config)
    assert configs.differences(config, saved) == []
    config.train.epochs = 7.0
    config.layers = (dict(match="conv", neuron="ours"),)
    found = configs.differences(config, saved)
    assert [line.split(":")[0] for line in found] == ["layers", "train.epochs"]
    assert found[1] == "train.epochs: there 1.0, here 7.0"


def test_a_run_saved_before_a_field_was_there_has_its_default():
    config = configs.defaults()
    saved = json.loads(configs.to_json(config))
    del saved["calibration"]["norm_batches"], saved["deploy"], saved["model"]["shortcut"]
    found = configs.from_json(json.dumps(saved))
    configs.check(found)
    assert found == config
    assert configs.differences(config, json.dumps(saved)) == []
    config.model.shortcut = "pad"
    assert configs.differences(config, json.dumps(saved)) == [
        "model.shortcut: there 'conv', here 'pad'"
    ]


def test_json_of_a_config_is_valid_and_stable():
    config = configs.defaults()
    assert json.loads(configs.to_json(config))["schedule"]["name"] == "cosine"
    assert configs.to_json(config) == configs.to_json(configs.defaults())


def test_a_preset_behind_the_name():
    found = configs.model("resnet:bireal", depth=20)
    assert found == configs.model("resnet", preset="bireal", depth=20)
    assert (found.name, found.skip) == ("resnet", "conv")
    with pytest.raises(UserError, match="preset='birael' is not known: .* did you mean 'bireal'"):
        configs.model("resnet:birael")
    with pytest.raises(UserError, match="resnet:xnor names one already"):
        configs.model("resnet:xnor", preset="bireal")
