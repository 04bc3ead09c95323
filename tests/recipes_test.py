"""Recipes: which branches learn slower after a linear start, which layers are rounded."""

import re

import jax
import pytest
from flax import nnx

from efficient_nets import config as configs
from efficient_nets import layers, models, recipes
from efficient_nets.errors import UserError


@pytest.mark.parametrize(
    ("neuron", "slow", "linear"),
    [
        ("ours", ["conv1/a/kernel", "conv1/b/norm/scale"], ["conv1/c/kernel", "conv1/w/kernel"]),
        ("qres", ["head/b/kernel", "b/kernel"], ["head/a/kernel", "head/bias"]),
        ("t1:2", ["conv/u1/kernel", "conv/v2/kernel"], ["conv/w/kernel"]),
    ],
)
def test_products_learn_slower_and_the_linear_part_does_not(neuron, slow, linear):
    rule = recipes.slow_products(neuron, 0.1)
    assert rule["learning_rate"] == 0.1
    assert all(re.search(rule["match"], path) for path in slow)
    assert not any(re.search(rule["match"], path) for path in linear)


@pytest.mark.parametrize("neuron", ["linear", "t3"])
def test_a_neuron_without_such_products_is_named(neuron):
    with pytest.raises(UserError, match=f"neuron='{neuron}' has no products, or cannot start"):
        recipes.slow_products(neuron)


def precisions(name, rules, **options):
    """Of each layer, by path, as text."""

    def make():
        model = models.create(
            name, image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0), **options
        )
        return layers.convert(model, rules, jax.random.key(0))

    model = nnx.eval_shape(make)
    return {path: layer.spec.precision for path, layer in layers.layers(model)}


@pytest.mark.parametrize(
    ("arguments", "ends", "shortcuts"),
    [
        ({}, "float", "float"),
        (dict(shortcut="same"), "float", "lsq:w2a2"),
        (dict(first_last="8bit"), "lsq:w8a8", "float"),
        (dict(first_last="8bit", shortcut="same"), "lsq:w8a8", "lsq:w2a2"),
        (dict(first_last="all"), "lsq:w2a2", "float"),
        (dict(first_last="all", shortcut="same"), "lsq:w2a2", "lsq:w2a2"),
    ],
)
def test_quantized_rounds_what_its_policy_says(arguments, ends, shortcuts):
    found = precisions("resnet", recipes.quantized("lsq:w2a2", **arguments), depth=8)
    eight = ends == "lsq:w8a8"
    assert str(found["stem"]) == (f"{ends}s" if eight else ends)  # an image has a sign
    assert found["stem"].input is None or found["stem"].input.signed == eight
    assert str(found["head"]) == ends
    for stage in (2, 3):
        assert str(found.pop(f"stage{stage}/0/shortcut")) == shortcuts
    rest = {str(value) for path, value in found.items() if path not in ("stem", "head")}
    assert rest == {"lsq:w2a2"}


@pytest.mark.parametrize(
    ("name", "first", "options"),
    [
        ("vgg", "stage1/0/conv", dict(layout="small", width=0.0625)),
        ("mobilenet", "stem", dict(width=0.0625)),
        ("mobilenet_v2", "stem", dict(width=0.0625)),
        ("nin", "stem", dict(width=0.0625)),
        ("lenet", "conv1", dict(width=0.125)),
    ],
)
def test_quantized_knows_the_ends_of_every_net(name, first, options):
    found = precisions(name, recipes.quantized("xnor"), **options)
    assert {path for path, value in found.items() if str(value) == "float"} == {first, "head"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(precision="lsq:w2a2", first_last="8bits"), r"first_last='8bits' .*mean '8bit'"),
        (dict(precision="lsq:w2a2", shortcut="flaot"), r"shortcut='flaot' .*mean 'float'"),
        (dict(precision="lqs:w2a2"), r"precision='lqs' is not known"),
        (dict(precision="xnor", first_last="8bit"), r"first_last='8bit' with precision='xnor': "),
    ],
)
def test_bad_policies_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        recipes.quantized(**arguments)


def test_a_preset_gives_options_and_those_given_override_it():
    section = configs.model("resnet", preset="bireal", depth=20, shortcut="conv")
    assert "preset" not in section
    changed = dict(depth=20, skip="conv", activation="none", shortcut="conv")
    assert section == configs.model("resnet", **changed)
    assert configs.model("resnet", preset="torchvision") == configs.model("resnet")


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("resnet", "birael", r"preset='birael' is not known: .*mean 'bireal'"),
        ("vgg", "bireal", r"preset='bireal': 'vgg' has none"),
    ],
)
def test_an_unknown_preset_is_named(name, preset, message):
    with pytest.raises(UserError, match=message):
        configs.model(name, preset=preset)


@pytest.mark.parametrize(
    "precision, expected",
    [
        ("float", "torchvision"),
        ("lsq:w2a2", "torchvision"),
        ("dorefa:w1a2", "torchvision"),
        ("twn", "torchvision"),
        ("dorefa:w1a1", "torchvision"),  # of 0 and 1, not signs
        ("xnor", "xnor"),
        ("xnor++", "xnor"),
        ("bireal", "bireal"),
        ("w=twn,a=sign", "bireal"),
    ],
)
def test_inputs_of_signs_get_blocks_without_a_relu_in_front(precision, expected):
    assert recipes.preset(precision) == expected
    assert recipes.preset(precision, "lq") == (expected if expected != "torchvision" else "lq")
