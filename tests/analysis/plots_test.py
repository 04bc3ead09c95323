"""Pictures and files of an analysis: what is in them, and nothing of what a net lacks."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from efficient_nets import analysis
from efficient_nets.analysis import maps, plots
from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, LayerSpec, convert
from tests.analysis.analyze_test import Net, batch

PICTURES = {
    *("histograms", "term_shares", "product_magnitude", "spectra", "feature_maps"),
    "kernel_maps",
    "first_and_second_order",
}


@pytest.fixture(scope="module")
def found():
    return analysis.analyze(Net(), *batch())


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in (*axis.texts, axis.title)]


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_quadratic_net_gets_every_picture(found, tmp_path):
    written = analysis.write_analysis(found, tmp_path, step=7)
    assert {path.stem for path in written} == PICTURES
    for path in written:
        assert path.parent == tmp_path / "plots" / "analysis"
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 5, path  # something is drawn
    assert list((tmp_path / "tensorboard" / "analysis").glob("events.out.tfevents*"))


def test_a_linear_net_gets_those_that_it_has_something_for(tmp_path):
    linear = convert(Net(), [dict(match="conv", neuron="linear", norm="none")], nnx.Rngs(0)())
    found = analysis.analyze(linear, *batch())
    written = analysis.plot_analysis(found, tmp_path)
    assert {path.stem for path in written} == {
        "histograms",
        "term_shares",
        "feature_maps",
        "kernel_maps",
    }


def test_analysis_json_holds_the_numbers(found, tmp_path):
    analysis.write_analysis(found, tmp_path, step=7)
    saved = strict_json(tmp_path / "analysis.json")
    assert (saved["step"], saved["images"]) == (7, 6)
    assert saved["loss"] == pytest.approx(found.loss, rel=1e-6)
    for plain, layer in zip(saved["layers"], found.layers, strict=True):
        assert plain["name"] == layer.name and plain["shares"] == pytest.approx(layer.shares)
        assert plain["activations"]["counts"] == layer.activations.counts.tolist()
        assert plain["weights"].keys() == plain["gradients"].keys() == layer.weights.keys()
        assert plain["nonfinite"] == layer.nonfinite
    conv = saved["layers"][1]
    assert np.shape(conv["spectrum"]["eigenvalues"]) == (4, 2)
    assert conv["spectrum"]["rank"] == [2] * 4 and saved["layers"][0]["spectrum"] is None


@pytest.fixture
def reference(found, tmp_path):
    """The same net, but for its stem."""
    analysis.write_analysis(found, tmp_path)
    reference = analysis.read_reference(tmp_path)
    del reference.activations["stem"], reference.maps["stem"]
    return reference


def test_activations_of_another_net_stand_beside_those_of_the_same_layers(found, reference):
    layer = found.layers[1]
    edges = reference.activations[layer.name].edges
    np.testing.assert_allclose(edges, layer.activations.edges, rtol=1e-6)
    figure = plots.beside_reference(found, reference)
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["second/conv", "first/conv", "head"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_maps_of_another_net_stand_beside_those_of_the_same_layers(found, reference):
    np.testing.assert_array_equal(reference.image, found.image)
    np.testing.assert_array_equal(reference.maps["head"], found.layers[3].map[:6])
    reference.maps["second/conv"] = 2 * reference.maps["second/conv"][:3]
    figure = maps.beside_reference(found, reference)
    rows = [axis.get_ylabel() for axis in figure.axes[::2]]
    assert rows == ["image", "second/conv", "first/conv", "head"]
    one, two = (axis.images[0].get_array() for axis in figure.axes[2:4])
    np.testing.assert_allclose(two, 2 * one[:3])
    scales = [axis.texts[0].get_text() for axis in figure.axes[2:4]]
    assert scales[0] != scales[1]


def test_a_net_without_layers_of_the_same_name_gets_no_picture_of_both(found, reference):
    none = dataclasses.replace(reference, activations={}, maps={})
    assert plots.beside_reference(found, none) is maps.beside_reference(found, none) is None


@pytest.mark.parametrize("file", ["analysis.json", "analysis_maps.npz"])
def test_a_reference_that_lacks_a_file_is_named(reference, tmp_path, file):
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"--reference={tmp_path} holds no {file}"):
        analysis.read_reference(tmp_path)


def test_bars_of_shares_fill_the_line(found):
    axis = plots.term_shares(found).axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axis.patches if bar.get_width()]
    assert max(ends) == pytest.approx(1) and "ours, cross" in " ".join(texts(axis.figure))


def test_a_spectrum_says_how_many_features_it_shows(found):
    layer = found.layers[1]
    few = dataclasses.replace(layer.spectrum, features=64)
    cut = dataclasses.replace(found, layers=(dataclasses.replace(layer, spectrum=few),))
    (title,) = [text for text in texts(plots.spectra(cut)) if text]
    assert title == "second/conv (ours)\nn = 36, rank 2, 4 of 64 features"


def test_what_is_not_finite_is_said_and_does_not_stop_the_plots(tmp_path):
    net, (images, labels) = Net(), batch()
    net.first.conv.b.kernel[...] = np.nan * net.first.conv.b.kernel[...]
    found = analysis.analyze(net, images, labels)
    assert len(analysis.write_analysis(found, tmp_path)) == len(PICTURES)
    assert strict_json(tmp_path / "analysis.json")["layers"][2]["product_rms"] is None
    assert "144 not finite" in texts(plots.histograms(found))
    assert "not finite" in texts(plots.product_magnitude(found))
    line = next(
        line for line in analysis.analysis_table(found).splitlines() if line.startswith("first")
    )
    assert "weights 144" in line


@pytest.mark.parametrize(
    ("shape", "picture"),
    [((5,), (1, 5)), ((7, 3), (3, 7)), ((96, 48, 3), (96, 3 * 48 + 2 * 4)), ((4, 6, 96, 1), None)],
)
def test_maps_lie_side_by_side(shape, picture):
    x = np.random.default_rng(0).normal(size=shape)
    found = maps.mosaic(x)
    assert found.shape == (picture or (6, 96))
    if len(shape) == 3:
        np.testing.assert_array_equal(found[:, 52:100], x[..., 1])
        assert np.isnan(found[:, 48:52]).all()
    if len(shape) == 4:
        np.testing.assert_array_equal(found, x[2, ..., 0])


@pytest.mark.parametrize("neuron", ["t1", "t2&4", "cqnn:2"])
def test_vectors_and_sequences_are_drawn_too(neuron, tmp_path):
    spec = LayerSpec(neuron=neuron)
    net = nnx.Sequential(
        Conv(2, 3, (3,), spec=spec, rngs=nnx.Rngs(0)), Dense(3, 2, spec=spec, rngs=nnx.Rngs(0))
    )
    x = np.random.default_rng(0).normal(size=(4, 9, 2)).astype(np.float32)
    found = analysis.analyze(net, x, x, lambda y, _: y.mean())
    assert len(analysis.plot_analysis(found, tmp_path)) == len(PICTURES)
