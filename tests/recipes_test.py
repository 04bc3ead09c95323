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


def converted(rules, name="resnet", **options):
    """Its layers by path, none of which an idle rule would have let through."""
    if name == "resnet":
        options = models.preset("resnet", "winograd") | dict(blocks=(1, 1, 1, 1)) | options

    def make():
        model = models.create(
            name, image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0), **options
        )
        return layers.convert(model, rules, jax.random.key(0))

    return dict(layers.layers(nnx.eval_shape(make)))


OUTER = {"kernel", "input", "output"}
MULTIPLIED = {"transformed_input", "transformed_kernel"}
INSIDE = MULTIPLIED | {"hadamard"}


@pytest.mark.parametrize(
    ("method", "bits", "sites"),
    [
        ("direct", 8, OUTER),
        ("direct", 0, set()),
        ("static", 8, OUTER | INSIDE),
        ("static-rounded", 2, OUTER | INSIDE | {"transforms"}),
        ("flex", 8, OUTER | INSIDE | {"transforms"}),
        ("flex", 0, set()),
        ("tap", 4, OUTER | MULTIPLIED),
    ],
)
def test_winograd_is_the_experiment_of_its_paper(method, bits, sites):
    found = converted(recipes.winograd(method, bits=bits), width=1 / 16)
    tiled = {path for path, layer in found.items() if layer.spec.algorithm != "direct"}
    assert len(found) == 1 + 8 + 4 + 1
    convs = {path for path in found if path.startswith("stage") and "shortcut" not in path}
    assert tiled == (convs if method != "direct" else set()) and len(convs) == 8
    for path, layer in found.items():
        own = layer.spec.precision.quantizers
        ends = path in ("stem", "head")
        assert own.keys() == (set() if ends else sites if path in convs else sites & OUTER)
        taps = MULTIPLIED if method == "tap" else set()
        for site, quantizer in own.items():
            assert quantizer.signed and quantizer.levels == 2**bits
            assert quantizer.per == ("tap" if site in taps else "layer")
            assert quantizer.method == ("lsq" if site in taps else "minmax")
            assert quantizer.power_of_two == (site in taps)
        learned = {} if layer.transforms is None else layer.transforms
        assert len(learned) == (3 if method == "flex" and path in convs else 0)


@pytest.mark.parametrize(("tile", "tiles"), [(2, {2}), (0, {4}), (4, {4}), (6, {4, 6})])
def test_maps_of_four_pixels_have_no_larger_tile(tile, tiles):
    rules = recipes.winograd("static", tile=tile, bits=0)
    found = converted(rules, width=1 / 16)
    of_stage = {}
    for path, layer in found.items():
        if layer.spec.algorithm != "direct":
            of_stage.setdefault(path[:6], set()).add(layer.spec.algorithm.tile)
    assert set.union(*of_stage.values()) == tiles and of_stage.keys() >= {"stage1", "stage4"}
    assert of_stage["stage4"] == {min(tiles)} and of_stage["stage3"] == {max(tiles)}


@pytest.mark.parametrize(
    ("name", "tiled", "options"),
    [
        ("resnext", 6, dict(width=1 / 16)),
        ("squeezenet", 8, dict(width=1 / 16)),
        ("lenet", 2, dict(width=1 / 8)),
    ],
)
def test_winograd_knows_the_other_nets_of_its_paper(name, tiled, options):
    found = converted(recipes.winograd("static", architecture=name), name, **options)
    assert sum(layer.spec.algorithm != "direct" for layer in found.values()) == tiled
    left = {path for path, layer in found.items() if not layer.spec.precision.quantizers}
    assert left == {"stem", "head"} & found.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(method="flax"), r"method='flax' is not known: .*mean 'flex'"),
        (dict(method="flex", architecture="vgg"), r"architecture='vgg' is not known: .*lenet"),
        (dict(method="flex", bits=1), r"bits=1: allowed 0 \(float\), 2 to 8"),
        (dict(method="flex", bits=9), r"bits=9: allowed"),
        (dict(method="tap", bits=0), r"bits=0 with method='tap': there is nothing to round"),
        (dict(method="static-rounded", bits=0), r"bits=0 with method='static-rounded': "),
        (dict(method="direct", tile=4), r"tile=4 with method='direct': it has no tiles"),
    ],
)
def test_what_winograd_cannot_be_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        recipes.winograd(**arguments)


def test_a_config_s_argument_is_read_by_its_defaults():
    defaults = dict(method="flex", tile=4, width=0.5)
    assert recipes.arguments("flex", **defaults) == defaults
    assert recipes.arguments("tap,width=1", **defaults) == dict(method="tap", tile=4, width=1.0)
    assert recipes.arguments("tile=6,method=x", **defaults) == dict(defaults, tile=6, method="x")
    found = recipes.arguments("tt:energy=0.9,tile=6", **defaults)
    assert found == dict(defaults, method="tt:energy=0.9", tile=6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flex,6", r"argument 'flex,6': '6' is no key=value"),
        ("flex,tyle=6", r"argument has no field 'tyle'.*mean 'tile'"),
        ("flex,tile=6,tile=4", r"argument 'flex,tile=6,tile=4': 'tile' is given twice"),
        ("flex,tile=six", r"argument 'flex,tile=six': tile takes a int, not 'six'"),
    ],
)
def test_a_config_s_argument_is_checked(text, message):
    with pytest.raises(UserError, match=message):
        recipes.arguments(text, method="flex", tile=4)


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
